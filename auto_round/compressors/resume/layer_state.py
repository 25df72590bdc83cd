"""Quantized layers as plain tensors and facts, and back, exactly and whatever format they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from auto_round.data_type.activation import ActivationQuantizer
from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.types import GGML_TYPES
from auto_round.quantized_layer import QuantizedLayer
from auto_round.schemes import QuantizationScheme

Tensors = dict[str, torch.Tensor]
_WIDTHS = (1, 2, 4)
_AT_ONCE = 1 << 24


def layer_state(layer: QuantizedLayer) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by field, and the fields that are none."""
    tensors: Tensors = {}
    facts: dict[str, Any] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = value
        elif isinstance(value, GgmlBlocks):
            facts["blocks"] = value.kind.name
            inner = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "kind"}
            tensors |= {f"blocks.{name}": t for name, t in inner.items() if t is not None}
        elif isinstance(value, QuantizationScheme):
            facts[field.name] = value.to_dict()
        else:
            facts[field.name] = value
    moved = sorted(name for name, tensor in tensors.items() if tensor.device.type != "cpu")
    return tensors, facts | ({"on_device": moved} if moved else {})


def layer_from_state(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], device: Any) -> QuantizedLayer:
    """The layer. What lay on an accelerator goes to `device`."""
    values = {key: value for key, value in facts.items() if key not in ("on_device", "scheme")}
    moved = set(facts.get("on_device", ()))
    placed = {name: tensor.to(device) if name in moved else tensor for name, tensor in tensors.items()}
    kind = values.pop("blocks", None)
    if kind is not None:
        inner = {name.removeprefix("blocks."): t for name, t in placed.items() if name.startswith("blocks.")}
        values["blocks"] = GgmlBlocks(GGML_TYPES[kind], **inner)
    values |= {name: tensor for name, tensor in placed.items() if not name.startswith("blocks.")}
    return QuantizedLayer(scheme=scheme_of(facts), **values)


def activation_state(quantizer: ActivationQuantizer) -> tuple[Tensors, dict[str, Any]]:
    """What calibration fixed of a layer's inputs. Their scheme is the layer's."""
    values = {f.name: getattr(quantizer, f.name) for f in fields(quantizer) if f.name != "scheme"}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def activation_from_state(
    scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> ActivationQuantizer:
    """The step of a layer's inputs."""
    assert scheme.activations is not None
    return ActivationQuantizer(scheme.activations, **{**facts, **tensors})


def scheme_of(facts: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme among a layer's facts."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["scheme"].items()}
    return QuantizationScheme(**values)


def packed(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, list[Any]]]:
    """Tensors for a file: those of bytes that need fewer bits in 1, 2 or 4 of them, and how those are to be read."""
    result: Tensors = {}
    widths: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        most = int(tensor.max()) if tensor.dtype == torch.uint8 and tensor.numel() else 256
        width = next((w for w in _WIDTHS if most < 1 << w), None)
        if width is None:
            result[name] = tensor
        else:
            result[name] = _pack(tensor.reshape(-1), width)
            widths[name] = [width, list(tensor.shape)]
    return result, widths


def unpacked(tensors: Mapping[str, torch.Tensor], widths: Mapping[str, Sequence[Any]]) -> Tensors:
    """What `packed` was given."""
    return {
        name: _unpack(tensor, *widths[name]) if name in widths else tensor.clone() for name, tensor in tensors.items()
    }


def _pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [n] below 2**width as uint8 [n * width / 8], the first code in the lowest bits."""
    each = 8 // width
    parts = []
    for piece in codes.split(_AT_ONCE):
        if piece.numel() % each:
            piece = torch.cat([piece, piece.new_zeros(each - piece.numel() % each)])
        lanes = piece.view(-1, each)
        whole = lanes[:, 0].clone()
        for lane in range(1, each):
            whole |= lanes[:, lane] << (lane * width)
        parts.append(whole)
    return torch.cat(parts)


def _unpack(data: torch.Tensor, width: int, shape: Sequence[int]) -> torch.Tensor:
    each = 8 // width
    codes = torch.empty(data.numel(), each, dtype=torch.uint8)
    for lane in range(each):
        codes[:, lane] = (data >> (lane * width)) & ((1 << width) - 1)
    count = 1
    for size in shape:
        count *= size
    return codes.view(-1)[:count].view(list(shape))
