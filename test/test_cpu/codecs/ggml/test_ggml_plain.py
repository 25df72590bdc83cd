"""Plain rounding to the ggml types against ggml's own code (libgguf), byte for byte."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.ggml.pack import pack_blocks, unpack_blocks
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.errors import NumericsError

NAMES = list(GGML_TYPES)
K_NAMES = [name for name in NAMES if name.endswith("K")]


def by_ggml(weight: torch.Tensor, name: str) -> np.ndarray:
    return libgguf.quantize_rows(weight.float().numpy(), libgguf.GGMLQuantizationType[name])


def same_blocks(weight: torch.Tensor, name: str) -> float:
    """Share of blocks with the same bytes."""
    size = GGML_TYPES[name].nbytes
    ours, theirs = pack_blocks(plain_blocks(weight, name)).numpy(), by_ggml(weight, name)
    return float((ours.reshape(-1, size) == theirs.reshape(-1, size)).all(1).mean())


def weights(seed: int, out: int, columns: int, tail: float, scale: float) -> torch.Tensor:
    """Normal, with rows of different size and some large values."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, columns, generator=g) * scale * torch.rand(out, 1, generator=g).add(0.1)
    return w * torch.rand(out, columns, generator=g).pow(tail).add(0.05).reciprocal()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31), out=st.integers(1, 5), blocks=st.integers(1, 4), tail=st.sampled_from([0.0, 0.5, 2.0]),
    scale=st.sampled_from([1e-3, 0.02, 3.0, 1000.0]), dtype=st.sampled_from([torch.float, torch.bfloat16, torch.half]),
)  # fmt: skip
def test_bytes_are_those_of_ggml(
    name: str, seed: int, out: int, blocks: int, tail: float, scale: float, dtype: torch.dtype
) -> None:
    w = weights(seed, out, blocks * 256, tail, scale).clamp(-3e4, 3e4).to(dtype)  # float16 has no larger
    # A compiler may contract a product and a sum, and then one candidate in some thousands wins where another did.
    assert same_blocks(w, name) >= (0.9 if name in K_NAMES else 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_many_blocks(name: str) -> None:
    """Some pieces and a part of one, in bfloat16, where many weights of a block share the largest magnitude."""
    w = weights(3, 70, 4096, 0.3, 0.02).bfloat16()
    assert same_blocks(w, name) >= (0.995 if name in K_NAMES else 1.0)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@settings(max_examples=40)
@given(st.lists(st.floats(-3e4, 3e4, width=16), min_size=32, max_size=32))
def test_any_block_as_gguf_rounds_it(name: str, values: list[float]) -> None:
    """Ties, both signs of the largest magnitude, zeros: against gguf's numpy, which has no contraction either."""
    w = torch.tensor([values], dtype=torch.float32)
    wanted = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[name])
    ours = pack_blocks(plain_blocks(w, name)).numpy()
    assert np.array_equal(ours, wanted) or np.array_equal(ours, by_ggml(w, name))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_without_spread(name: str) -> None:
    """Zeros, constants of both signs, one weight among zeros, zero groups beside others."""
    w = torch.zeros(8, 512)
    w[1], w[2] = 1.0, -1.0
    w[3, 5] = 0.3
    w[4, 200] = -0.3
    w[5, :32] = torch.linspace(-1, 1, 32)
    w[6] = torch.arange(512) % 2 - 0.5  # the largest magnitude in both signs
    data = pack_blocks(plain_blocks(w, name))
    assert np.array_equal(data.numpy(), by_ggml(w, name))
    assert torch.equal(unpack_blocks(data, name, 512).dequantize()[0], torch.zeros(512))
    # With zeros of both signs ggml's minimum has the sign of the first; ours has none.
    w[7, 17:300] = -0.0
    assert torch.equal(plain_blocks(w, name).dequantize()[7], torch.zeros(512))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-7, 1e-12, 1e-20, 1e-38, 1e-44])
def test_tiny_weights_become_small_and_finite(name: str, scale: float) -> None:
    w = weights(1, 3, 512, 0.3, 1.0) * scale
    found = plain_blocks(w, name)
    assert int(found.codes.max()) < found.kind.codes
    assert bool((found.dequantize().abs() <= 2 * w.abs().max() + 1e-5).all())
    assert torch.equal(unpack_blocks(pack_blocks(found), name, 512).codes, found.codes)


@pytest.mark.parametrize("name", NAMES)
def test_weights_beyond_float16_factors(name: str) -> None:
    w = weights(2, 2, 256, 0.3, 1.0)
    w[1, 3] = 3e8
    with pytest.raises(NumericsError, match=f"too large for {name}.*65504"):
        plain_blocks(w, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(name: str, value: float) -> None:
    w = weights(2, 2, 512, 0.3, 1.0)
    w[1, 300] = value
    with pytest.raises(NumericsError, match=name):
        plain_blocks(w, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_contiguous(name: str) -> None:
    w = weights(4, 256, 512, 0.3, 0.02)
    assert torch.equal(pack_blocks(plain_blocks(w.t().contiguous().t(), name)), pack_blocks(plain_blocks(w, name)))


@pytest.mark.parametrize("name", K_NAMES)
def test_pieces_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(6, 33, 1024, 0.3, 0.02)
    whole = pack_blocks(plain_blocks(w, name))
    monkeypatch.setattr("auto_round.codecs.ggml.types._CHUNK", 1)
    assert torch.equal(pack_blocks(plain_blocks(w, name)), whole)


@pytest.mark.parametrize("name", NAMES)
def test_more_bits_less_error(name: str) -> None:
    """The error of each type on normal weights, as a share of their variance: not worse than a uniform grid's."""
    w = weights(8, 16, 1024, 0.0, 0.02)
    error = float((plain_blocks(w, name).dequantize() - w).pow(2).mean() / w.pow(2).mean())
    assert error < {2: 0.12, 3: 0.035, 4: 0.009, 5: 0.0025, 6: 0.0006, 8: 0.00004}[GGML_TYPES[name].bits]
