"""The search over ggml types, judged by libgguf: it reads what we store, and quantizes with the same importance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.ggml import search
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, assign_codes

NAMES = sorted(GGML_TYPES)


def error(weight: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    wrong = (values.double() - weight.double()).square()
    return float((wrong if importance is None else wrong * importance.double()).sum())


def by_libgguf(weight: torch.Tensor, name: str, importance: torch.Tensor) -> torch.Tensor:
    """What ggml's own quantizer makes of the weight with this importance matrix."""
    libgguf, gguf = pytest.importorskip("libgguf"), pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    data = libgguf.quantize_rows(weight.float().numpy(), kind, imatrix=importance.numpy())
    return torch.from_numpy(gguf.dequantize(data, kind))


def check_storable(blocks: GgmlBlocks) -> None:
    kind = blocks.kind
    assert blocks.d.dtype == torch.float16 and bool(torch.isfinite(blocks.d).all())
    assert int(blocks.codes.max()) < kind.codes
    if blocks.dmin is not None:
        assert blocks.dmin.dtype == torch.float16 and bool(torch.isfinite(blocks.dmin).all())
    assert (blocks.scales is not None) == kind.is_k
    if blocks.scales is not None:
        half = 1 << (kind.scale_bits - 1)
        low, high = (-half, half - 1) if kind.signed_scales else (0, 2 * half - 1)
        assert int(blocks.scales.min()) >= low and int(blocks.scales.max()) <= high
    if blocks.mins is not None:
        assert int(blocks.mins.max()) < 1 << kind.scale_bits


def made(rows: int, columns: int, seed: int, tails: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its importance; `tails` spreads both over orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= (torch.randn(rows, columns, generator=generator) * tails).exp()
    importance = (torch.randn(columns, generator=generator) * (0.5 + tails)).exp()
    return weight, importance


@pytest.mark.parametrize("tails", [0.0, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_better_than_ggml_with_the_same_importance(name: str, tails: float) -> None:
    weight, importance = made(24, 512, 3, tails)
    found = search_blocks(weight, name, importance)
    check_storable(found)
    ratio = error(weight, found.dequantize(), importance) / error(
        weight, by_libgguf(weight, name, importance), importance
    )
    least = {"Q2_K": 0.95, "Q5_K": 0.95, "Q6_K": 0.95, "Q8_0": 0.9}
    assert ratio < least.get(name, 0.995)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**20), st.sampled_from(NAMES), st.sampled_from([1e-7, 1e-4, 1e-2, 1.0, 300.0]),
    st.sampled_from(["none", "zeros", "one", "wide"]),
    st.sampled_from(["zero", "equal", "positive", "negative", "peak"]),
)  # fmt: skip
def test_odd_groups_are_stored_well(seed: int, name: str, magnitude: float, weighing: str, oddity: str) -> None:
    kind = GGML_TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 512, generator=generator) * magnitude
    part = weight[1:3, : kind.block]
    if oddity == "zero":
        part.zero_()
    elif oddity == "equal":
        part.fill_(magnitude)
    elif oddity in ("positive", "negative"):
        part.abs_().mul_(1.0 if oddity == "positive" else -1.0)
    else:
        weight[1, 5] = 1000 * magnitude if magnitude < 1 else magnitude
    importance = None
    if weighing == "zeros":
        importance = torch.rand(512, generator=generator)
        importance[:260] = 0
    elif weighing == "one":
        importance = torch.zeros(512)
        importance[7] = 1
    elif weighing == "wide":
        importance = (torch.randn(512, generator=generator) * 3).exp()
    found = search_blocks(weight, name, importance)
    check_storable(found)
    values = found.dequantize()
    assert bool(torch.isfinite(values).all())
    if oddity == "zero":
        assert bool((values[1:3, : kind.block] == 0).all())
    weights = torch.ones(512) if importance is None else importance / importance.mean() + 1e-4
    size = error(weight, torch.zeros_like(weight), weights)
    assert error(weight, values, weights) <= size * (1 + 1e-6)  # at least as good as storing zeros


@pytest.mark.parametrize("name", NAMES)
def test_importance_is_heeded(name: str) -> None:
    weight, _ = made(16, 256, 1)
    importance = torch.full((256,), 0.01)
    importance[::9] = 10.0
    heeded, not_heeded = search_blocks(weight, name, importance), search_blocks(weight, name)
    assert error(weight, heeded.dequantize(), importance) < 0.97 * error(weight, not_heeded.dequantize(), importance)
    assert error(weight, not_heeded.dequantize()) < error(weight, heeded.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest(name: str) -> None:
    """No other code of the same grid is closer, for any weight."""
    weight, importance = made(5, 512, 8, 0.5)
    found = search_blocks(weight, name, importance)
    step = found.step().abs().repeat_interleave(found.kind.group, 1)
    wrong = (found.dequantize() - weight).abs()
    top = found.kind.codes - 1
    inside = (found.codes > (name == "Q8_0")) & (found.codes < top)  # -128 is never written
    assert bool((wrong <= step * (0.5 + 1e-4))[inside].all())
    again = assign_codes(weight, found)
    assert torch.equal(again.codes, found.codes)


def test_offsets_move_codes() -> None:
    weight, importance = made(6, 256, 2)
    found = search_blocks(weight, "Q4_K", importance)
    inside = (found.codes > 0) & (found.codes < 15)
    for v, moved in ((torch.ones_like(weight), 1), (torch.full((6, 8, 32), -1.0), -1)):
        other = assign_codes(weight, found, v).codes.int()
        assert torch.equal(other[inside], found.codes.int()[inside] + moved)
        assert int(other.min()) >= 0 and int(other.max()) <= 15


@pytest.mark.parametrize("name", NAMES)
def test_pieces_and_layout_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = made(13, 1024, 4)
    whole = search_blocks(weight.to(torch.bfloat16), name, importance)
    turned = search_blocks(weight.to(torch.bfloat16).t().contiguous().t(), name, importance)
    monkeypatch.setattr(search, "_CHUNK", 256 * 5)
    pieces = search_blocks(weight.to(torch.bfloat16).float(), name, importance)
    for other in (turned, pieces):
        assert torch.equal(whole.dequantize(), other.dequantize()) and torch.equal(whole.codes, other.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_useless_importance_counts_as_none(bad: float) -> None:
    weight, _ = made(3, 256, 5)
    found = search_blocks(weight, "Q4_K", torch.full((256,), bad))
    assert torch.equal(found.dequantize(), search_blocks(weight, "Q4_K").dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_search_is_not_much_worse(name: str) -> None:
    weight, importance = made(48, 768, 6, 0.3)
    whole, quick = search_blocks(weight, name, importance), search_blocks(weight, name, importance, quick=True)
    check_storable(quick)
    least = error(weight, whole.dequantize(), importance)
    assert error(weight, quick.dequantize(), importance) < 1.2 * least
    steps = search_blocks(weight, name, importance, quick=True, codes=False)
    assert torch.equal(assign_codes(weight, steps).dequantize(), quick.dequantize())


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_0"])
def test_threads_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = made(70, 768, 9)
    monkeypatch.setattr(search, "_CHUNK", 256 * 16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found += [(search_blocks(weight, name, importance), plain_blocks(weight, name))]
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.dequantize(), other.dequantize())
