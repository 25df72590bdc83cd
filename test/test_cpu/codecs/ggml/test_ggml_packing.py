"""Bytes of the ggml types against two readers that know nothing of us: gguf (numpy) and libgguf (ggml's own C)."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.ggml.pack import LAYOUTS, pack_blocks, unpack_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks

NAMES = list(GGML_TYPES)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """float32 as integers, so that signs of zero count; NaN is NaN whatever its payload."""
    found = np.asarray(values, np.float32).copy()
    found[np.isnan(found)] = np.nan
    return found.view(np.int32)


def random_blocks(name: str, out: int, blocks: int, seed: int) -> GgmlBlocks:
    kind, g = GGML_TYPES[name], torch.Generator().manual_seed(seed)
    groups = kind.block // kind.group * blocks

    def half() -> torch.Tensor:
        return (torch.randn(out, blocks, generator=g) * 0.01).half()

    def integers(low: int, high: int, n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, (out, n), generator=g, dtype=dtype)

    top = 1 << kind.scale_bits
    low, high = (-top // 2, top // 2) if kind.signed_scales else (0, top)
    return GgmlBlocks(
        kind, integers(0, kind.codes, blocks * kind.block, torch.uint8), half(),
        integers(low, high, groups, torch.int8) if kind.is_k else None, half() if kind.has_min else None,
        integers(0, top, groups, torch.uint8) if kind.is_k and kind.has_min else None,
    )  # fmt: skip


def assert_same(a: GgmlBlocks, b: GgmlBlocks) -> None:
    assert a.kind is b.kind
    for field in ("codes", "d", "scales", "dmin", "mins"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), field
        if one is not None:
            assert one.dtype == other.dtype and one.shape == other.shape, field
            raw = torch.int16 if one.dtype == torch.float16 else one.dtype
            assert torch.equal(one.view(raw), other.view(raw)), field


@pytest.mark.parametrize("name", NAMES)
def test_fields_fill_the_block(name: str) -> None:
    kind = GGML_TYPES[name]
    assert sum(size for _, size in LAYOUTS[name]) == kind.nbytes
    assert (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(size=SIZES)
def test_packed_and_back(name: str, size: tuple[int, int, int]) -> None:
    blocks = random_blocks(name, *size)
    data = pack_blocks(blocks)
    assert data.dtype == torch.uint8 and data.shape == (size[0], blocks.kind.row_bytes(blocks.codes.shape[1]))
    assert_same(unpack_blocks(data, name, blocks.codes.shape[1]), blocks)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(size=SIZES)
def test_readers_read_what_we_mean(name: str, size: tuple[int, int, int]) -> None:
    blocks = random_blocks(name, *size)
    data, wanted = pack_blocks(blocks).numpy(), bits(blocks.dequantize())
    assert np.array_equal(bits(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])), wanted)
    columns = blocks.codes.shape[1]
    read = libgguf.dequantize_rows(data, libgguf.GGMLQuantizationType[name], columns)
    assert np.array_equal(bits(read), wanted)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(size=SIZES, data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes_are_blocks(name: str, size: tuple[int, int, int], data: st.DataObject) -> None:
    kind, (out, blocks, seed) = GGML_TYPES[name], size
    raw = np.random.default_rng(seed).integers(0, 256, (out, blocks * kind.nbytes), np.uint8)
    if data.draw(st.booleans(), label="extreme factor"):
        factors = {f: sum(s for _, s in LAYOUTS[name][:i]) for i, (f, _) in enumerate(LAYOUTS[name])}
        at = factors[data.draw(st.sampled_from([f for f in ("d", "dmin") if f in factors]))]
        half = data.draw(st.sampled_from([0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x8000, 0x0001]))
        raw[0, at : at + 2] = half & 255, half >> 8
    found = unpack_blocks(torch.from_numpy(raw), kind, blocks * kind.block)
    assert int(found.codes.max()) < kind.codes
    assert np.array_equal(pack_blocks(found).numpy(), raw)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert np.array_equal(bits(found.dequantize()), bits(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_put_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(name, 7, 30, 5)
    whole = pack_blocks(blocks)
    monkeypatch.setattr("auto_round.codecs.ggml.types._CHUNK", 1)
    assert torch.equal(pack_blocks(blocks), whole)
    assert_same(unpack_blocks(whole, name, blocks.codes.shape[1]), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_views_are_packed_like_copies(name: str) -> None:
    big = random_blocks(name, 5, 2, 9)
    parts = [None if t is None else t[1:4] for t in (big.codes, big.d, big.scales, big.dmin, big.mins)]
    assert torch.equal(pack_blocks(GgmlBlocks(big.kind, *parts)), pack_blocks(big)[1:4])
    # Columns of a wider matrix: not contiguous, and its storage starts in the middle of a word.
    wide = torch.cat((torch.zeros(5, 3, dtype=torch.uint8), big.codes), 1)[:, 3:]
    moved = GgmlBlocks(big.kind, wide, big.d, big.scales, big.dmin, big.mins)
    assert torch.equal(pack_blocks(moved), pack_blocks(big))
    data = torch.cat((torch.zeros(5, 1, dtype=torch.uint8), pack_blocks(big)), 1)[:, 1:]
    assert_same(unpack_blocks(data, name, big.codes.shape[1]), big)
