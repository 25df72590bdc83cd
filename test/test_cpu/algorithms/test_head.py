"""Coordinate descent against its definition, worked by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from auto_round.algorithms import descent as column_descent
from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.descent import descend, descend_layer
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.schemes import QuantizationScheme

COLUMNS, OUT = 24, 40


def tokens(count: int, seed: int) -> torch.Tensor:
    """Correlated channels with one direction that dominates, as the inputs of a head have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(5))
    return torch.randn(count, COLUMNS, generator=generator) @ mixing + 3.0


def task(scheme: QuantizationScheme) -> LayerTask:
    torch.manual_seed(3)
    module = torch.nn.Linear(COLUMNS, OUT)
    return LayerTask("lm_head", module, module.weight.detach().clone(), scheme, bias=module.bias.detach())


def error(weight: torch.Tensor, rounded: torch.Tensor, square: torch.Tensor) -> float:
    change = (rounded - weight).double()
    return float(((change @ square.double()) * change).sum())


def test_no_single_code_can_be_improved() -> None:
    torch.manual_seed(0)
    z = tokens(60, 0)
    square = z.t() @ z
    weight, scale = torch.randn(3, COLUMNS), torch.rand(3, COLUMNS) + 0.3
    low, high = torch.full_like(weight, -3), torch.full_like(weight, 2)
    codes = descend(weight, scale, low, high, square, 4)
    for _ in range(10):  # a few more passes, from where they ended
        start = (codes * scale).clone()
        codes = _again(weight, scale, low, high, square, codes)
        if torch.equal(codes * scale, start):
            break
    best = error(weight, codes * scale, square)
    for row, column in itertools.product(range(3), range(COLUMNS)):
        for value in range(-3, 3):
            other = codes.clone()
            other[row, column] = value
            assert error(weight, other * scale, square) >= best * (1 - 1e-5)


def _again(weight, scale, low, high, square, codes):  # type: ignore[no-untyped-def]
    """One more visit of every code, written plainly."""
    codes = codes.clone()
    for row, column in itertools.product(range(codes.shape[0]), range(codes.shape[1])):
        gradient = (codes[row] * scale[row] - weight[row]) @ square[:, column]
        value = codes[row, column] - gradient / (square[column, column] * scale[row, column])
        codes[row, column] = value.round().clamp(low[row, column], high[row, column])
    return codes


@pytest.mark.parametrize("columns", [5, 64, 70, 130])
def test_one_sweep_is_the_plain_one(columns: int) -> None:
    torch.manual_seed(columns)
    z = torch.randn(200, columns, dtype=torch.float64) + 1
    square = z.t() @ z
    weight, scale = torch.randn(2, columns).double(), torch.rand(2, columns).double() * -0.5 - 0.2
    low, high = torch.full_like(weight, -8), torch.full_like(weight, 7)
    nearest = (weight / scale).round().clamp(-8, 7)
    expected = _again(weight, scale, low, high, square, nearest)
    assert torch.equal(descend(weight, scale, low, high, square, 1), expected)


@pytest.mark.parametrize("size, sym", [(8, True), (8, False), (-1, True), (0, True), (10, False)])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_falls_on_tokens_it_has_not_seen(bits: int, size: int, sym: bool) -> None:
    one = task(QuantizationScheme(bits, size, sym))
    seen, unseen = tokens(400, 1), tokens(100, 2)
    one.importance = (seen.t() @ seen).diagonal()
    layer = descend_layer(one, seen.t() @ seen, torch.float16)
    nearest = quantize_layer(one, True, torch.float16)
    square = unseen.t() @ unseen
    assert error(one.weight, layer.dequantize(), square) < 0.9 * error(one.weight, nearest.dequantize(), square)
    assert torch.equal(layer.codes.scale, nearest.codes.scale)
    assert layer.bias is not None and torch.equal(layer.bias, one.bias)


def test_rows_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tokens(400, 1)
    whole = descend_layer(task(QuantizationScheme(3, 8, False)), seen.t() @ seen, torch.float16)
    monkeypatch.setitem(column_descent._CHUNK, "cpu", 7 * COLUMNS)
    pieces = descend_layer(task(QuantizationScheme(3, 8, False)), seen.t() @ seen, torch.float16)
    # Products of other shapes may differ in the last bit, and a value half-way between two codes goes the other way.
    assert float((whole.codes.codes != pieces.codes.codes).float().mean()) < 0.01
