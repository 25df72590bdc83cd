"""Integer codec: scale and zero point of a group, codes, and fake quantization of weights and activations.

Weights: 2 to 8 bits. Symmetric types use the full range: the element of largest magnitude maps to -2**(bits-1),
so a scale may be negative and no code is lost (AutoRound, arXiv 2309.05516, section 3). Asymmetric types
compute `scale * (code - zero_point)`, with the range widened to hold zero. Scales are rounded to their stored
dtype before any code is chosen, so a reader of the file computes the same weights.

Activations: one scale per token, per group of a token, or per tensor. Symmetric codes -2**(bits-1) ..
2**(bits-1)-1 use `scale = max |x| / ((2**bits - 1) / 2)`; asymmetric ones use `scale = (max - min) / (2**bits -
1)` and a zero point. They are computed in the dtype of the input, as Transformers does with a
compressed-tensors checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from auto_round.codecs.registry import register_dtype, reshape_pad_tensor_by_group_size, revert_tensor_by_pad, round_ste
from auto_round.schemes import GroupSize

FP16_MAX = 65504.0


class QuantParams(NamedTuple):
    """A group's grid. `scale` is float32 holding values of the stored dtype, [..., 1]; `zero` is the code of 0.0."""

    scale: torch.Tensor
    zero: torch.Tensor | float
    bits: int


def default_scale_threshold(scale_dtype: torch.dtype) -> float:
    """The smallest |scale| written: below 1e-5 float16 kernels lose it."""
    return 1e-8 if scale_dtype == torch.float32 else 1e-5


def round_to_stored(scale: torch.Tensor, scale_dtype: torch.dtype, threshold: float) -> torch.Tensor:
    """float32 scales as `scale_dtype` stores them: |scale| at least `threshold`, sign kept, no overflow to Inf."""
    largest = torch.finfo(scale_dtype).max
    scale = scale.clamp(-largest, largest)
    rounded = scale + (scale.to(scale_dtype).float() - scale).detach()
    floor = torch.tensor(threshold, dtype=scale_dtype).float()  # the threshold itself must be a stored value
    low = torch.where(rounded < 0, -floor, floor).to(rounded)
    return torch.where(rounded.abs() < floor.to(rounded), low + (rounded - rounded.detach()), rounded)


def symmetric_qparams(
    groups: torch.Tensor, bits: int, min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float16, threshold: float | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None,
) -> QuantParams:  # fmt: skip
    """The full-range grid of each group.

    Args:
        groups: [..., group_size], float32 or the weight's own dtype.
        min_scale, max_scale: factors on the group's extremes, broadcastable to [..., 1].
        tensor_min, tensor_max: the extremes, [..., 1], when they are known already.
    """
    low = groups.amin(-1, keepdim=True).clamp(max=0) if tensor_min is None else tensor_min
    high = groups.amax(-1, keepdim=True).clamp(min=0) if tensor_max is None else tensor_max
    low, high = low * min_scale, high * max_scale
    # The side of larger magnitude takes -2**(bits-1); on a tie the positive side does.
    extreme = torch.where(high < -low, -low, -high)
    thresh = default_scale_threshold(scale_dtype) if threshold is None or threshold <= 0 else threshold
    scale = round_to_stored((extreme / 2 ** (bits - 1)).float(), scale_dtype, thresh)
    return QuantParams(scale, float(2 ** (bits - 1)), bits)


def asymmetric_qparams(
    groups: torch.Tensor, bits: int, min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float16, threshold: float | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None,
) -> QuantParams:  # fmt: skip
    """The grid from the group's minimum (at most 0) to its maximum (at least 0), with a whole-number zero point."""
    low = groups.amin(-1, keepdim=True).clamp(max=0) if tensor_min is None else tensor_min
    high = groups.amax(-1, keepdim=True).clamp(min=0) if tensor_max is None else tensor_max
    low, high = low * min_scale, high * max_scale
    top = 2**bits - 1
    thresh = default_scale_threshold(scale_dtype) if threshold is None or threshold <= 0 else threshold
    # The range is taken in the dtype of `groups`: checkpoints made from bfloat16 weights elsewhere hold those scales.
    scale = round_to_stored(((high - low) / top).float(), scale_dtype, thresh)
    zero = round_ste(-low / scale).clamp(0, top)
    return QuantParams(scale, zero, bits)


def integer_qparams(groups: torch.Tensor, bits: int, sym: bool, **kwargs: Any) -> QuantParams:
    """`symmetric_qparams` or `asymmetric_qparams`."""
    return symmetric_qparams(groups, bits, **kwargs) if sym else asymmetric_qparams(groups, bits, **kwargs)


def to_codes(groups: torch.Tensor, qparams: QuantParams, v: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Stored codes 0 .. 2**bits-1, as float32: `clamp(round(groups / scale + v) + zero)`; `v` in units of one code."""
    codes = groups / qparams.scale
    if isinstance(v, torch.Tensor) or v:
        codes = codes + v
    return codes.round_().add_(qparams.zero).clamp_(0, 2**qparams.bits - 1)


def stored_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 codes 0 .. 2**bits-1 as uint8. By way of a signed type: PyTorch has vector instructions for that."""
    return codes.to(torch.int8).view(torch.uint8) if bits < 8 else codes.to(torch.int16).to(torch.uint8)


def round_groups(groups: torch.Tensor, bits: int, sym: bool, **kwargs: Any) -> tuple[QuantParams, torch.Tensor]:
    """`integer_qparams(groups, ...)` and the codes on it, uint8 in the shape of `groups`, in one go.

    Extremes are found in float32, which PyTorch is six times faster at than in bfloat16; they are the same numbers.
    """
    work = groups.to(torch.float32, copy=True)
    low = work.amin(-1, keepdim=True).clamp_(max=0).to(groups.dtype)
    high = work.amax(-1, keepdim=True).clamp_(min=0).to(groups.dtype)
    qparams = integer_qparams(groups, bits, sym, tensor_min=low, tensor_max=high, **kwargs)
    codes = work.div_(qparams.scale).round_().add_(qparams.zero).clamp_(0, 2**bits - 1)
    return qparams, stored_codes(codes, bits)


def from_codes(codes: torch.Tensor, qparams: QuantParams) -> torch.Tensor:
    """`scale * (codes - zero)`."""
    return (codes - qparams.zero) * qparams.scale


def _fake_quantize_weight(
    tensor: torch.Tensor, bits: int, group_size: GroupSize, sym: bool, v: torch.Tensor | float,
    min_scale: torch.Tensor | float, max_scale: torch.Tensor | float, scale_dtype: torch.dtype, q_scale_thresh: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    groups, columns = reshape_pad_tensor_by_group_size(tensor, group_size)
    if groups.dim() == 4:  # two-dimensional blocks: one group a block
        shape4 = groups.shape
        groups = groups.reshape(shape4[0], shape4[1], -1)
    qparams = integer_qparams(
        groups, bits, sym, min_scale=_per_group(min_scale, groups), max_scale=_per_group(max_scale, groups),
        scale_dtype=scale_dtype,
        threshold=q_scale_thresh, tensor_min=kwargs.get("tensor_min"), tensor_max=kwargs.get("tensor_max"),
    )  # fmt: skip
    shifted = groups
    if isinstance(v, torch.Tensor):
        shift, _ = reshape_pad_tensor_by_group_size(v.float(), group_size)
        shifted = groups + shift.reshape(groups.shape)
    elif v:
        shifted = groups + v
    codes = (round_ste(shifted / qparams.scale) + qparams.zero).clamp(0, 2**bits - 1)
    qdq = from_codes(codes, qparams)
    if isinstance(group_size, tuple):
        qdq = qdq.reshape(shape4)
    qdq = revert_tensor_by_pad(qdq, columns, tensor.shape).to(tensor.dtype)
    rows = int(tensor.shape[0]) if tensor.dim() > 1 and group_size != 0 and not isinstance(group_size, tuple) else 1
    scale = qparams.scale.reshape(rows, -1) if not isinstance(group_size, tuple) else qparams.scale.squeeze(-1)
    zero = qparams.zero.reshape(scale.shape) if isinstance(qparams.zero, torch.Tensor) else qparams.zero
    return qdq, scale, zero


def _per_group(factor: torch.Tensor | float, groups: torch.Tensor) -> torch.Tensor | float:
    """A factor with one value a group, shaped so that it broadcasts over the group's weights."""
    if not isinstance(factor, torch.Tensor) or factor.dim() == 0:
        return factor
    return factor.reshape(-1, 1) if factor.numel() == 1 else factor.reshape(*groups.shape[:-1], 1)


@register_dtype("int_sym")
def quant_tensor_sym(
    tensor: torch.Tensor, bits: int = 4, group_size: GroupSize = -1, v: torch.Tensor | float = 0.0,
    min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float16, q_scale_thresh: float = 0.0, imatrix: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    """Quantize and dequantize, symmetric over the full range.

    Args:
        tensor: [out, in] (or any shape; the last dimension is grouped).
        bits: 2 to 8.
        group_size: see `QuantizationScheme`.
        v: added to `tensor` before rounding, in its units; same shape, or a number.
        min_scale, max_scale: factors on each group's minimum and maximum; a number or one value a group.
        scale_dtype: the dtype in which scales are stored.
        q_scale_thresh: smallest |scale|; 0 takes 1e-5 (1e-8 for float32 scales).
        imatrix: unused here; the search that uses it is in `algorithms.quantization.rtn`.
        **kwargs: `tensor_min`, `tensor_max`: known extremes, [groups, 1].

    Returns:
        (dequantized tensor of the same shape and dtype, scale float32 [out, groups], zero point 2**(bits-1)).
    """
    return _fake_quantize_weight(
        tensor, bits, group_size, True, v, min_scale, max_scale, scale_dtype, q_scale_thresh, **kwargs
    )


@register_dtype("int_asym")
def quant_tensor_asym(
    tensor: torch.Tensor, bits: int = 4, group_size: GroupSize = -1, v: torch.Tensor | float = 0.0,
    min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float16, q_scale_thresh: float = 0.0, imatrix: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    """Quantize and dequantize, asymmetric. Arguments and results as for `quant_tensor_sym`; the zero point is a tensor
    [out, groups] of whole numbers 0 .. 2**bits-1."""
    return _fake_quantize_weight(
        tensor, bits, group_size, False, v, min_scale, max_scale, scale_dtype, q_scale_thresh, **kwargs
    )


# Integer activations: one scale a token, a group of a token, or for all inputs of a layer.
#
# Symmetric codes -2**(bits-1) .. 2**(bits-1)-1 at `scale = max |x| / ((2**bits - 1) / 2)`; asymmetric codes of the same
# range at `scale = (max - min) / (2**bits - 1)`, with a zero point. Everything is computed in the dtype of the input,
# as Transformers does with a compressed-tensors checkpoint, so that what is tuned is what will run there.

ActivationQParams = tuple[torch.Tensor, torch.Tensor | float]


def activation_qparams(low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool) -> ActivationQParams:
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


def fake_quantize(x: torch.Tensor, qparams: ActivationQParams, bits: int) -> torch.Tensor:
    """`scale * (clamp(round(x / scale + zero)) - zero)`; the gradient is one inside the range and zero outside."""
    scale, zero = qparams
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        scaled = x / scale + zero if isinstance(zero, torch.Tensor) else x / scale
        codes = scaled.clamp(bottom, top).round_()
        if isinstance(zero, torch.Tensor):
            codes = codes - zero
        values = codes * scale
    if not (torch.is_grad_enabled() and x.requires_grad):
        return values
    inside = (scaled > bottom - 1) & (scaled < top + 1)
    return values + torch.where(inside, x - x.detach(), 0.0)  # adds zero, and carries the gradient


def _fake_quantize_activation(
    tensor: torch.Tensor, bits: int, group_size: GroupSize, sym: bool, scale: torch.Tensor | None,
    zero_point: torch.Tensor | float | None, tensor_min: torch.Tensor | None, tensor_max: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    if scale is not None:
        static_scale = torch.as_tensor(scale).to(tensor)
        zero: torch.Tensor | float = 0.0 if sym else torch.as_tensor(zero_point or 0).to(tensor)
        return fake_quantize(tensor, (static_scale, zero), bits), static_scale, zero
    if tensor_max is not None:
        high = torch.as_tensor(tensor_max).to(tensor)
        low = -high if tensor_min is None else torch.as_tensor(tensor_min).to(tensor)
        qparams = activation_qparams(low, high, bits, sym)
        return fake_quantize(tensor, qparams, bits), *qparams
    groups, columns = reshape_pad_tensor_by_group_size(tensor, group_size)
    with torch.no_grad():
        qparams = activation_qparams(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), bits, sym)
    values = fake_quantize(groups, qparams, bits)
    return revert_tensor_by_pad(values, columns, tensor.shape), *qparams


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
    return _fake_quantize_activation(tensor, bits, group_size, True, scale, None, tensor_min, tensor_max)


@register_dtype("act_int_asym")
def quant_activation_asym(
    tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | float | None = None, tensor_min: torch.Tensor | None = None,
    tensor_max: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    """Quantize and dequantize inputs, asymmetric; as `quant_activation_sym`, with a zero point of the signed range."""
    return _fake_quantize_activation(tensor, bits, group_size, False, scale, zero_point, tensor_min, tensor_max)
