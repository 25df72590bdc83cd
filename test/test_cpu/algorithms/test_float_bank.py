"""Tuning of small floats: gradients against autograd through the formula written anew, steps, states, final codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import round_to_nearest, start_scales
from auto_round.algorithms.quantization.sign_round.bank_linear import BankLinear
from auto_round.algorithms.quantization.sign_round.float_bank import FloatBank
from auto_round.algorithms.quantization.sign_round.layer_bank import stack_tasks
from auto_round.data_type.elements import Element
from auto_round.data_type.float_family import float_family
from auto_round.data_type.tiles import as_tiles, from_tiles
from auto_round.schemes import QuantizationScheme

TYPES: list[tuple[str, int, Any]] = [
    ("mx_fp", 4, 32), ("mx_fp", 8, 32), ("mx_int", 4, 32), ("nv_fp", 4, 16), ("fp", 8, -1), ("fp", 8, 0),
    ("fp", 8, (16, 24)), ("fp8_e5m2", 8, 32),
]  # fmt: skip


def bank_of(kind: tuple[str, int, Any], shapes: list[tuple[int, int]], **kw: Any) -> FloatBank:
    name, bits, size = kind
    scheme = QuantizationScheme(bits, size, True, name)
    family = float_family(name, bits)
    assert family is not None
    generator = torch.Generator().manual_seed(1)
    tasks = []
    for index, (out, columns) in enumerate(shapes):
        weight = torch.randn(out, columns, generator=generator)
        tasks.append(LayerTask(f"layer{index}", torch.nn.Linear(columns, out), weight, scheme, bias=torch.randn(out)))
    starts = [start_scales(task, family, True) for task in tasks]
    return FloatBank(tasks, family, starts, torch.float32, **kw)


class Record:
    """A step rule that keeps the gradient and moves nothing."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        self.gradient = gradient.clone()


class Nearest(torch.autograd.Function):
    """The element's nearest value; the gradient is one where it is not cut."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, element: Element) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.element = element
        return element.nearest(x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < ctx.element.saturation), None


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_equal_autograd(kind: tuple[str, int, Any]) -> None:
    bank = bank_of(kind, [(20, 50)])
    torch.manual_seed(2)
    bank.v = torch.rand_like(bank.v) - 0.5
    bank.factor = torch.rand_like(bank.factor) * 0.4 + 0.6
    bank.scale = bank.start_scale * bank.factor  # off the values that can be stored, and some weights are cut
    bank.refresh()
    rules = [Record(), Record()]
    bank.rules, bank.fuse_update = rules, False  # type: ignore[assignment]
    x, target = torch.randn(2, 7, 50), torch.randn(2, 7, 20)
    seen = x.clone().requires_grad_()
    loss = (BankLinear(bank, 0)(seen) - target).square().sum()
    loss.backward()
    bank.step(0.1, 0.1)

    task = bank.tasks[0]
    element, size = bank.family.element, bank.scheme.group_size
    tiles = as_tiles(task.weight, size)
    v, factor = bank.v.clone().requires_grad_(), bank.factor.clone().requires_grad_()
    f = bank.start_scale * factor
    if bank.family.has_global_scale:
        f = f / bank.family.global_scale(task.weight, None)
    ratio = tiles / f
    step = element.step(ratio.detach())
    values = Nearest.apply(ratio + v * step, element) * f
    weight = from_tiles(values, (20, 50))
    own = x.clone().requires_grad_()
    expected = (torch.nn.functional.linear(own, weight, task.bias) - target).square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(seen.grad, own.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rules[0].gradient, v.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rules[1].gradient, factor.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("adam", [False, True])
def test_what_is_tuned_is_what_is_stored(kind: tuple[str, int, Any], adam: bool) -> None:
    shapes = [(20, 50)] if kind[2] == 0 else [(20, 50), (33, 50)]
    bank = bank_of(kind, shapes, adam=adam)
    untuned = [round_to_nearest(task, True, torch.float16).dequantize() for task in bank.tasks]
    for index, values in enumerate(untuned):
        assert torch.equal(bank.weight(index), values)
    layers = [BankLinear(bank, index) for index in range(len(shapes))]
    x = torch.randn(40, 50)
    for _ in range(4):
        loss = sum(
            (layer(x) - torch.nn.functional.linear(x, layer.bank.tasks[i].weight)).square().sum()
            for i, layer in enumerate(layers)
        )
        loss.backward()  # type: ignore[union-attr]
        bank.step(0.2, 0.05)
    for index, layer in enumerate(bank.finish()):
        assert torch.equal(layer.dequantize(), bank.weight(index)) and not torch.equal(
            bank.weight(index), untuned[index]
        )
        assert layer.scale is not None
        stored = bank.family.rule.store(layer.scale)
        assert torch.equal(stored, layer.scale)
    bank.restart()
    for index, layer in enumerate(bank.finish()):
        assert torch.equal(layer.dequantize(), untuned[index])


def test_half_a_step_reaches_the_values_on_both_sides() -> None:
    bank = bank_of(("mx_fp", 4, 32), [(8, 32)])
    scale = bank.scale[:, 0, 0]
    ratio = bank.tasks[0].weight / scale
    values = bank.family.element.decode(torch.arange(16, dtype=torch.uint8)).sort().values
    inside = ratio.abs() < 6
    above = values[torch.searchsorted(values, ratio).clamp(max=15)]
    below = values[(torch.searchsorted(values, ratio, right=True) - 1).clamp(min=0)]
    for offset, beyond in ((0.501, lambda found: found >= above), (-0.501, lambda found: found <= below)):
        bank.v = torch.full_like(bank.v, offset)
        bank.refresh()
        assert bool(beyond(bank.weight(0) / scale)[inside].all())


def test_steps_undo_wrong_offsets_and_scales() -> None:
    bank = bank_of(("nv_fp", 4, 16), [(32, 64)])
    torch.manual_seed(3)
    layer, x = BankLinear(bank, 0), torch.randn(256, 64)
    target = torch.nn.functional.linear(x, bank.tasks[0].weight, bank.tasks[0].bias)
    best = float((layer(x) - target).square().mean().detach())
    bank.v = torch.rand_like(bank.v) - 0.5
    bank.factor = torch.full_like(bank.factor, 0.7)
    bank.scale = bank.family.rule.store(bank.start_scale * bank.factor)
    bank.refresh()
    errors = []
    for step in range(80):
        error = (layer(x) - target).square().mean()
        error.backward()
        errors.append(float(error.detach()))
        bank.step(0.03 * (1 - step / 80), 0.01 * (1 - step / 80))
    assert errors[0] > 3 * best and errors[-1] < 0.5 * errors[0]
    assert float(bank.factor.mean()) > 0.8


def test_layers_without_gradient_stay() -> None:
    bank = bank_of(("mx_fp", 4, 32), [(16, 64), (24, 64)])
    kept = bank.weight(1).clone()
    BankLinear(bank, 0)(torch.randn(5, 64)).square().sum().backward()
    bank.step(0.3, 0.1)
    assert torch.equal(bank.weight(1), kept)
    state = bank.snapshot()
    bank.step(0.3, 0.1)  # nothing was gathered
    assert all(torch.equal(a, b) for a, b in zip(state, bank.snapshot(), strict=True))


def test_only_like_layers_share_a_bank() -> None:
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
