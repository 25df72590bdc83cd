"""The MLX layout: codes as one bit stream a row (`bit_stream.py`), and a bias instead of a zero point.

weight uint32 [out, in*bits/32]  codes; 3, 5 and 6 bits cross bytes and words, and nothing is padded
scales float16 [out, groups]     w = scales * code + biases
biases [out, groups]             -scales * zero point
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer, group_count
from auto_round.errors import ModelError, NumericsError, UnsupportedError
from auto_round.layouts.base import SCALE_DTYPE, IntegerLayout, TensorSpecs, integer_arrays, stored_group_size
from auto_round.layouts.bit_stream import pack_rows, unpack_rows
from auto_round.schemes import QuantizationScheme

MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # MLX `mlx/ops.cpp`, `quantize`
# Weights dequantized at once: bounds the temporary copies.
_CHUNK = 1 << 22


def mlx_words(count: int, bits: int) -> int:
    """uint32 words that `count` values take. Raises UnsupportedError when they do not fill whole words."""
    if count * bits % 32:
        raise UnsupportedError(
            f"{count} values of {bits} bits do not fill whole 32-bit words; leave this layer in full precision"
        )
    return count * bits // 32


def pack_mlx(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [out, in], each below 2**bits, to uint32 [out, in*bits/32]."""
    mlx_words(codes.shape[1], bits)
    return pack_rows(codes, bits).view(torch.uint32)


def unpack_mlx(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_mlx`: uint32 [out, words] to uint8 [out, in], contiguous."""
    return unpack_rows(weight, bits)


def bias_storage_dtype(sym: bool, scale_dtype: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds every bias of a layer exactly.

    Symmetric: the zero point is a power of two, and the product has the scale's own significand. Asymmetric: up to 11
    bits of a float16 scale times up to 8 bits of a zero point, which float32 holds and no half precision does.
    """
    return scale_dtype if sym else torch.float32


def mlx_biases(
    scale: torch.Tensor, zero_point: torch.Tensor | int, dtype: torch.dtype, layer: str = "a layer"
) -> torch.Tensor:
    """-scale * zero point, [out, groups]. Raises NumericsError, which names the layer, when `dtype` cannot hold one."""
    zero = zero_point.float() if isinstance(zero_point, torch.Tensor) else float(zero_point)
    biases = (0.0 - scale.float() * zero).to(dtype)
    if not bool(torch.isfinite(biases).all()):
        raise NumericsError(
            f"{layer}: the MLX layout stores scale times zero point, here beyond {dtype}: weights above 65504 in "
            "magnitude; leave the layer in full precision with ignore_layers, or use sym=False (float32 biases)"
        )
    return biases


def mlx_zero_points(scale: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """uint8 [out, groups]: the integer zero points nearest to -biases / scale."""
    return (-biases.float() / scale.float()).round_().clamp_(0, 255).to(torch.uint8)


class MlxLayout(IntegerLayout):
    """The tensors that MLX's quantized matrix product reads."""

    bits: ClassVar[tuple[int, ...]] = MLX_BITS
    group_sizes: ClassVar[tuple[int, ...]] = MLX_GROUPS

    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int,
        model_dtype: torch.dtype = torch.bfloat16,
    ) -> TensorSpecs:  # fmt: skip
        shape = (out_features, group_count(in_features, stored_group_size(scheme)))
        return {
            "weight": ((out_features, mlx_words(in_features, scheme.bits)), torch.uint32),
            "scales": (shape, SCALE_DTYPE),
            "biases": (shape, bias_storage_dtype(scheme.sym, SCALE_DTYPE)),
        }

    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        codes, scales, zeros = integer_arrays(layer)
        dtype = bias_storage_dtype(layer.scheme.sym, SCALE_DTYPE)
        return {
            "weight": pack_mlx(codes, layer.scheme.bits),
            "scales": scales.contiguous(),
            "biases": mlx_biases(scales, zeros, dtype, layer.name),
        }

    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        scales, biases = tensors["scales"], tensors["biases"]
        zeros = mlx_zero_points(scales, biases)
        if not torch.equal(biases, mlx_biases(scales, zeros, biases.dtype, name)):
            raise ModelError(f"layer {name}: its biases are not its scales times integer zero points")
        codes = unpack_mlx(tensors["weight"], scheme.bits)
        return QuantizedLayer(name, scheme, codec_of(scheme).codes(codes, scales, zeros))

    def dequantize(
        self, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:  # fmt: skip
        """scale * code + bias: other programs store biases that are not scales times integers."""
        weight, scales, biases = tensors["weight"], tensors["scales"].float(), tensors["biases"].float()
        dense = torch.empty(out_features, in_features, dtype=dtype, device=weight.device)
        step = max(1, _CHUNK // in_features)
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            values = unpack_mlx(weight[rows], scheme.bits).view(-1, scales.shape[1], in_features // scales.shape[1])
            values = values.float().mul_(scales[rows].unsqueeze(-1)).add_(biases[rows].unsqueeze(-1))
            dense[rows] = values.view(-1, in_features)
        return dense

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        size = stored_group_size(scheme)
        if size <= 0 or in_features % size:
            return f"in_features={in_features} is not a multiple of the group size {size}"
        return None if in_features * scheme.bits % 32 == 0 else f"in_features={in_features} does not fill whole words"


MLX = MlxLayout()
