"""The MLX layout: codes as one dense bit stream a row, and a bias in place of a zero point.

    weight uint32 [out, in*bits/32]  value i of row o lies in bits i*bits .. i*bits + bits - 1 of that row's stream;
                                     bit 8*k + b of the stream is bit b of byte k, words are little-endian
    scales [out, groups]             w = scales * code + biases
    biases [out, groups]             -scales * zero point

With 3, 5 and 6 bits values run across bytes and words; nothing is padded.
"""

from __future__ import annotations

from math import gcd

import torch

from auto_round.errors import NumericsError, UnsupportedError

MLX_BITS = (2, 3, 4, 5, 6, 8)


def _period(bits: int) -> tuple[int, int]:
    """(values, bytes): the smallest whole number of bytes that whole values fill."""
    common = gcd(8, bits)
    return 8 // common, bits // common


def mlx_words(count: int, bits: int) -> int:
    """uint32 words that `count` values take. Raises UnsupportedError when they do not fill whole words."""
    if count * bits % 32:
        raise UnsupportedError(
            f"{count} values of {bits} bits do not fill whole 32-bit words; leave this layer in full precision"
        )
    return count * bits // 32


def pack_mlx(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [out, in], each below 2**bits, to uint32 [out, in*bits/32].

    Works in bytes, so that no temporary is larger than one period's share of the codes.
    """
    values, width = _period(bits)
    stream = torch.zeros(codes.shape[0], mlx_words(codes.shape[1], bits) * 4, dtype=torch.uint8, device=codes.device)
    for i in range(values):
        byte, offset = divmod(i * bits, 8)
        part = codes[:, i::values]
        stream[:, byte::width] |= part << offset  # what leaves the byte at the top belongs to the next one
        if offset + bits > 8:
            stream[:, byte + 1 :: width] |= part >> (8 - offset)
    return stream.view(torch.uint32)


def unpack_mlx(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_mlx`: uint32 [out, words] to uint8 [out, in], contiguous."""
    values, width = _period(bits)
    stream = weight.contiguous().view(torch.uint8)
    out, size = stream.shape
    codes = torch.empty(out, size * 8 // bits, dtype=torch.uint8, device=weight.device)
    for i in range(values):
        byte, offset = divmod(i * bits, 8)
        part = stream[:, byte::width] >> offset
        if offset + bits > 8:
            part |= stream[:, byte + 1 :: width] << (8 - offset)
        codes[:, i::values] = part & ((1 << bits) - 1)
    return codes


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
    """uint8 [out, groups]: the whole zero points nearest to -biases / scale."""
    return (-biases.float() / scale.float()).round_().clamp_(0, 255).to(torch.uint8)
