"""Fingerprints of quantized layers, to compare what was tuned with what a reader finds in the file."""

from __future__ import annotations

import hashlib

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.quantized_layer import QuantizedLayer


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def codes_digest(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int,
    inputs: tuple[float | None, int | None] = (None, None),
) -> str:  # fmt: skip
    """Of codes [out, in], scales and zero points [out, groups]; one zero point stands for all groups. `inputs`: scale
    and zero point of static activations."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(bytes_of(codes))
    digest.update(bytes_of(scale))
    zero = zero_point if isinstance(zero_point, torch.Tensor) else torch.full(scale.shape, zero_point)
    digest.update(bytes_of(zero.to(torch.uint8)))
    if inputs != (None, None):
        digest.update(repr(inputs).encode())
    return digest.hexdigest()


def element_digest(layer: QuantizedLayer) -> str:
    """Of a layer of a small float type: codes, scales in float32, and the scales above them and of its inputs."""
    assert layer.codes is not None and layer.scale is not None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(layer.element).encode())
    digest.update(bytes_of(layer.codes))
    digest.update(bytes_of(layer.scale.float()))
    for scalar in (layer.global_scale, layer.act_scale, layer.act_global_scale):
        digest.update(repr(None if scalar is None else float(scalar)).encode())
    return digest.hexdigest()


def bytes_digest(data: torch.Tensor) -> str:
    """Of the raw bytes of a tensor."""
    return hashlib.blake2b(bytes_of(data), digest_size=16).hexdigest()


def blocks_digest(blocks: GgmlBlocks) -> str:
    """Of a layer in a ggml type: everything that is stored."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(blocks.kind.name.encode())
    for part in (blocks.codes, blocks.d, blocks.scales, blocks.dmin, blocks.mins):
        if part is not None:
            digest.update(bytes_of(part))
    return digest.hexdigest()


def dense_digest(weight: torch.Tensor) -> str:
    """Of a dense weight in its own dtype."""
    return hashlib.blake2b(bytes_of(weight), digest_size=16).hexdigest()


def layer_digest(layer: QuantizedLayer, dense: bool, dtype: torch.dtype) -> str:
    """What a reader must find: codes and all scales and zero points, or with `dense` the weight in `dtype`."""
    if layer.blocks is not None and not dense:
        return blocks_digest(layer.blocks)
    if dense or layer.codes is None or layer.scale is None or layer.zero_point is None:
        return dense_digest(layer.dequantize(dtype))
    if layer.element is not None:
        return element_digest(layer)
    act_scale = None if layer.act_scale is None else float(layer.act_scale)
    return codes_digest(layer.codes, layer.scale, layer.zero_point, (act_scale, layer.act_zero_point))
