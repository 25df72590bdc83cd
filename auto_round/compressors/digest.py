"""Fingerprints of quantized layers, to compare what was tuned with what a reader finds in the file."""

from __future__ import annotations

import hashlib

import torch

from auto_round.quantized_layer import QuantizedLayer


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def codes_digest(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int) -> str:
    """Of codes [out, in], scales and zero points [out, groups]; one zero point stands for all groups."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(bytes_of(codes))
    digest.update(bytes_of(scale))
    zero = zero_point if isinstance(zero_point, torch.Tensor) else torch.full(scale.shape, zero_point)
    digest.update(bytes_of(zero.to(torch.uint8)))
    return digest.hexdigest()


def dense_digest(weight: torch.Tensor) -> str:
    """Of a dense weight in its own dtype."""
    return hashlib.blake2b(bytes_of(weight), digest_size=16).hexdigest()


def layer_digest(layer: QuantizedLayer, dense: bool, dtype: torch.dtype) -> str:
    """What a reader must find: codes, scales and zero points, or with `dense` the weight dequantized to `dtype`."""
    if dense or layer.codes is None or layer.scale is None or layer.zero_point is None:
        return dense_digest(layer.dequantize(dtype))
    return codes_digest(layer.codes, layer.scale, layer.zero_point)
