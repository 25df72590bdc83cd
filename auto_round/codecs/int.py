"""Integer codec: scale and zero point of a group, codes, and fake quantization of weights and activations.

Weights: 2 to 8 bits. Symmetric types use the full range: the element of largest magnitude maps to -2**(bits-1), so a
scale may be negative and no code is lost (AutoRound, arXiv 2309.05516, section 3). Asymmetric types compute
`scale * (code - zero_point)`, with the range widened to hold zero. Scales are rounded to their stored dtype before any
code is chosen, so a reader of the file computes the same weights.

Activations: symmetric codes -2**(bits-1) .. 2**(bits-1)-1 use `scale = max |x| / ((2**bits - 1) / 2)`; asymmetric ones
`scale = (max - min) / (2**bits - 1)` and a zero point. They are computed in the dtype of the input, as Transformers
does with a compressed-tensors checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from auto_round.codecs.registry import (
    QuantFunc,
    register_dtype,
    reshape_pad_tensor_by_group_size,
    revert_tensor_by_pad,
    round_ste,
)
from auto_round.schemes import GroupSize


class QuantParams(NamedTuple):
    """Scale and zero point of each group: `scale` [..., 1] is float32 with values of the stored dtype, `zero` the code
    of 0.0."""

    scale: torch.Tensor
    zero: torch.Tensor | float
    bits: int
    scale_dtype: torch.dtype = torch.float16

    def select(self, rows: slice) -> QuantParams:
        """Those of some rows of groups."""
        zero = self.zero[rows] if isinstance(self.zero, torch.Tensor) else self.zero
        return self._replace(scale=self.scale[rows], zero=zero)


def concat_qparams(parts: list[QuantParams]) -> QuantParams:
    """Those of consecutive rows of groups as one."""
    zeros = [part.zero for part in parts if isinstance(part.zero, torch.Tensor)]
    zero = torch.cat(zeros) if zeros else parts[0].zero
    return parts[0]._replace(scale=torch.cat([part.scale for part in parts]), zero=zero)


def default_scale_threshold(scale_dtype: torch.dtype) -> float:
    """The smallest |scale| written: float16 kernels lose precision below 1e-5."""
    return 1e-8 if scale_dtype == torch.float32 else 1e-5


def round_to_stored(scale: torch.Tensor, scale_dtype: torch.dtype, threshold: float) -> torch.Tensor:
    """float32 scales as `scale_dtype` stores them: |scale| at least `threshold`, sign kept, no overflow to Inf."""
    largest = torch.finfo(scale_dtype).max
    scale = scale.clamp(-largest, largest)
    rounded = scale + (scale.to(scale_dtype).float() - scale).detach()
    floor = torch.tensor(threshold, dtype=scale_dtype).float()  # the threshold itself must be a stored value
    low = torch.where(rounded < 0, -floor, floor).to(rounded)
    return torch.where(rounded.abs() < floor.to(rounded), low + (rounded - rounded.detach()), rounded)


def integer_qparams(
    groups: torch.Tensor, bits: int, sym: bool, min_scale: torch.Tensor | float = 1.0,
    max_scale: torch.Tensor | float = 1.0, scale_dtype: torch.dtype = torch.float16, threshold: float | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None,
) -> QuantParams:  # fmt: skip
    """Scale and zero point of each group from its minimum (at most 0) and maximum (at least 0).

    Args:
        groups: [..., group_size], float32 or the weight's own dtype.
        sym: full range with the zero point 2**(bits-1); else integer zero points 0 .. 2**bits-1.
        min_scale, max_scale: factors on the group's extremes, broadcastable to [..., 1].
        threshold: smallest |scale|; None or 0 takes `default_scale_threshold`.
        tensor_min, tensor_max: known extremes, [..., 1].
    """
    low = groups.amin(-1, keepdim=True).clamp(max=0) if tensor_min is None else tensor_min
    high = groups.amax(-1, keepdim=True).clamp(min=0) if tensor_max is None else tensor_max
    low, high = low * min_scale, high * max_scale
    thresh = default_scale_threshold(scale_dtype) if threshold is None or threshold <= 0 else threshold
    if sym:
        # The side of larger magnitude takes -2**(bits-1); on a tie the positive side does.
        extreme = torch.where(high < -low, -low, -high)
        scale = round_to_stored((extreme / 2 ** (bits - 1)).float(), scale_dtype, thresh)
        return QuantParams(scale, float(2 ** (bits - 1)), bits, scale_dtype)
    top = 2**bits - 1
    # The range is computed in the dtype of `groups`: checkpoints of bfloat16 weights made elsewhere hold those scales.
    scale = round_to_stored(((high - low) / top).float(), scale_dtype, thresh)
    return QuantParams(scale, round_ste(-low / scale).clamp(0, top), bits, scale_dtype)


def to_codes(groups: torch.Tensor, qparams: QuantParams, v: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Stored codes 0 .. 2**bits-1, as float32: `clamp(round(groups / scale + v) + zero)`; `v` in units of one code."""
    codes = groups / qparams.scale
    if isinstance(v, torch.Tensor) or v:
        codes = codes + v
    return codes.round_().add_(qparams.zero).clamp_(0, 2**qparams.bits - 1)


def stored_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 codes 0 .. 2**bits-1 as uint8, through a signed type, whose conversion PyTorch vectorizes."""
    return codes.to(torch.int8).view(torch.uint8) if bits < 8 else codes.to(torch.int16).to(torch.uint8)


def round_groups(
    groups: torch.Tensor, bits: int, sym: bool, scale_dtype: torch.dtype
) -> tuple[QuantParams, torch.Tensor]:
    """`integer_qparams` and the codes, uint8 in the shape of `groups`.

    Extremes are found in float32, where PyTorch is six times faster than in bfloat16; the values are the same.
    """
    work = groups.to(torch.float32, copy=True)
    low = work.amin(-1, keepdim=True).clamp_(max=0).to(groups.dtype)
    high = work.amax(-1, keepdim=True).clamp_(min=0).to(groups.dtype)
    qparams = integer_qparams(groups, bits, sym, scale_dtype=scale_dtype, tensor_min=low, tensor_max=high)
    codes = work.div_(qparams.scale).round_().add_(qparams.zero).clamp_(0, 2**bits - 1)
    return qparams, stored_codes(codes, bits)


def from_codes(codes: torch.Tensor, qparams: QuantParams) -> torch.Tensor:
    """`scale * (codes - zero)`, the inverse of `to_codes`."""
    return (codes - qparams.zero) * qparams.scale


def _weight_function(sym: bool) -> QuantFunc:
    def quant_tensor_int(
        tensor: torch.Tensor, bits: int = 4, group_size: GroupSize = -1, v: torch.Tensor | float = 0.0,
        min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
        scale_dtype: torch.dtype = torch.float16, q_scale_thresh: float = 0.0, imatrix: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
        """Quantize and dequantize.

        Args:
            tensor: [out, in] (or any shape; the last dimension is grouped).
            bits: 2 to 8.
            v: added to `tensor` before rounding, in its units; same shape, or a number.
            min_scale, max_scale: factors on each group's minimum and maximum; a number or one value a group.
            q_scale_thresh: smallest |scale|; 0 takes 1e-5 (1e-8 for float32 scales).
            imatrix: unused here; the search that uses it is in `codecs.search`.
            **kwargs: `tensor_min`, `tensor_max`: known extremes, [groups, 1].

        Returns:
            (dequantized tensor of the same shape and dtype, scale float32 [out, groups], zero point: 2**(bits-1) when
            symmetric, else integers 0 .. 2**bits-1 in a tensor [out, groups]).
        """
        groups, columns = reshape_pad_tensor_by_group_size(tensor, group_size)
        padded_shape, blocks = groups.shape, isinstance(group_size, tuple)
        groups = groups.flatten(2) if blocks else groups  # one group a block

        def per_group(factor: torch.Tensor | float) -> torch.Tensor | float:
            if not isinstance(factor, torch.Tensor) or factor.dim() == 0:
                return factor
            return factor.reshape(-1, 1) if factor.numel() == 1 else factor.reshape(*groups.shape[:-1], 1)

        extremes = {key: kwargs.get(key) for key in ("tensor_min", "tensor_max")}
        qparams = integer_qparams(
            groups, bits, sym, per_group(min_scale), per_group(max_scale), scale_dtype, q_scale_thresh, **extremes
        )
        shifted = groups
        if isinstance(v, torch.Tensor):
            shift, _ = reshape_pad_tensor_by_group_size(v.float(), group_size)
            shifted = groups + shift.reshape(groups.shape)
        elif v:
            shifted = groups + v
        codes = (round_ste(shifted / qparams.scale) + qparams.zero).clamp(0, 2**bits - 1)
        qdq = from_codes(codes, qparams).reshape(padded_shape)
        scale, zero = qparams.scale.squeeze(-1), qparams.zero
        if not blocks:
            scale = scale.reshape(int(tensor.shape[0]) if tensor.dim() > 1 and group_size != 0 else 1, -1)
        if isinstance(zero, torch.Tensor):
            zero = zero.reshape(scale.shape)
        return revert_tensor_by_pad(qdq, columns, tensor.shape).to(tensor.dtype), scale, zero

    quant_tensor_int.__qualname__ = f"quant_tensor_int[{'sym' if sym else 'asym'}]"
    return quant_tensor_int


quant_tensor_sym = register_dtype("int_sym")(_weight_function(True))
register_dtype("int_asym")(_weight_function(False))

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
    return values + torch.where(inside, x - x.detach(), 0.0)  # adds zero, carries the gradient


def _activation_function(sym: bool) -> QuantFunc:
    def quant_activation_int(
        tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | float | None = None, tensor_min: torch.Tensor | None = None,
        tensor_max: torch.Tensor | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
        """Quantize and dequantize inputs [..., in] of 2 to 8 bits, on `scale` and `zero_point`, or on those of the
        extremes `tensor_min` and `tensor_max` (scalars), or on those of each token (`group_size` -1), group of a token
        or tensor (0).

        Returns:
            (fake-quantized tensor of the same shape and dtype, scale, zero point of the signed range).
        """
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

    quant_activation_int.__qualname__ = f"quant_activation_int[{'sym' if sym else 'asym'}]"
    return quant_activation_int


register_dtype("act_int_sym")(_activation_function(True))
register_dtype("act_int_asym")(_activation_function(False))
