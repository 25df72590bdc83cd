"""Integer data types against the formulas worked by hand, and properties that hold for any tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.int import from_codes, integer_qparams, to_codes
from auto_round.codecs.quantized_layer import IntCodes
from auto_round.data_type import get_quant_func

SYM, ASYM = get_quant_func("int", 4, True), get_quant_func("int", 4, False)


def test_symmetric_by_hand() -> None:
    # The extreme is +4, so it takes code -8: scale -4/8 = -0.5, codes round(w / -0.5).
    weight = torch.tensor([[4.0, -1.0, 0.3, 0.0]])
    qdq, scale, zero = SYM(weight, bits=4, group_size=4)
    assert scale.tolist() == [[-0.5]] and zero == 8
    assert qdq.tolist() == [[4.0, -1.0, 0.5, 0.0]]  # 0.3 / -0.5 = -0.6 -> -1 -> 0.5
    assert to_codes(weight, integer_qparams(weight, 4, True)).tolist() == [[0.0, 10.0, 7.0, 8.0]]


def test_symmetric_keeps_the_extreme_of_either_sign() -> None:
    for extreme in (3.0, -3.0):
        weight = torch.tensor([[extreme, 0.5, -0.5, 1.0]])
        qdq, scale, _ = SYM(weight, bits=4, group_size=-1)
        assert qdq[0, 0] == extreme
        assert (scale < 0).item() == (extreme > 0)


def test_on_a_tie_of_extremes_the_positive_side_clips_least() -> None:
    _, scale, _ = SYM(torch.tensor([[2.0, -2.0]]), bits=4, group_size=2)
    assert scale.item() == -0.25  # +2 takes -8


def test_asymmetric_by_hand() -> None:
    # Range -1 .. 2 over 15 steps: 0.2 in float16; zero point round(1 / 0.2) = 5.
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.09]])
    qdq, scale, zero = ASYM(weight, bits=4, group_size=4)
    step = torch.tensor(0.2).half().float().item()
    assert scale.item() == step and zero.item() == 5
    assert to_codes(weight, integer_qparams(weight, 4, False)).tolist() == [[0.0, 15.0, 8.0, 5.0]]
    assert torch.allclose(qdq, torch.tensor([[-5 * step, 10 * step, 3 * step, 0.0]]))


@pytest.mark.parametrize("low, high", [(1.0, 3.0), (-3.0, -1.0)])
def test_the_asymmetric_range_holds_zero(low: float, high: float) -> None:
    weight = torch.linspace(low, high, 8).view(1, -1)
    _, scale, zero = ASYM(weight, bits=4, group_size=-1)
    assert scale.item() == pytest.approx(3.0 / 15, rel=1e-3)
    assert zero.item() == (0 if low > 0 else 15)


def test_halves_round_to_even() -> None:
    grid = integer_qparams(torch.tensor([[-8.0, 0.5, 1.5, 2.5, -0.5]]), 4, True)
    assert grid.scale.item() == 1.0
    assert (to_codes(torch.tensor([[0.5, 1.5, 2.5, -0.5]]), grid) - 8).tolist() == [[0.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("function", [SYM, ASYM])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_and_constant_groups(function: Any, bits: int) -> None:
    zeros, scale, _ = function(torch.zeros(2, 8), bits=bits, group_size=4)
    assert torch.equal(zeros, torch.zeros(2, 8)) and bool((scale.abs() >= 1e-5 * 0.99).all())
    for value in (0.75, -0.75):
        constant, _, _ = function(torch.full((2, 8), value), bits=bits, group_size=4)
        assert torch.allclose(constant, torch.full((2, 8), value), rtol=1e-3)


@pytest.mark.parametrize("function", [SYM, ASYM])
def test_scales_neither_overflow_nor_vanish_in_float16(function: Any) -> None:
    for value in (1e9, 1e-30, -1e9):
        qdq, scale, _ = function(torch.tensor([[value, value / 3]]), bits=4, group_size=2)
        assert bool(torch.isfinite(scale).all()) and bool(torch.isfinite(qdq).all()) and bool((scale != 0).all())
        assert torch.equal(scale, scale.half().float())


@pytest.mark.parametrize("function", [SYM, ASYM])
def test_one_scale_for_the_whole_tensor(function: Any) -> None:
    weight = torch.randn(6, 10)
    qdq, scale, _ = function(weight, bits=4, group_size=0)
    flat, one, _ = function(weight.view(1, -1), bits=4, group_size=-1)
    assert scale.numel() == 1 and torch.equal(scale, one) and torch.equal(qdq, flat.view(6, 10))


@pytest.mark.parametrize("function", [SYM, ASYM])
def test_blocks_in_two_dimensions_equal_blocks_cut_by_hand(function: Any) -> None:
    weight = torch.randn(5, 7)
    qdq, scale, _ = function(weight, bits=4, group_size=(2, 3))
    assert qdq.shape == weight.shape and scale.shape == (3, 3)
    for row in range(3):
        for column in range(3):
            part = weight[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            own, one, _ = function(part.reshape(1, -1), bits=4, group_size=-1)
            assert torch.equal(qdq[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], own.view(part.shape))
            assert scale[row, column] == one


@pytest.mark.parametrize("function", [SYM, ASYM])
def test_gradients_reach_the_learnables(function: Any) -> None:
    weight = torch.randn(3, 10)
    v = torch.zeros(3, 10, requires_grad=True)
    factors = [torch.ones(9, 1, requires_grad=True) for _ in range(2)]
    qdq, _, _ = function(weight, bits=4, group_size=4, v=v, min_scale=factors[0], max_scale=factors[1])
    (qdq * torch.randn(3, 10)).sum().backward()
    assert v.grad is not None and bool((v.grad != 0).any())
    for factor in factors:
        assert factor.grad is not None and bool(torch.isfinite(factor.grad).all())
    assert bool(((factors[0].grad != 0) | (factors[1].grad != 0)).any())  # type: ignore[operator]


def test_smaller_factors_give_smaller_scales() -> None:
    weight = torch.randn(4, 16)
    for function in (SYM, ASYM):
        _, plain, _ = function(weight, bits=4, group_size=8)
        _, halved, _ = function(weight, bits=4, group_size=8, min_scale=0.5, max_scale=0.5)
        assert torch.allclose(halved.abs() * 2, plain.abs(), rtol=2e-3)


def test_an_offset_moves_the_code() -> None:
    weight = torch.tensor([[-8.0, 1.4, 2.0, 3.0]])
    shift = torch.tensor([[0.0, 0.2, 0.0, 0.0]])
    assert SYM(weight, bits=4, group_size=-1)[0][0, 1] == 1.0
    assert SYM(weight, bits=4, group_size=-1, v=shift)[0][0, 1] == 2.0


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, int, int, bool]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    size = draw(st.sampled_from([-1, 0, 1, 3, 4, 8, 16, 32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    magnitude = draw(st.sampled_from([1e-6, 1e-2, 1.0, 30.0, 1e4]))
    weight = torch.randn(rows, columns, generator=generator) * magnitude
    if draw(st.booleans()):
        weight = weight.bfloat16().float()
    return weight, draw(st.sampled_from([2, 3, 4, 5, 6, 8])), size, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_tensor(case: tuple[torch.Tensor, int, int, bool]) -> None:
    weight, bits, size, sym = case
    qdq, scale, zero = get_quant_func("int", bits, sym)(weight, bits=bits, group_size=size)
    assert qdq.shape == weight.shape and qdq.dtype == weight.dtype
    assert torch.equal(scale, scale.half().float())
    # Twice quantized on the same grid is once quantized.
    groups = -(-weight.shape[1] // size) if size > 0 else 1
    width = min(size, weight.shape[1]) if size > 0 else weight.shape[1]
    if size == 0:
        error_limit = scale.abs().expand_as(weight)
    else:
        assert scale.shape == (weight.shape[0], groups)
        error_limit = scale.abs().repeat_interleave(width, 1)[:, : weight.shape[1]]
    # Within half a step, and a step where the range ends (symmetric: +extreme takes -2**(bits-1), its mirror does not),
    # and the rounding of the scale to float16 over the whole range.
    slack = error_limit * (1.0 + 2**bits * 2.0**-11) + 1e-7
    assert bool(((qdq - weight).abs() <= slack).all())
    if isinstance(zero, torch.Tensor):
        assert torch.equal(zero, zero.round()) and bool((zero >= 0).all()) and bool((zero <= 2**bits - 1).all())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_codes_say_the_same_as_quantize_dequantize(case: tuple[torch.Tensor, int, int, bool]) -> None:
    weight, bits, size, sym = case
    if size == 0:
        size = -1
    qdq, scale, zero = get_quant_func("int", bits, sym)(weight, bits=bits, group_size=size)
    width = weight.shape[1] if size < 0 or size > weight.shape[1] else size
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % width)).view(weight.shape[0], -1, width)
    grid = integer_qparams(padded, bits, sym)
    codes = to_codes(padded, grid)
    assert bool((codes >= 0).all()) and bool((codes <= 2**bits - 1).all())
    assert torch.equal(from_codes(codes, grid).view(weight.shape[0], -1)[:, : weight.shape[1]], qdq)
    stored = codes.view(weight.shape[0], -1)[:, : weight.shape[1]].to(torch.uint8)
    point = zero.to(torch.uint8) if isinstance(zero, torch.Tensor) else int(zero)
    assert torch.equal(IntCodes(stored, scale.half(), point, width).dequantize(), qdq)
