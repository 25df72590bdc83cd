"""Codes of the small floats against ml_dtypes, and tables worked out by hand from the specifications."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.codecs.minifloat import MINIFLOATS, dequantize_minifloat

REFEREES = {
    "e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
# OCP MX v1.0, table 5: codes 0 to 7; and 4-bit sign and magnitude in quarters.
HALVES = {"e2m1": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], "int4": [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]}
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=True)


def bits_of(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def by_search(value: float, name: str) -> int:
    """The nearest code among all, by comparing distances in exact arithmetic; the even one on a tie."""
    from fractions import Fraction

    half = HALVES[name]
    size = Fraction(min(abs(value), half[-1]))
    code = min(range(8), key=lambda i: (abs(Fraction(half[i]) - size), i % 2))
    return code + (8 if np.signbit(np.float32(value)) else 0)


@given(st.lists(FLOATS, min_size=1, max_size=64), st.sampled_from(list(REFEREES)))
def test_codes_are_those_of_ml_dtypes(values: list[float], name: str) -> None:
    element = MINIFLOATS[name]
    x = bits_of(values)
    cut = x.clamp(-element.maximum, element.maximum)  # ml_dtypes has no saturation
    wanted = cut.numpy().astype(REFEREES[name])
    assert element.encode(x).tolist() == wanted.view(np.uint8).tolist()
    assert np.array_equal(element.decode(element.encode(x)).numpy(), wanted.astype(np.float32))


@given(st.lists(FLOATS, min_size=1, max_size=64), st.sampled_from(list(HALVES)))
def test_four_bits_by_search(values: list[float], name: str) -> None:
    assert MINIFLOATS[name].encode(bits_of(values)).tolist() == [by_search(v, name) for v in bits_of(values).tolist()]


@given(st.lists(FLOATS, min_size=1, max_size=64), st.sampled_from(list(MINIFLOATS)))
def test_nearest_is_what_the_code_stands_for(values: list[float], name: str) -> None:
    element, x = MINIFLOATS[name], bits_of(values)
    found, wanted = element.nearest(x), element.decode(element.encode(x))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # the sign of zero too


@pytest.mark.parametrize("name", MINIFLOATS)
def test_every_value_keeps_its_code(name: str) -> None:
    element = MINIFLOATS[name]
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    values = element.decode(codes)
    finite = values.isfinite()
    assert torch.equal(element.encode(values[finite]), codes[finite])
    assert float(values[finite].max()) == element.maximum
    assert 2.0**element.exponent <= element.maximum < 2.0 ** (element.exponent + 1)


def test_values_from_the_specifications() -> None:
    """OCP MX v1.0, 5.3.3 (e2m1); OFP8 v1.0, tables 1 and 2 (largest, smallest normal and smallest subnormal)."""
    for name, half in HALVES.items():
        assert MINIFLOATS[name].decode(torch.arange(16, dtype=torch.uint8)).tolist() == half + [-v for v in half]
    facts = {
        "e4m3": {0x7E: 448.0, 0x08: 2.0**-6, 0x07: 0.875 * 2.0**-6, 0x01: 2.0**-9, 0x80: -0.0, 0x38: 1.0},
        "e5m2": {0x7B: 57344.0, 0x04: 2.0**-14, 0x03: 0.75 * 2.0**-14, 0x01: 2.0**-16, 0x80: -0.0, 0x3C: 1.0},
    }
    for name, table in facts.items():
        codes, values = torch.tensor(list(table), dtype=torch.uint8), list(table.values())
        assert MINIFLOATS[name].decode(codes).tolist() == values
        assert MINIFLOATS[name].encode(bits_of(values)).tolist() == list(table)


@pytest.mark.parametrize(("name", "ties"), [
    ("e2m1", {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0, 7.0: 6.0, 1e30: 6.0}),
    ("int4", {0.125: 0.0, 0.375: 0.5, 0.625: 0.5, 0.875: 1.0, 1.625: 1.5, 1.875: 1.75, 9.0: 1.75}),
    ("e4m3", {2.0**-10: 0.0, 3 * 2.0**-10: 2.0**-8, 17.0: 16.0, 19.0: 20.0, 432.0: 448.0, 464.0: 448.0, 1e9: 448.0}),
    ("e5m2", {2.0**-17: 0.0, 1.125: 1.0, 1.375: 1.5, 1.625: 1.5, 1.875: 2.0, 61440.0: 57344.0, 1e9: 57344.0}),
])  # fmt: skip
def test_ties_go_to_the_even_code(name: str, ties: dict[float, float]) -> None:
    element = MINIFLOATS[name]
    for sign in (1, -1):
        found = element.decode(element.encode(bits_of([sign * v for v in ties]))).tolist()
        assert found == [sign * v for v in ties.values()]


@pytest.mark.parametrize("name", MINIFLOATS)
def test_infinity_is_cut_and_nan_is_not_hidden(name: str) -> None:
    element = MINIFLOATS[name]
    x = bits_of([float("inf"), float("-inf"), float("nan")])
    found = element.nearest(x)
    assert found[:2].tolist() == [element.maximum, -element.maximum] and bool(found[2].isnan())
    decoded = element.decode(element.encode(x))
    assert decoded[:2].tolist() == [element.maximum, -element.maximum]
    assert bool(decoded[2].isnan()) is (element.bits == 8)  # four bits have no code for it


@pytest.mark.parametrize("name", MINIFLOATS)
def test_steps_are_the_distances_between_values(name: str) -> None:
    element = MINIFLOATS[name]
    values = element.decode(torch.arange(2 ** (element.bits - 1), dtype=torch.uint8))
    values = values[values.isfinite()]
    gaps = values.diff()
    assert torch.equal(element.step(values[:-1]), gaps) and torch.equal(element.step(-values[:-1]), gaps)
    assert element.saturation == element.maximum + float(gaps[-1]) / 2


@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from([0, -1, 4, 16, (2, 3), (4, 8)]),
    st.sampled_from(list(MINIFLOATS)), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_dequantized_one_by_one(
    out: int, columns: int, size: int | tuple[int, int], name: str, under_global: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    element = MINIFLOATS[name]
    codes = torch.randint(0, 2 ** (element.bits - 1) - 4, (out, columns), generator=generator, dtype=torch.uint8)
    m, n = size if isinstance(size, tuple) else (1 if size else out, size if size > 0 else columns)
    scale = torch.rand(-(-out // m), -(-columns // n), generator=generator) + 0.5
    given_scale = torch.tensor(3.7) if under_global else None
    found = dequantize_minifloat(codes, element, scale, size, given_scale)
    for i in range(out):
        for j in range(columns):
            factor = scale[i // m, j // n]
            factor = factor / given_scale if given_scale is not None else factor
            assert found[i, j] == element.decode(codes[i, j].reshape(1))[0] * factor
