"""Tuning of small floats: gradients against autograd through the formula written anew, steps, states, final codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup, TunableLinear, stack_tasks
from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, spec_for_bits
from auto_round.codecs.minifloat import MinifloatType, as_blocks, from_blocks
from auto_round.schemes import QuantizationScheme

TYPES: list[tuple[str, int, Any]] = [
    ("mx_fp", 4, 32), ("mx_fp", 8, 32), ("mx_int", 4, 32), ("nv_fp", 4, 16), ("fp", 8, -1), ("fp", 8, 0),
    ("fp", 8, (16, 24)), ("fp8_e5m2", 8, 32),
]  # fmt: skip


def group_of(kind: tuple[str, int, Any], shapes: list[tuple[int, int]], **kw: Any) -> LearnableGroup:
    name, bits, size = kind
    scheme = QuantizationScheme(bits, size, True, name)
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    generator = torch.Generator().manual_seed(1)
    tasks = []
    for index, (out, columns) in enumerate(shapes):
        weight = torch.randn(out, columns, generator=generator)
        tasks.append(LayerTask(f"layer{index}", torch.nn.Linear(columns, out), weight, scheme, bias=torch.randn(out)))
    starts = [task.start(True, torch.float16) for task in tasks]
    return LearnableGroup(tasks, starts, torch.float32, **kw)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_tuning_may_start_from_any_codes(kind: tuple[str, int, Any]) -> None:
    """Each code one or two values away from the nearest one, and some at the ends of the range."""
    shapes = [(32, 48)] if kind[2] == 0 else [(32, 48), (16, 48)]
    nearest = [layer.codes.codes for layer in group_of(kind, shapes).finish()]
    element = group_of(kind, shapes).grid.spec.element
    values = element.decode(torch.arange(1 << element.bits, dtype=torch.uint8))
    order = values.nan_to_num(0).argsort(stable=True)
    order = order[values[order].isfinite()]
    place = torch.zeros(1 << element.bits, dtype=torch.int64)
    place[order] = torch.arange(order.numel())
    wanted = []
    for codes in nearest:
        assert codes is not None
        moved = place[codes.long()] + torch.randint(-2, 3, codes.shape, generator=torch.Generator().manual_seed(4))
        wanted.append(element.decode(order[moved.clamp(0, order.numel() - 1)].to(torch.uint8)))
    group = group_of(kind, shapes, codes=[element.encode(one) for one in wanted])
    for _ in range(2):
        for layer, one in zip(group.finish(), wanted, strict=True):
            assert torch.equal(element.decode(layer.codes.codes), one)
        group.rounding_delta.add_(0.3)
        group.restart()


class Record:
    """A step rule that keeps the gradient and moves nothing."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        self.gradient = gradient.clone()


class Nearest(torch.autograd.Function):
    """The element's nearest value; the gradient is one where it is not cut."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, element: MinifloatType) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.element = element
        return element.nearest(x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < ctx.element.saturation), None


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_equal_autograd(kind: tuple[str, int, Any]) -> None:
    learnable_group = group_of(kind, [(20, 50)])
    torch.manual_seed(2)
    learnable_group.rounding_delta = torch.rand_like(learnable_group.rounding_delta) - 0.5
    learnable_group.scale_factors = [torch.rand_like(learnable_group.scale_factors[0]) * 0.4 + 0.6]  # some saturate
    learnable_group.apply_scale_factors()
    learnable_group.refresh()
    rules = [Record(), Record()]
    learnable_group.rules, learnable_group.fuse_update = rules, False  # type: ignore[assignment]
    x, target = torch.randn(2, 7, 50), torch.randn(2, 7, 20)
    seen = x.clone().requires_grad_()
    loss = (TunableLinear(learnable_group, 0)(seen) - target).square().sum()
    loss.backward()
    learnable_group.step(0.1, 0.1)

    task = learnable_group.tasks[0]
    element, size = learnable_group.grid.spec.element, learnable_group.scheme.group_size
    blocks = as_blocks(task.weight, size)
    rounding_delta, scale_factor = (
        learnable_group.rounding_delta.clone().requires_grad_(),
        learnable_group.scale_factors[0].clone().requires_grad_(),
    )
    f = learnable_group.grid.start_scales[0] * scale_factor
    f = f + (learnable_group.grid.spec.rule.store(f.detach()) - f.detach())  # rounding passes the gradient
    if learnable_group.grid.spec.has_global_scale:
        f = f / learnable_group.grid.spec.global_scale(task.weight, None)
    ratio = blocks / f
    step = element.step(ratio.detach())
    values = Nearest.apply(ratio + rounding_delta * step, element) * f
    weight = from_blocks(values, (20, 50))
    own = x.clone().requires_grad_()
    expected = (torch.nn.functional.linear(own, weight, task.bias) - target).square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(seen.grad, own.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rules[0].gradient, rounding_delta.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rules[1].gradient, scale_factor.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("adam", [False, True])
def test_what_is_tuned_is_what_is_stored(kind: tuple[str, int, Any], adam: bool) -> None:
    shapes = [(20, 50)] if kind[2] == 0 else [(20, 50), (33, 50)]
    learnable_group = group_of(kind, shapes, adam=adam)
    untuned = [quantize_layer(task, True, torch.float16).dequantize() for task in learnable_group.tasks]
    for index, values in enumerate(untuned):
        assert torch.equal(learnable_group.weight(index), values)
    layers = [TunableLinear(learnable_group, index) for index in range(len(shapes))]
    x = torch.randn(40, 50)
    for _ in range(4):
        loss = sum(
            (layer(x) - torch.nn.functional.linear(x, layer.learnable_group.tasks[i].weight)).square().sum()
            for i, layer in enumerate(layers)
        )
        loss.backward()  # type: ignore[union-attr]
        learnable_group.step(0.2, 0.05)
    for index, layer in enumerate(learnable_group.finish()):
        assert torch.equal(layer.dequantize(), learnable_group.weight(index)) and not torch.equal(
            learnable_group.weight(index), untuned[index]
        )
        stored = learnable_group.grid.spec.rule.store(layer.codes.scale)
        assert torch.equal(stored, layer.codes.scale)
    learnable_group.restart()
    for index, layer in enumerate(learnable_group.finish()):
        assert torch.equal(layer.dequantize(), untuned[index])


def test_half_a_step_reaches_the_values_on_both_sides() -> None:
    learnable_group = group_of(("mx_fp", 4, 32), [(8, 32)])
    scale = learnable_group.grid.scale[:, 0, 0]
    ratio = learnable_group.tasks[0].weight / scale
    values = learnable_group.grid.spec.element.decode(torch.arange(16, dtype=torch.uint8)).sort().values
    inside = ratio.abs() < 6
    above = values[torch.searchsorted(values, ratio).clamp(max=15)]
    below = values[(torch.searchsorted(values, ratio, right=True) - 1).clamp(min=0)]
    for offset, beyond in ((0.501, lambda found: found >= above), (-0.501, lambda found: found <= below)):
        learnable_group.rounding_delta = torch.full_like(learnable_group.rounding_delta, offset)
        learnable_group.refresh()
        assert bool(beyond(learnable_group.weight(0) / scale)[inside].all())


def test_steps_undo_wrong_offsets_and_scales() -> None:
    learnable_group = group_of(("nv_fp", 4, 16), [(32, 64)])
    torch.manual_seed(3)
    layer, x = TunableLinear(learnable_group, 0), torch.randn(256, 64)
    target = torch.nn.functional.linear(x, learnable_group.tasks[0].weight, learnable_group.tasks[0].bias)
    best = float((layer(x) - target).square().mean().detach())
    learnable_group.rounding_delta = torch.rand_like(learnable_group.rounding_delta) - 0.5
    learnable_group.scale_factors = [torch.full_like(learnable_group.scale_factors[0], 0.7)]
    learnable_group.apply_scale_factors()
    learnable_group.refresh()
    errors = []
    for step in range(80):
        error = (layer(x) - target).square().mean()
        error.backward()
        errors.append(float(error.detach()))
        learnable_group.step(0.03 * (1 - step / 80), 0.01 * (1 - step / 80))
    assert errors[0] > 3 * best and errors[-1] < 0.5 * errors[0]
    assert float(learnable_group.scale_factors[0].mean()) > 0.8


def test_layers_without_gradient_stay() -> None:
    learnable_group = group_of(("mx_fp", 4, 32), [(16, 64), (24, 64)])
    kept = learnable_group.weight(1).clone()
    TunableLinear(learnable_group, 0)(torch.randn(5, 64)).square().sum().backward()
    learnable_group.step(0.3, 0.1)
    assert torch.equal(learnable_group.weight(1), kept)
    state = learnable_group.snapshot()
    learnable_group.step(0.3, 0.1)  # nothing was gathered
    assert all(torch.equal(a, b) for a, b in zip(state, learnable_group.snapshot(), strict=True))


def test_only_like_layers_share_a_group() -> None:
    def task(name: str, columns: int, scheme: QuantizationScheme) -> LayerTask:
        return LayerTask(name, torch.nn.Linear(columns, 4), torch.randn(4, columns), scheme)

    mx, nv, tensor = (
        QuantizationScheme(4, 32, True, "mx_fp"),
        QuantizationScheme(4, 16, True, "nv_fp"),
        QuantizationScheme(8, 0, True, "fp"),
    )
    tasks = [
        task("a", 64, mx),
        task("b", 64, mx),
        task("c", 32, mx),
        task("d", 64, nv),
        task("e", 64, tensor),
        task("f", 64, tensor),
    ]
    assert [[t.name for t in stack] for stack in stack_tasks(tasks)] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
