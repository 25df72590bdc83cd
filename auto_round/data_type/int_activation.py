"""Integer activations: one scale a token, a group of a token, or for all inputs of a layer.

Symmetric codes -2**(bits-1) .. 2**(bits-1)-1 at `scale = max |x| / ((2**bits - 1) / 2)`; asymmetric codes of the same
range at `scale = (max - min) / (2**bits - 1)`, with a zero point. Everything is computed in the dtype of the input, as
Transformers does with a compressed-tensors checkpoint, so that what is tuned is what will run there.
"""

from __future__ import annotations

from typing import Any

import torch

from auto_round.data_type.register import register_dtype
from auto_round.data_type.utils import reshape_pad_tensor_by_group_size, revert_tensor_by_pad
from auto_round.schemes import GroupSize

Grid = tuple[torch.Tensor, torch.Tensor | float]


def activation_grid(low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool) -> Grid:
    """(scale, zero point) for inputs from `low` to `high`, in their dtype. The zero point is a code of the signed
    range: 0.0 when symmetric."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = 2**bits - 1
    scale = torch.maximum(-low, high) / (steps / 2) if sym else (high - low) / steps
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    if sym:
        return scale, 0.0
    bottom = -(2 ** (bits - 1))
    return scale, (bottom - low / scale).clamp(bottom, bottom + steps).round()


def fake_quantize(x: torch.Tensor, grid: Grid, bits: int) -> torch.Tensor:
    """`scale * (clamp(round(x / scale + zero)) - zero)`; the gradient is one inside the range and zero outside."""
    scale, zero = grid
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        place = x / scale + zero if isinstance(zero, torch.Tensor) else x / scale
        codes = place.clamp(bottom, top).round_()
        if isinstance(zero, torch.Tensor):
            codes = codes - zero
        values = codes * scale
    if not (torch.is_grad_enabled() and x.requires_grad):
        return values
    inside = (place > bottom - 1) & (place < top + 1)
    return values + torch.where(inside, x - x.detach(), 0.0)  # adds zero, and carries the gradient


def _quantize(
    tensor: torch.Tensor, bits: int, group_size: GroupSize, sym: bool, scale: torch.Tensor | None,
    zero_point: torch.Tensor | float | None, tensor_min: torch.Tensor | None, tensor_max: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    if scale is not None:
        given = torch.as_tensor(scale).to(tensor)
        zero: torch.Tensor | float = 0.0 if sym else torch.as_tensor(zero_point or 0).to(tensor)
        return fake_quantize(tensor, (given, zero), bits), given, zero
    if tensor_max is not None:
        high = torch.as_tensor(tensor_max).to(tensor)
        low = -high if tensor_min is None else torch.as_tensor(tensor_min).to(tensor)
        grid = activation_grid(low, high, bits, sym)
        return fake_quantize(tensor, grid, bits), *grid
    groups, columns = reshape_pad_tensor_by_group_size(tensor, group_size)
    with torch.no_grad():
        grid = activation_grid(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), bits, sym)
    values = fake_quantize(groups, grid, bits)
    return revert_tensor_by_pad(values, columns, tensor.shape), *grid


@register_dtype("act_int_sym")
def quant_activation_sym(
    tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    """Quantize and dequantize inputs, symmetric.

    Args:
        tensor: [..., in].
        bits: 2 to 8.
        group_size: -1 one scale a token; >0 one for that many of its values; 0 one for the tensor.
        scale: the scale to use, for static activations.
        tensor_min, tensor_max: known extremes, scalars; used when no scale is given.

    Returns:
        (fake-quantized tensor of the same shape and dtype, scale, zero point).
    """
    return _quantize(tensor, bits, group_size, True, scale, None, tensor_min, tensor_max)


@register_dtype("act_int_asym")
def quant_activation_asym(
    tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | float | None = None, tensor_min: torch.Tensor | None = None,
    tensor_max: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    """Quantize and dequantize inputs, asymmetric; as `quant_activation_sym`, with a zero point of the signed range."""
    return _quantize(tensor, bits, group_size, False, scale, zero_point, tensor_min, tensor_max)
