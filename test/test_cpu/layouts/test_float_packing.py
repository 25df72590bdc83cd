"""Bytes of the small float types: the inverse, and an unpacker written bit by bit from the layouts' text."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.codecs.minifloat import MINIFLOATS
from auto_round.errors import NumericsError
from auto_round.layouts.floats import (
    cast_exactly,
    pack_codes,
    pack_e8m0,
    unpack_codes,
    unpack_e8m0,
)


def bit(value: int, position: int) -> int:
    return (value >> position) & 1


def nibble_of(packed: torch.Tensor, row: int, column: int) -> int:
    """Bits 0 to 3 of a byte are the even column's, 4 to 7 the odd one's."""
    byte, start = int(packed[row, column // 2]), 4 * (column % 2)
    return sum(bit(byte, start + i) << i for i in range(4))


def float8_of(byte: int, exponent_bits: int, bias: int) -> float:
    """OCP OFP8 v1.0: sign, exponent, mantissa from the highest bit; an exponent of zero has no leading one."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if bit(byte, 7) else 1.0
    exponent = sum(bit(byte, mantissa_bits + i) << i for i in range(exponent_bits))
    fraction = sum(bit(byte, i) << i for i in range(mantissa_bits)) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - bias)
    return sign * math.ldexp(1 + fraction, exponent - bias)


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_two_codes_a_byte(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, "e2m1")
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 2)) and packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, "e2m1", columns), codes)
    assert [[nibble_of(packed, r, c) for c in range(columns)] for r in range(rows)] == codes.tolist()
    if columns % 2:
        assert bool((packed[:, -1] < 16).all())


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=40))
def test_powers_of_two(exponents: list[int]) -> None:
    scale = torch.tensor([math.ldexp(1.0, e) for e in exponents], dtype=torch.float32).view(1, -1)
    stored = pack_e8m0(scale)
    assert stored.dtype == torch.uint8 and stored.tolist() == [[e + 127 for e in exponents]]
    assert torch.equal(unpack_e8m0(stored), scale)


def test_every_byte_of_e8m0() -> None:
    values = unpack_e8m0(torch.arange(256).to(torch.uint8))
    assert values[:255].tolist() == [math.ldexp(1.0, i - 127) for i in range(255)] and bool(values[255].isnan())


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 2.0**-128, 2.0**-126 * 1.5, math.inf, math.nan])
def test_other_scales_are_no_e8m0(value: float) -> None:
    with pytest.raises(NumericsError, match="no power of two"):
        pack_e8m0(torch.tensor([1.0, value]))


@pytest.mark.parametrize(("element", "bits", "bias"), [("e4m3", 4, 7), ("e5m2", 5, 15)])
def test_float8_bytes(element: str, bits: int, bias: int) -> None:
    codes = torch.arange(256).to(torch.uint8).view(16, 16)
    stored = pack_codes(codes, element)
    assert stored.dtype == MINIFLOATS[element].dtype and torch.equal(unpack_codes(stored, element, 16), codes)
    values = stored.float().flatten().tolist()
    wanted = [float8_of(byte, bits, bias) for byte in range(256)]
    finite = [i for i in range(256) if math.isfinite(values[i])]
    assert len(finite) == (254 if element == "e4m3" else 248)
    assert all(values[i] == wanted[i] for i in finite)


@given(st.sampled_from(["e2m1", "int4"]), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32))
def test_four_bit_codes(element: str, rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * pairs), dtype=torch.uint8, generator=generator)
    stored = pack_codes(codes, element)
    assert stored.dtype == torch.uint8 and torch.equal(unpack_codes(stored, element, 2 * pairs), codes)


@pytest.mark.parametrize(("dtype", "held", "lost"), [
    (torch.bfloat16, 1.0078125, 1.001), (torch.float8_e4m3fn, 448.0, 1.01), (torch.float16, 0.5, 1e-9),
])  # fmt: skip
def test_nothing_is_rounded(dtype: torch.dtype, held: float, lost: float) -> None:
    assert cast_exactly(torch.tensor([held]), dtype).dtype == dtype
    with pytest.raises(NumericsError, match="not exactly representable"):
        cast_exactly(torch.tensor([held, lost]), dtype)
