"""The MLX packer against a reader written bit by bit from the layout's text, and against golden files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import NumericsError, UnsupportedError
from auto_round.formats.base import get_format
from auto_round.layouts.bit_stream import pack_rows, unpack_rows, words_needed
from auto_round.layouts.integers import (
    MLX,
    bias_storage_dtype,
    mlx_biases,
    mlx_zero_points,
)
from auto_round.schemes import QuantizationScheme as Scheme


def naive(weight: np.ndarray, bits: int) -> np.ndarray:
    """Every value of every row, one bit at a time out of 32-bit words."""
    rows, words = weight.shape
    codes = np.zeros((rows, words * 32 // bits), np.uint8)
    for row in range(rows):
        for i in range(codes.shape[1]):
            for b in range(bits):
                word, bit = divmod(i * bits + b, 32)
                codes[row, i] |= ((int(weight[row, word]) >> bit) & 1) << b
    return codes


def random_codes(seed: int, bits: int, out: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (out, width), generator=generator, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(MLX.bits), out=st.integers(1, 5), words=st.integers(1, 4), strided=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_layout_is_what_the_text_says(bits: int, out: int, words: int, strided: bool, seed: int) -> None:
    codes = random_codes(seed, bits, out, words * 32)
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])
    given_codes = codes.T.contiguous().T if strided else codes
    packed = pack_rows(given_codes, bits)
    assert packed.shape == (out, words * bits) and packed.is_contiguous()
    assert np.array_equal(naive(packed.view(torch.uint32).numpy(), bits), codes.numpy())
    assert torch.equal(unpack_rows(packed, bits), codes)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(MLX.bits), sym=st.booleans(), group_size=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 3), out=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_layer_comes_back_and_mlx_computes_what_was_tuned(
    bits: int, sym: bool, group_size: int, groups: int, out: int, bias: bool, seed: int
) -> None:
    fmt, scheme = get_format("mlx"), Scheme(bits=bits, group_size=group_size, sym=sym)
    rows, width = out * 8, groups * group_size
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.randn(rows, groups, generator=generator).abs() * 10 ** (seed % 5 - 4.0)).half().clamp(min=1e-5)
    zero: torch.Tensor | int = 1 << (bits - 1)
    if sym:
        scale[::2] = -scale[::2]
    else:
        zero = random_codes(seed + 1, bits, rows, groups)
    codes = random_codes(seed, bits, rows, width)
    layer = QuantizedLayer(
        "a.b", scheme, IntCodes(codes, scale, zero, scheme.group_size), bias=torch.randn(rows) if bias else None
    )
    tensors = fmt.pack(layer)
    specs = fmt.tensor_specs("a.b", scheme, width, rows, bias_dtype=torch.float32 if bias else None)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == specs
    back = fmt.unpack_layer("a.b", scheme, tensors, width, rows)
    assert torch.equal(back.codes.codes, codes) and torch.equal(back.codes.scale, scale)
    assert torch.equal(
        torch.as_tensor(back.codes.zero_point).expand(rows, groups), torch.as_tensor(zero).expand(rows, groups)
    )
    # The formula of MLX, in float32.
    values = codes.view(rows, groups, group_size).float() * tensors["a.b.scales"].float().unsqueeze(-1)
    values = values + tensors["a.b.biases"].float().unsqueeze(-1)
    assert torch.equal(values.view(rows, width), layer.dequantize())


def test_biases_in_the_scales_dtype_would_not_do() -> None:
    """Why asymmetric layers have float32 biases: half precision rounds most of them."""
    scale, zero = torch.tensor([[0.001]]).half(), torch.tensor([[201]], dtype=torch.uint8)
    exact = scale.double() * 201
    assert mlx_biases(scale, zero, torch.float32).double() == -exact
    assert mlx_biases(scale, zero, torch.float16).double() != -exact
    assert bias_storage_dtype(True, torch.float16) == torch.float16
    assert bias_storage_dtype(False, torch.float16) == torch.float32


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="8 values of 3 bits"):
        words_needed(8, 3)
    with pytest.raises(NumericsError, match=r"^model.up_proj: .*65504.*ignore_layers"):
        mlx_biases(torch.tensor([[60000.0]]).half(), torch.tensor([[8]]), torch.float16, "model.up_proj")
    assert mlx_zero_points(torch.tensor([[-0.5]]), torch.tensor([[4.0]])).item() == 8


@pytest.mark.parametrize("name", ["w3a16-mlx", "w4a16-mlx", "w5a16-mlx", "w6a16-mlx"])
def test_golden_tensors_repack_to_the_same_bytes(name: str, golden_folder: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(golden_folder / name / "model.safetensors")
    bits = json.loads((golden_folder / name / "config.json").read_text())["quantization"]["bits"]
    layers = [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]
    assert len(layers) == 14
    for layer in layers:
        weight, scales, biases = (tensors[f"{layer}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        codes, zeros = unpack_rows(weight, bits), mlx_zero_points(scales, biases)
        assert (zeros == 1 << (bits - 1)).all()
        assert torch.equal(pack_rows(codes, bits), weight.view(torch.int32))
        assert torch.equal(mlx_biases(scales, zeros, scales.dtype), biases)
    sample = tensors[f"{layers[0]}.weight"][:4]
    assert np.array_equal(naive(sample.numpy(), bits), unpack_rows(sample, bits).numpy())
