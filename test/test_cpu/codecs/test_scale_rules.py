"""Scales of small floats against tables worked out by hand, ml_dtypes, and the definitions in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import inf, nan

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.codecs.block_float import BlockScale, PlainScale, PowerOfTwo, global_scale_of
from auto_round.codecs.minifloat import MINIFLOATS

SIZES = st.floats(0, width=32, allow_nan=False, allow_infinity=False)


def one(rule: object, largest: float, global_scale: float | None = None) -> float:
    given_scale = None if global_scale is None else torch.tensor(global_scale)
    return float(rule.scale(torch.tensor([largest]), given_scale)[0])  # type: ignore[attr-defined]


# OCP MX v1.0, 6.3: the largest power of two at most the largest value, over that at most the element's largest.
@pytest.mark.parametrize(("name", "largest", "floor", "up"), [
    ("e2m1", 6.0, 1.0, 1.0), ("e2m1", 6.0001, 1.0, 2.0), ("e2m1", 7.99, 1.0, 2.0), ("e2m1", 8.0, 2.0, 2.0),
    ("e2m1", 4.0, 1.0, 1.0), ("e2m1", 3.9999, 0.5, 1.0), ("e2m1", 3.0, 0.5, 0.5), ("e2m1", 1e-45, 2.0**-127, 2.0**-127),
    ("e4m3", 448.0, 1.0, 1.0), ("e4m3", 449.0, 1.0, 2.0), ("e4m3", 256.0, 1.0, 1.0), ("e4m3", 255.0, 0.5, 1.0),
    ("e5m2", 57344.0, 1.0, 1.0), ("e5m2", 57345.0, 1.0, 2.0), ("e5m2", 32768.0, 1.0, 1.0),
    ("e5m2", 1.0, 2.0**-15, 2.0**-15),
    ("int4", 1.75, 1.0, 1.0), ("int4", 1.76, 1.0, 2.0), ("int4", 1.0, 1.0, 1.0), ("int4", 0.99, 0.5, 1.0),
    ("int4", 3.4028234663852886e38, 2.0**127, 2.0**127), ("e2m1", 0.0, 2.0**-127, 2.0**-127),
])  # fmt: skip
def test_powers_of_two_by_hand(name: str, largest: float, floor: float, up: float) -> None:
    assert one(PowerOfTwo(MINIFLOATS[name]), largest) == floor
    assert one(PowerOfTwo(MINIFLOATS[name], up=True), largest) == up


@given(SIZES, st.sampled_from(list(MINIFLOATS)))
def test_powers_of_two_by_definition(largest: float, name: str) -> None:
    element = MINIFLOATS[name]
    low, top = Fraction(1, 2**127), Fraction(2**127)
    floor = Fraction(one(PowerOfTwo(element), largest))
    exact = Fraction(largest)
    power = Fraction(2) ** element.exponent
    assert low <= floor <= top
    assert floor == low or floor * power <= exact  # 2**emax of the element lies at or below the largest value
    assert floor == top or exact < floor * power * 2
    up = Fraction(one(PowerOfTwo(element, up=True), largest))
    fits = Fraction(element.maximum)
    assert up == top or exact <= up * fits
    assert up == low or exact > up / 2 * fits


@given(SIZES)
def test_powers_of_two_have_a_byte(largest: float) -> None:
    scale = PowerOfTwo(MINIFLOATS["e2m1"]).scale(torch.tensor([largest])).numpy()
    assert scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32) == scale


def test_stored_powers_are_nearest_by_ratio() -> None:
    rule = PowerOfTwo(MINIFLOATS["e2m1"])
    given_scales = torch.tensor([1.0, 1.41, 1.42, 0.71, 0.70, 3e-39, 2.0**127])
    assert rule.store(given_scales).tolist() == [1.0, 1.0, 2.0, 1.0, 0.5, 2.0**-128 * 2, 2.0**127]
    near = [c.tolist() for c in rule.candidates(torch.tensor([1.0, 2.0**-127, 2.0**127]))]
    assert near == [[0.5, 2.0**-127, 2.0**126], [2.0, 2.0**-126, 2.0**127]]


def test_block_scales_by_hand() -> None:
    """The largest group of a tensor gets 448; others e4m3 of their share of it."""
    rule = BlockScale(MINIFLOATS["e2m1"])
    top = 2.5
    g = float(global_scale_of(torch.tensor(top)))
    assert g == np.float32(2688 / 2.5)
    assert one(rule, top, g) == 448.0
    assert one(rule, top / 2, g) == 224.0
    assert one(rule, top / 448 * 17, g) == 16.0  # halfway between 16 and 18: the even code
    assert one(rule, top / 448 * 2.0**-11, g) == 2.0**-9 and one(rule, 0.0, g) == 2.0**-9  # never zero
    inputs = BlockScale(MINIFLOATS["e2m1"], of_inputs=True)
    assert one(inputs, top, g) == 448.0 and one(inputs, top / 448 * 2.0**-9, g) == 2.0**-9
    assert one(inputs, top / 448 * 2.0**-11, g) == 2.0**-3 and one(inputs, 0.0, g) == 2.0**-3  # all of it becomes zero


@given(st.floats(2.0**-9, 448.0, width=32))
def test_block_scales_are_e4m3(value: float) -> None:
    found = BlockScale(MINIFLOATS["e2m1"]).store(torch.tensor([value])).numpy()
    assert found == np.array([value], np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_neighbours_of_a_block_scale() -> None:
    rule = BlockScale(MINIFLOATS["e2m1"])
    near = torch.stack(list(rule.candidates(torch.tensor([16.0, 448.0, 2.0**-9]))))
    assert {15.0, 14.0, 18.0, 20.0} < set(near[:, 0].tolist()) and 16.0 not in near[:, 0]
    assert float(near.max()) == 448.0 and float(near.min()) == 2.0**-9
    assert torch.equal(rule.store(near), near)


def test_global_scales_at_the_ends() -> None:
    assert float(global_scale_of(torch.tensor(2688.0))) == 1.0
    assert float(global_scale_of(torch.tensor(0.0))) == 1.0  # of a tensor of zeros; any would do
    assert 0 < float(global_scale_of(torch.tensor(1e-45))) < inf
    assert bool(global_scale_of(torch.tensor(nan)).isnan())


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_plain_scales(name: str) -> None:
    element = MINIFLOATS[name]
    largest = torch.rand(1000, generator=torch.Generator().manual_seed(1)) * 10
    exact = PlainScale(element, stored=False).scale(largest)
    assert torch.equal(exact, largest / element.maximum)
    assert torch.equal(PlainScale(element).scale(largest), exact.bfloat16().float())
    assert 0 < one(PlainScale(element), 0.0) < 1e-20
    for scale in PlainScale(element).candidates(exact):
        assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("largest", [inf, nan])
def test_what_is_not_finite_has_no_scale(largest: float) -> None:
    for rule in (PowerOfTwo(MINIFLOATS["e2m1"]), PowerOfTwo(MINIFLOATS["e4m3"], True), PlainScale(MINIFLOATS["e4m3"])):
        assert np.isnan(one(rule, largest))
    assert np.isnan(one(BlockScale(MINIFLOATS["e2m1"]), largest, 3.0))
    assert np.isnan(one(BlockScale(MINIFLOATS["e2m1"], of_inputs=True), largest, 3.0))
    everything = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # other NaNs
    assert bool(PowerOfTwo(MINIFLOATS["e4m3"], True).scale(everything).isnan().all())
