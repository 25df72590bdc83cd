"""The packers against a reader written bit by bit from the layouts' text, and against golden files."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import UnsupportedError
from auto_round.layouts.bit_stream import pack_words, unpack_rows
from auto_round.layouts.integers import AWQ, GPTQ_V1, GPTQ_V2, GptqLayout
from auto_round.schemes import QuantizationScheme

SHARED = Path(os.environ.get("AR_TEST_SHARED") or Path(__file__).resolve().parents[4] / "shared")
GOLDEN = SHARED / "golden"


def stream_value(words: np.ndarray, index: int, bits: int) -> int:
    """Value `index` of a little-endian bit stream, one bit at a time."""
    value = 0
    for b in range(bits):
        position = index * bits + b
        bit = (int(words[position // 32]) >> (position % 32)) & 1
        value |= bit << b
    return value


def naive_gptq(qweight: np.ndarray, qzeros: np.ndarray, bits: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    columns, groups = qweight.shape[1], qzeros.shape[0]
    rows = qweight.shape[0] * 32 // bits
    codes = np.zeros((columns, rows), np.uint8)
    zeros = np.zeros((columns, groups), np.uint8)
    for o in range(columns):
        for i in range(rows):
            codes[o, i] = stream_value(qweight[:, o], i, bits)
        for g in range(groups):
            zeros[o, g] = (stream_value(qzeros[g], o, bits) + offset) % (1 << bits)
    return codes, zeros


def naive_awq(words: np.ndarray) -> np.ndarray:
    """[n, out/8] words to [out, n] values, through the inverse permutation that readers use."""
    inverse = (0, 4, 1, 5, 2, 6, 3, 7)
    values = np.zeros((words.shape[1] * 8, words.shape[0]), np.uint8)
    for n in range(words.shape[0]):
        for w in range(words.shape[1]):
            for column in range(8):
                values[w * 8 + column, n] = (int(words[n, w]) >> (4 * inverse[column])) & 15
    return values


def case(seed: int, bits: int, out: int, width: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, width), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (out, groups), generator=gen, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])
    zeros[0, 0], zeros[-1, -1] = 0, (1 << bits) - 1  # both ends, so that the -1 wraps
    return codes, zeros


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), out=st.integers(1, 2), width=st.integers(1, 3), groups=st.integers(1, 3),
    offset=st.sampled_from([0, 1]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_gptq_layout_is_what_the_text_says(
    bits: int, out: int, width: int, groups: int, offset: int, seed: int
) -> None:
    codes, zeros = case(seed, bits, out * 32, width * 32, groups)
    layout = GptqLayout(offset)
    qweight, qzeros = layout.words(codes, zeros, bits)
    assert qweight.dtype == qzeros.dtype == torch.int32
    assert qweight.shape == (width * bits, out * 32) and qzeros.shape == (groups, out * bits)
    seen, seen_zeros = naive_gptq(qweight.numpy(), qzeros.numpy(), bits, offset)
    assert np.array_equal(seen, codes.numpy()) and np.array_equal(seen_zeros, zeros.numpy())
    back, back_zeros = layout.codes(qweight, bits), layout.zeros(qzeros, bits)
    assert torch.equal(back, codes) and torch.equal(back_zeros, zeros)


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 6), width=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_awq_layout_is_what_the_text_says(out: int, width: int, groups: int, seed: int) -> None:
    codes, zeros = case(seed, 4, out * 8, max(width, 2), groups)
    qweight, qzeros = AWQ.words(codes, zeros, 4)
    assert qweight.shape == (codes.shape[1], out) and qzeros.shape == (groups, out)
    assert np.array_equal(naive_awq(qweight.numpy()), codes.numpy())
    assert np.array_equal(naive_awq(qzeros.numpy()), zeros.numpy())
    back, back_zeros = AWQ.codes(qweight, 4), AWQ.zeros(qzeros, 4)
    assert torch.equal(back, codes) and torch.equal(back_zeros, zeros)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), periods=st.integers(1, 3), width=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_bit_stream_round_trip(bits: int, periods: int, width: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (periods * 32, width), generator=gen, dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_words(values, bits).T, bits).T, values)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8), periods=st.integers(1, 3), width=st.integers(1, 9), chunk=st.sampled_from([1, 40, 200]),
    start=st.integers(0, 3),
)  # fmt: skip
def test_packing_in_chunks_and_from_views(bits: int, periods: int, width: int, chunk: int, start: int) -> None:
    """Chunks of any size, and inputs that begin anywhere in memory, give the words of the bit by bit reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("auto_round.layouts.bit_stream._CHUNK", chunk)
        base = torch.randint(0, 1 << bits, (width + 1, periods * 32 + start), dtype=torch.uint8)
        rows = base[1:, start:]
        words = pack_words(rows.T, bits).numpy()
        for column in range(width):
            seen = [stream_value(words[:, column], i, bits) for i in range(rows.shape[1])]
            assert seen == rows[column].tolist()
        if bits == 4:
            columns = base[:, start:][:1].expand(16, -1)
            assert np.array_equal(naive_awq(AWQ.words(columns, columns[:, :1], 4)[0].numpy()), columns.numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_zero_point_for_all_groups(bits: int) -> None:
    codes, _ = case(1, bits, 32, 64, 2)
    middle = 1 << (bits - 1)
    scheme, scale = QuantizationScheme(bits=bits, group_size=32), torch.ones(32, 2).half()
    one, many = middle, torch.full((32, 2), middle, dtype=torch.uint8)
    a, b = (GPTQ_V1.pack(QuantizedLayer("a", scheme, IntCodes(codes, scale, zero, 32))) for zero in (one, many))
    assert all(torch.equal(a[key], b[key]) for key in ("qweight", "qzeros", "scales"))


def test_zero_point_0_wraps_in_gptq_v1() -> None:
    """0 - 1 must not borrow from the neighbouring values of the word."""
    zeros = torch.arange(32, dtype=torch.uint8).remainder(16).view(32, 1)
    _, qzeros = GPTQ_V1.words(torch.zeros(32, 8, dtype=torch.uint8), zeros, 4)
    assert [stream_value(qzeros[0].numpy(), o, 4) for o in range(16)] == [15, *range(15)]


def test_uneven_shapes_are_refused() -> None:
    zeros = partial(torch.zeros, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        GPTQ_V1.words(zeros(8, 12), zeros(8, 1), 4)
    with pytest.raises(UnsupportedError, match="multiple of 32"):
        GPTQ_V1.words(zeros(32, 48), zeros(32, 1), 3)
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        AWQ.words(zeros(12, 8), zeros(12, 1), 4)
    assert AWQ.mismatch(QuantizationScheme(3), 8, 16) == "the AWQ layout has no 3-bit form"


GOLDEN_INT = [
    "w4a16-auto_round", "w3a16-auto_round", "w8a16-auto_round", "w2a16-auto_round-group_size64",
    "w4a16-auto_round_auto_awq-symfalse", "w4a16-auto_round-layer_config", "w4a16-auto_gptq",
    "w4a16-auto_gptq-symfalse", "w3a16-auto_gptq", "w4a16-auto_awq", "w4a16-auto_awq-symfalse",
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN_INT)
def test_golden_tensors_repack_to_the_same_bytes(name: str) -> None:
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip("golden checkpoints are not here; set AR_TEST_SHARED")
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layers = [k.removesuffix(".qweight") for k in tensors if k.endswith(".qweight")]
    assert len(layers) == 14
    for layer in layers:
        qweight, qzeros = tensors[f"{layer}.qweight"], tensors[f"{layer}.qzeros"]
        if "awq" in config.get("packing_format", "") or config["quant_method"] == "awq":
            again = AWQ.words(AWQ.codes(qweight, 4), AWQ.zeros(qzeros, 4), 4)
        else:
            bits = 8 if "layer_config" in name and "k_proj" in layer else config["bits"]
            zeros = GPTQ_V1.zeros(qzeros, bits)
            again = GPTQ_V1.words(GPTQ_V1.codes(qweight, bits), zeros, bits)
            if config["sym"]:
                assert (zeros == 1 << (bits - 1)).all()
        assert torch.equal(again[0], qweight) and torch.equal(again[1], qzeros)


@pytest.mark.parametrize("layout, bits", [(GPTQ_V1, 3), (GPTQ_V2, 2), (AWQ, 4)], ids=["gptq v1", "gptq v2", "awq"])
def test_a_layer_comes_back_from_its_tensors(layout: GptqLayout, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    scheme = QuantizationScheme(bits, 32, False)
    scale = torch.rand(96, 2, generator=generator).half()
    layer = QuantizedLayer("l", scheme, IntCodes(draw(96, 64), scale, draw(96, 2), 32))
    back = layout.unpack("l", scheme, layout.pack(layer), 64, 96)
    assert torch.equal(back.codes.codes, layer.codes.codes) and torch.equal(back.codes.scale, layer.codes.scale)
    assert torch.equal(back.codes.zero_point, layer.codes.zero_point)
