"""The fused step of SignRound against autograd through the straight-through formula, written down anew here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup, TunableLinear, stack_tasks
from auto_round.schemes import QuantizationScheme


class Record:
    """A step rule that keeps the gradient and moves nothing."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        self.gradient = gradient.clone()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("columns, size", [(16, 8), (13, 8), (16, -1), (12, 0)])
def test_tuning_may_start_from_any_codes(columns: int, size: int, sym: bool) -> None:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(3))
    scheme = QuantizationScheme(3, size, sym)
    wanted = torch.randint(0, 8, (6, columns), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    group, _ = layer_of(weight, None, scheme, codes=[wanted])
    for _ in range(2):
        assert torch.equal(group.finish()[0].codes.codes, wanted)
        group.rounding_delta.add_(0.3)
        group.restart()


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None, scheme: QuantizationScheme, **kw: Any) -> Any:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    task = LayerTask("layer", module, weight, scheme, bias=bias)
    grid = task.start(False, torch.float32)
    group = LearnableGroup([task], [grid], torch.float32, **kw)
    return group, TunableLinear(group, 0)


def reference(group: Any, linear: Any, x: torch.Tensor, target: torch.Tensor, columns: int) -> tuple[torch.Tensor, ...]:
    """(loss, dL/dv, dL/df, dL/dx) in float64 by autograd."""
    groups, start = group.blocks.double(), group.grid.start_scales[0].double()
    zero = group.grid.zero.double() if isinstance(group.grid.zero, torch.Tensor) else group.grid.zero
    rounding_delta = group.rounding_delta.double().clone().requires_grad_()
    scale_factor = group.scale_factors[0].double().clone().requires_grad_()
    x = x.double().requires_grad_()
    scale = start * scale_factor
    codes = (RoundSTE.apply(groups / scale + rounding_delta) + zero).clamp(0, 2**group.scheme.bits - 1)
    weight = ((codes - zero) * scale).reshape(group.quantized.shape[0], -1)[:, :columns]
    bias = None if linear.bias is None else linear.bias.double()
    loss = (torch.nn.functional.linear(x, weight, bias) - target.double()).square().mean()
    loss.backward()
    return loss.detach(), rounding_delta.grad, scale_factor.grad, x.grad  # type: ignore[return-value]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("columns, size", [(16, 8), (13, 8), (16, -1), (12, 0), (5, 8)])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_equal_autograd(bits: int, columns: int, size: int, sym: bool) -> None:
    torch.manual_seed(columns + bits)
    weight, bias = torch.randn(6, columns), torch.randn(6)
    group, layer = layer_of(weight, bias, QuantizationScheme(bits, size, sym))
    # Off the start: codes beyond the clamp, and offsets that are not zero.
    group.scale_factors = [torch.rand_like(group.scale_factors[0]) * 0.4 + 0.6]
    group.apply_scale_factors()
    group.rounding_delta = torch.rand_like(group.rounding_delta) - 0.5
    group.refresh()
    rules = [Record(), Record()]
    group.rules, group.fuse_update = rules, False
    x, target = torch.randn(2, 7, columns), torch.randn(2, 7, 6)
    own = x.clone().requires_grad_()
    loss = (layer(own) - target).square().mean()
    loss.backward()
    group.step(0.1, 0.1)
    expected = reference(group, layer, x, target, columns)
    assert torch.allclose(loss.double(), expected[0], rtol=1e-4)
    real = torch.ones_like(group.rounding_delta, dtype=torch.bool)
    if size > 0:
        padding = torch.nn.functional.pad(torch.ones(6, columns), (0, -columns % group.rounding_delta.shape[-1]))
        real = padding.view(group.rounding_delta.shape).bool()
    assert bool((expected[1][real] == 0).any()) and bool((expected[1][real] != 0).any())  # some are clamped
    assert torch.allclose(rules[0].gradient[real].double(), expected[1][real], rtol=1e-3, atol=1e-7)
    assert torch.allclose(rules[1].gradient.double(), expected[2], rtol=1e-3, atol=1e-6)
    assert own.grad is not None and torch.allclose(own.grad.double(), expected[3], rtol=1e-3, atol=1e-6)


def test_the_sign_step_moves_by_the_rate_against_the_gradient() -> None:
    torch.manual_seed(0)
    group, layer = layer_of(torch.randn(6, 16), None, QuantizationScheme(4, 8, False))
    x, target = torch.randn(9, 16), torch.randn(9, 6)
    expected = reference(group, layer, x, target, 16)
    (layer(x) - target).square().mean().backward()
    group.step(0.125, 0.0625)
    assert torch.equal(group.rounding_delta, -0.125 * expected[1].sign().float())
    assert torch.allclose(group.scale_factors[0] - 1, -0.0625 * expected[2].sign().float(), atol=1e-6)


def test_passes_accumulate_to_one_batch() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    x, target = torch.randn(8, 16), torch.randn(8, 6)
    made = [layer_of(weight, None, QuantizationScheme(4, 8)) for _ in range(2)]
    for (_, layer), parts in zip(made, ([slice(0, 8)], [slice(0, 3), slice(3, 8)]), strict=True):
        for part in parts:
            ((layer(x[part]) - target[part]).square().sum() / target.numel()).backward()
    assert torch.allclose(made[0][0].gradient, made[1][0].gradient, atol=1e-6)


@pytest.mark.parametrize("kw", [{}, {"momentum": 0.9}, {"adam": True}], ids=repr)
def test_layers_in_one_group_move_as_each_alone(kw: Any) -> None:
    torch.manual_seed(0)
    scheme = QuantizationScheme(4, 8, False)
    weights = [torch.randn(rows, 13) for rows in (6, 2, 5)]
    tasks = [LayerTask(str(i), torch.nn.Linear(13, w.shape[0]), w, scheme) for i, w in enumerate(weights)]
    grids = [task.start(True, torch.float16) for task in tasks]
    kw = {"compute_dtype": torch.float32, **kw}
    together = LearnableGroup(tasks, grids, **kw)
    alone = [LearnableGroup([task], [grid], **kw) for task, grid in zip(tasks, grids, strict=True)]
    x, target = torch.randn(9, 13), torch.randn(9, 6)
    for step in range(3):
        for index in range(2):  # no token reaches the third
            for layer in (TunableLinear(together, index), TunableLinear(alone[index], 0)):
                (layer(x) - target[:, : weights[index].shape[0]]).square().sum().backward()
        for group in (together, *alone):
            group.step(0.1 / (step + 1), 0.05)
    # Adam's floor under its root is a share of the mean over the group, so there the paths differ a little.
    share = 0.02 if kw.get("adam") else 0.0
    for index, (one, other) in enumerate(zip(together.finish(), [b.finish()[0] for b in alone], strict=True)):
        assert one.name == other.name == str(index)
        assert float((one.codes.codes != other.codes.codes).float().mean()) <= share
        assert torch.allclose(together.weight(index), alone[index].weight(0), atol=1.0 if share else 0.0)
    assert torch.equal(together.weight(2), LearnableGroup([tasks[2]], [grids[2]], **kw).weight(0))  # it did not move


def test_what_shares_a_group() -> None:
    def task(name: str, columns: int, scheme: QuantizationScheme) -> LayerTask:
        return LayerTask(name, torch.nn.Identity(), torch.zeros(2, columns), scheme)

    four, eight, per_tensor = QuantizationScheme(4, 8), QuantizationScheme(8, 8), QuantizationScheme(4, 0)
    tasks = [
        task("q", 16, four), task("k", 16, eight), task("down", 32, four), task("v", 16, four),
        task("a", 16, per_tensor), task("b", 16, per_tensor),
    ]  # fmt: skip
    names = [[one.name for one in group] for group in stack_tasks(tasks)]
    assert names == [["q", "v"], ["k"], ["down"], ["a"], ["b"]]


def test_a_layer_without_tokens_stays() -> None:
    group, _ = layer_of(torch.randn(6, 16), None, QuantizationScheme(4, 8))
    before = group.snapshot()
    group.step(0.1, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, group.snapshot(), strict=True))


def test_what_is_tuned_is_what_is_written() -> None:
    torch.manual_seed(0)
    for sym, size, columns in ((True, 8, 16), (False, 8, 13), (True, 0, 12), (False, -1, 16)):
        module = torch.nn.Linear(columns, 6)
        task = LayerTask("layer", module, module.weight.detach(), QuantizationScheme(4, size, sym))
        group = LearnableGroup([task], [task.start(True, torch.float16)], torch.float32)
        layer = TunableLinear(group, 0)
        for _ in range(5):
            (layer(torch.randn(9, columns)) - torch.randn(9, 6)).square().mean().backward()
            group.step(0.1, 0.1)
        assert torch.equal(group.finish()[0].dequantize(), layer.quantized)
        assert torch.equal(group.grid.scale, group.grid.scale.half().float())


def test_a_state_can_be_put_back() -> None:
    torch.manual_seed(0)
    group, layer = layer_of(torch.randn(6, 16), None, QuantizationScheme(4, 8))
    for kind in range(2):
        state, weight = group.snapshot(), layer.quantized.clone()
        for _ in range(3):
            (layer(torch.randn(9, 16)) - torch.randn(9, 6)).square().mean().backward()
            group.step(0.2, 0.2)
        assert not torch.equal(weight, layer.quantized), kind
        group.restore(state)
        assert torch.equal(weight, layer.quantized)
