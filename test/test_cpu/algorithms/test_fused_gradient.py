"""The fused step of SignRound against autograd through the straight-through formula, written down anew here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import start_grid
from auto_round.algorithms.quantization.sign_round.integer_linear import IntegerTuningLinear
from auto_round.schemes import QuantizationScheme


class Record:
    """A step rule that keeps the gradient and moves nothing."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        self.gradient = gradient.clone()


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
    grid = start_grid(task, False, torch.float32)
    return IntegerTuningLinear(task, grid, torch.float32, torch.float32, **kw)


def reference(layer: Any, x: torch.Tensor, target: torch.Tensor, columns: int) -> tuple[torch.Tensor, ...]:
    """(loss, dL/dv, dL/df, dL/dx) in float64 by autograd."""
    groups, start = layer.groups.double(), layer.start_scale.double()
    zero = layer.zero.double() if isinstance(layer.zero, torch.Tensor) else layer.zero
    v = layer.v.double().clone().requires_grad_()
    factor = layer.factor.double().clone().requires_grad_()
    x = x.double().requires_grad_()
    scale = start * factor
    codes = (RoundSTE.apply(groups / scale + v) + zero).clamp(0, 2**layer.bits - 1)
    weight = ((codes - zero) * scale).reshape(layer.quantized.shape[0], -1)[:, :columns]
    bias = None if layer.bias is None else layer.bias.double()
    loss = (torch.nn.functional.linear(x, weight, bias) - target.double()).square().mean()
    loss.backward()
    return loss.detach(), v.grad, factor.grad, x.grad  # type: ignore[return-value]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("columns, size", [(16, 8), (13, 8), (16, -1), (12, 0), (5, 8)])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_equal_autograd(bits: int, columns: int, size: int, sym: bool) -> None:
    torch.manual_seed(columns + bits)
    weight, bias = torch.randn(6, columns), torch.randn(6)
    layer = layer_of(weight, bias, QuantizationScheme(bits, size, sym))
    # Off the start: codes beyond the clamp, and offsets that are not zero.
    layer.factor = torch.rand_like(layer.factor) * 0.4 + 0.6
    layer.scale = layer.start_scale * layer.factor
    layer.v = torch.rand_like(layer.v) - 0.5
    layer.refresh()
    rules = [Record(), Record()]
    layer.rules, layer.fuse_update = rules, False
    x, target = torch.randn(2, 7, columns), torch.randn(2, 7, 6)
    own = x.clone().requires_grad_()
    loss = (layer(own) - target).square().mean()
    loss.backward()
    layer.step(0.1, 0.1)
    expected = reference(layer, x, target, columns)
    assert torch.allclose(loss.double(), expected[0], rtol=1e-4)
    real = torch.ones_like(layer.v, dtype=torch.bool)
    if size > 0:
        padding = torch.nn.functional.pad(torch.ones(6, columns), (0, -columns % layer.v.shape[-1]))
        real = padding.view(layer.v.shape).bool()
    assert bool((expected[1][real] == 0).any()) and bool((expected[1][real] != 0).any())  # some are clamped
    assert torch.allclose(rules[0].gradient[real].double(), expected[1][real], rtol=1e-3, atol=1e-7)
    assert torch.allclose(rules[1].gradient.double(), expected[2], rtol=1e-3, atol=1e-6)
    assert own.grad is not None and torch.allclose(own.grad.double(), expected[3], rtol=1e-3, atol=1e-6)


def test_the_sign_step_moves_by_the_rate_against_the_gradient() -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(6, 16), None, QuantizationScheme(4, 8, False))
    x, target = torch.randn(9, 16), torch.randn(9, 6)
    expected = reference(layer, x, target, 16)
    (layer(x) - target).square().mean().backward()
    layer.step(0.125, 0.0625)
    assert torch.equal(layer.v, -0.125 * expected[1].sign().float())
    assert torch.allclose(layer.factor - 1, -0.0625 * expected[2].sign().float(), atol=1e-6)


def test_passes_accumulate_to_one_batch() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    x, target = torch.randn(8, 16), torch.randn(8, 6)
    layers = [layer_of(weight, None, QuantizationScheme(4, 8)) for _ in range(2)]
    for layer, parts in zip(layers, ([slice(0, 8)], [slice(0, 3), slice(3, 8)]), strict=True):
        for part in parts:
            ((layer(x[part]) - target[part]).square().sum() / target.numel()).backward()
    assert torch.allclose(layers[0].gradient, layers[1].gradient, atol=1e-6)


def test_a_layer_without_tokens_stays() -> None:
    layer = layer_of(torch.randn(6, 16), None, QuantizationScheme(4, 8))
    before = layer.snapshot()
    layer.step(0.1, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.snapshot(), strict=True))


def test_what_is_tuned_is_what_is_written() -> None:
    torch.manual_seed(0)
    for sym, size, columns in ((True, 8, 16), (False, 8, 13), (True, 0, 12), (False, -1, 16)):
        module = torch.nn.Linear(columns, 6)
        task = LayerTask("layer", module, module.weight.detach(), QuantizationScheme(4, size, sym))
        layer = IntegerTuningLinear(task, start_grid(task, True, torch.float16), torch.float32, torch.float16)
        for _ in range(5):
            (layer(torch.randn(9, columns)) - torch.randn(9, 6)).square().mean().backward()
            layer.step(0.1, 0.1)
        assert torch.equal(layer.finish().dequantize(), layer.quantized)
        assert torch.equal(layer.scale, layer.scale.half().float())


def test_a_state_can_be_put_back() -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(6, 16), None, QuantizationScheme(4, 8))
    for kind in range(2):
        state, weight = layer.snapshot(), layer.quantized.clone()
        for _ in range(3):
            (layer(torch.randn(9, 16)) - torch.randn(9, 6)).square().mean().backward()
            layer.step(0.2, 0.2)
        assert not torch.equal(weight, layer.quantized), kind
        layer.restore(state)
        assert torch.equal(weight, layer.quantized)
