"""Integer codec: scale and zero point of a group, codes, and fake quantization of weights and activations.

Symmetric weights use the full range: the element of largest magnitude maps to -2**(bits-1), so a scale may be negative
and no code is lost (AutoRound, arXiv 2309.05516, section 3). Scales are rounded to their stored dtype before any code
is chosen. Activations are computed in the dtype of the input, as Transformers does with compressed-tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from auto_round.codecs.registry import (
    QuantFunc,
    normalized_importance,
    register_dtype,
    reshape_pad_tensor_by_group_size,
    revert_tensor_by_pad,
    round_ste,
)
from auto_round.schemes import GroupSize


class QuantParams(NamedTuple):
    """Scale and zero point of each group."""

    scale: Tensor  # float32 [..., 1] with values of the stored dtype
    zero: Tensor | float  # the code of 0.0
    bits: int
    scale_dtype: torch.dtype = torch.float16

    def select(self, rows: slice) -> QuantParams:
        zero = self.zero[rows] if isinstance(self.zero, Tensor) else self.zero
        return self._replace(scale=self.scale[rows], zero=zero)


def concat_qparams(parts: list[QuantParams]) -> QuantParams:
    """Those of consecutive rows of groups as one."""
    zeros = [part.zero for part in parts if isinstance(part.zero, Tensor)]
    zero = torch.cat(zeros) if zeros else parts[0].zero
    return parts[0]._replace(scale=torch.cat([part.scale for part in parts]), zero=zero)


def default_scale_threshold(scale_dtype: torch.dtype) -> float:
    """The smallest |scale| written: float16 kernels lose precision below 1e-5."""
    return 1e-8 if scale_dtype == torch.float32 else 1e-5


def round_to_stored(scale: Tensor, scale_dtype: torch.dtype, threshold: float) -> Tensor:
    """float32 scales as `scale_dtype` stores them: |scale| at least `threshold`, sign kept, no overflow to Inf."""
    largest = torch.finfo(scale_dtype).max
    scale = scale.clamp(-largest, largest)
    rounded = scale + (scale.to(scale_dtype).float() - scale).detach()
    floor = torch.tensor(threshold, dtype=scale_dtype).float()  # the threshold itself must be a stored value
    low = torch.where(rounded < 0, -floor, floor).to(rounded)
    return torch.where(rounded.abs() < floor.to(rounded), low + (rounded - rounded.detach()), rounded)


def integer_qparams(
    groups: Tensor, bits: int, sym: bool, min_scale: Tensor | float = 1.0, max_scale: Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float16, threshold: float | None = None, tensor_min: Tensor | None = None,
    tensor_max: Tensor | None = None,
) -> QuantParams:  # fmt: skip
    """Scale and zero point of each group [..., group_size] from its minimum (at most 0) and maximum (at least 0), or
    from known ones [..., 1], times `min_scale` and `max_scale`. `sym`: the full range with the zero point 2**(bits-1),
    else integer zero points 0 .. 2**bits-1; `threshold`: smallest |scale|, None or 0 for the usual one."""
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


def to_codes(groups: Tensor, qparams: QuantParams, v: Tensor | float = 0.0) -> Tensor:
    """Stored codes 0 .. 2**bits-1, as float32: `clamp(round(groups / scale + v) + zero)`; `v` in units of one code."""
    codes = groups / qparams.scale
    if isinstance(v, Tensor) or v:
        codes = codes + v
    return codes.round_().add_(qparams.zero).clamp_(0, 2**qparams.bits - 1)


def stored_codes(codes: Tensor, bits: int) -> Tensor:
    """float32 codes 0 .. 2**bits-1 as uint8, through a signed type, whose conversion PyTorch vectorizes."""
    return codes.to(torch.int8).view(torch.uint8) if bits < 8 else codes.to(torch.int16).to(torch.uint8)


def round_groups(groups: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype) -> tuple[QuantParams, Tensor]:
    """`integer_qparams` and the codes, uint8 in the shape of `groups`."""
    # PyTorch finds extremes six times faster in float32 than in bfloat16; the values are the same.
    work = groups.to(torch.float32, copy=True)
    low = work.amin(-1, keepdim=True).clamp_(max=0).to(groups.dtype)
    high = work.amax(-1, keepdim=True).clamp_(min=0).to(groups.dtype)
    qparams = integer_qparams(groups, bits, sym, scale_dtype=scale_dtype, tensor_min=low, tensor_max=high)
    codes = work.div_(qparams.scale).round_().add_(qparams.zero).clamp_(0, 2**bits - 1)
    return qparams, stored_codes(codes, bits)


def from_codes(codes: Tensor, qparams: QuantParams) -> Tensor:
    """`scale * (codes - zero)`, the inverse of `to_codes`."""
    return (codes - qparams.zero) * qparams.scale


# The importance-weighted search of scales. For fixed codes q (minus the zero point) the error `sum h (w - s q)^2` is
# least at `s = sum(h w q) / sum(h q^2)`, where it is `sum(h w^2) - sum(h w q)^2 / sum(h q^2)` (least squares refit, as
# in HQQ, arXiv 2309.15531). So a candidate only proposes codes, and is evaluated at its own best scale.

_CHUNK_ELEMENTS = 1 << 17  # float32 values per buffer: a few buffers fit the last-level cache
_GPU_CHUNK = 1 << 24

# Candidate widths, as factors on the scale that maps the extreme to the end of the range. Few bits gain from clipping
# the extreme (factor < 1); with many bits the best factor lies close to 1. Measured on SmolLM2-135M, see bench/results.
_FACTORS: dict[int, tuple[float, ...]] = {
    2: (0.45, 0.55, 0.65, 0.75, 0.85, 1.0, 1.2),
    3: (0.6, 0.68, 0.76, 0.84, 0.92, 1.0, 1.1),
    4: (0.5, 0.58, 0.66, 0.74, 0.82, 0.9, 0.98, 1.06),
}
_FACTORS_MANY_BITS = (0.94, 0.96, 0.98, 0.99, 1.0, 1.01)
_REFITS = 2


def search_qparams(
    groups: Tensor, bits: int, sym: bool, importance: Tensor | None = None, scale_dtype: torch.dtype = torch.float16
) -> QuantParams:
    """Scales [rows, groups, 1] and zero points of groups [rows, groups, group_size] with the least squared error,
    weighted by `importance` [groups, group_size], among the candidates and the plain ones, as `scale_dtype` stores
    them."""
    rows, count, size = groups.shape
    ones = torch.ones(count * size, device=groups.device)
    weights = normalized_importance(ones if importance is None else importance.to(groups.device)).view(1, count, size)
    limit = _CHUNK_ELEMENTS if groups.device.type == "cpu" else _GPU_CHUNK
    step = max(1, limit // max(1, count * size))
    chunks = (groups[start : start + step].float() for start in range(0, rows, step))
    return concat_qparams([_search(chunk, bits, sym, weights, scale_dtype) for chunk in chunks])


def _search(w: Tensor, bits: int, sym: bool, h: Tensor, scale_dtype: torch.dtype) -> QuantParams:
    """`search_qparams` for a chunk `w` [rows, groups, group_size] with normalized importance `h`."""
    base = integer_qparams(w, bits, sym, scale_dtype=scale_dtype)
    top, hw = 2**bits - 1, w * h
    codes, squares = torch.empty_like(w), torch.empty_like(w)

    def clamp_codes(zero: Tensor | float) -> None:
        if isinstance(zero, Tensor):
            torch.maximum(torch.minimum(codes.round_(), top - zero), -zero, out=codes)
        else:
            codes.round_().clamp_(-zero, top - zero)

    def fit(proposal: Tensor, zero: Tensor | float) -> tuple[Tensor, Tensor]:
        """Least-squares scale for the codes of a proposal (1/scale when symmetric), and the error that it removes."""
        (torch.mul if sym else torch.div)(w, proposal, out=codes)
        clamp_codes(zero)
        energy = torch.mul(codes, codes, out=squares).mul_(h).sum(-1, keepdim=True)
        cross = codes.mul_(hw).sum(-1, keepdim=True)
        scale = cross / energy.clamp(min=1e-30)
        return scale, cross * scale

    def error(scale: Tensor, zero: Tensor | float) -> Tensor:
        torch.div(w, scale, out=codes)
        clamp_codes(zero)
        codes.mul_(scale).sub_(w)
        return codes.mul_(codes).mul_(h).sum(-1, keepdim=True)

    def stored(scale: Tensor) -> Tensor:
        usable = torch.isfinite(scale) & (scale != 0 if sym else scale > 0)
        usual = default_scale_threshold(scale_dtype)
        return round_to_stored(torch.where(usable, scale, base.scale), scale_dtype, usual)

    def pick(better: Tensor, new: Tensor | float, old: Tensor | float) -> Tensor | float:
        return torch.where(better, new, old) if isinstance(old, Tensor) else old

    start = 1.0 / base.scale if sym else base.scale
    best_zero = base.zero
    best_scale, best_gain = fit(start, best_zero)
    for factor in _FACTORS.get(bits, _FACTORS_MANY_BITS):
        # Symmetric: either sign of the scale. Asymmetric: neighbouring zero points.
        for shift in ((1.0, -1.0) if sym else (-1.0, 0.0, 1.0)) if bits <= 4 else ((1.0,) if sym else (0.0,)):
            proposal, zero = (start * (shift / factor) if sym else start * factor), base.zero
            if isinstance(zero, Tensor):
                zero = (zero + shift).clamp(0, top)
            scale, gain = fit(proposal, zero)
            better = gain > best_gain
            best_scale, best_gain = torch.where(better, scale, best_scale), torch.where(better, gain, best_gain)
            best_zero = pick(better, zero, best_zero)
    trial, kept, kept_zero, least = stored(best_scale), base.scale, base.zero, error(base.scale, base.zero)
    for refit in range(_REFITS + 1):
        if refit:  # the fit moves the rounding borders, which moves the fit
            trial = stored(fit(1.0 / trial if sym else trial, best_zero)[0])
        found = error(trial, best_zero)
        better = found < least
        kept, least = torch.where(better, trial, kept), torch.where(better, found, least)
        kept_zero = pick(better, best_zero, kept_zero)
    return QuantParams(kept, kept_zero, bits, scale_dtype)


def _weight_function(sym: bool) -> QuantFunc:
    def quant_tensor_int(
        tensor: Tensor, bits: int = 4, group_size: GroupSize = -1, v: Tensor | float = 0.0,
        min_scale: Tensor | float = 1.0, max_scale: Tensor | float = 1.0, scale_dtype: torch.dtype = torch.float16,
        q_scale_thresh: float = 0.0, imatrix: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
        """Quantize and dequantize a tensor [out, in] (or any shape; the last dimension is grouped) with 2 to 8 bits;
        returns (values like `tensor`, scale float32 [out, groups], zero point: a number when symmetric, else integers
        [out, groups]). `kwargs` may give `tensor_min` and `tensor_max`, known extremes [groups, 1]."""
        groups, columns = reshape_pad_tensor_by_group_size(tensor, group_size)
        padded_shape, blocks = groups.shape, isinstance(group_size, tuple)
        groups = groups.flatten(2) if blocks else groups  # one group a block

        def per_group(factor: Tensor | float) -> Tensor | float:
            if not isinstance(factor, Tensor) or factor.dim() == 0:
                return factor
            return factor.reshape(-1, 1) if factor.numel() == 1 else factor.reshape(*groups.shape[:-1], 1)

        extremes = {key: kwargs.get(key) for key in ("tensor_min", "tensor_max")}
        qparams = integer_qparams(
            groups, bits, sym, per_group(min_scale), per_group(max_scale), scale_dtype, q_scale_thresh, **extremes
        )
        if isinstance(v, Tensor):
            v = reshape_pad_tensor_by_group_size(v.float(), group_size)[0].reshape(groups.shape)
        shifted = groups + v if isinstance(v, Tensor) or v else groups
        codes = (round_ste(shifted / qparams.scale) + qparams.zero).clamp(0, 2**bits - 1)
        qdq = from_codes(codes, qparams).reshape(padded_shape)
        scale, zero = qparams.scale.squeeze(-1), qparams.zero
        if not blocks:
            scale = scale.reshape(int(tensor.shape[0]) if tensor.dim() > 1 and group_size != 0 else 1, -1)
        if isinstance(zero, Tensor):
            zero = zero.reshape(scale.shape)
        return revert_tensor_by_pad(qdq, columns, tensor.shape).to(tensor.dtype), scale, zero

    quant_tensor_int.__qualname__ = f"quant_tensor_int[{'sym' if sym else 'asym'}]"
    return quant_tensor_int


quant_tensor_sym = register_dtype("int_sym")(_weight_function(True))
register_dtype("int_asym")(_weight_function(False))

ActivationQParams = tuple[Tensor, Tensor | float]


def activation_qparams(low: Tensor, high: Tensor, bits: int, sym: bool) -> ActivationQParams:
    """(scale, zero point in the signed range) for inputs from `low` to `high`, in their dtype."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = 2**bits - 1
    scale = torch.maximum(-low, high) / (steps / 2) if sym else (high - low) / steps
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    if sym:
        return scale, 0.0
    bottom = -(2 ** (bits - 1))
    return scale, (bottom - low / scale).clamp(bottom, bottom + steps).round()


def fake_quantize(x: Tensor, qparams: ActivationQParams, bits: int) -> Tensor:
    """`scale * (clamp(round(x / scale + zero)) - zero)`; the gradient is one inside the range and zero outside."""
    scale, zero = qparams
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        scaled = x / scale + zero if isinstance(zero, Tensor) else x / scale
        codes = scaled.clamp(bottom, top).round_()
        if isinstance(zero, Tensor):
            codes = codes - zero
        values = codes * scale
    if not (torch.is_grad_enabled() and x.requires_grad):
        return values
    inside = (scaled > bottom - 1) & (scaled < top + 1)
    return values + torch.where(inside, x - x.detach(), 0.0)  # adds zero, carries the gradient


def _activation_function(sym: bool) -> QuantFunc:
    def quant_activation_int(
        tensor: Tensor, bits: int = 8, group_size: GroupSize = -1, scale: Tensor | None = None,
        zero_point: Tensor | float | None = None, tensor_min: Tensor | None = None, tensor_max: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
        """Quantize and dequantize inputs [..., in] of 2 to 8 bits, on `scale` and `zero_point`, or on those of the
        extremes `tensor_min` and `tensor_max` (scalars), or on those of each token (`group_size` -1), group of a token
        or tensor (0). The zero point is a code of the signed range."""
        if scale is not None:
            static_scale = torch.as_tensor(scale).to(tensor)
            zero: Tensor | float = 0.0 if sym else torch.as_tensor(zero_point or 0).to(tensor)
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
