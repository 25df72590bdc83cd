"""Importance-weighted search of scales (and zero points), for integer groups and for minifloat blocks.

Integers: for fixed codes q the weighted error `sum h (w - s q)^2` is least at `s = sum(h w q) / sum(h q^2)`,
where it is `sum(h w^2) - sum(h w q)^2 / sum(h q^2)` (least squares refit, as in ggml's quants and HQQ, arXiv
2309.15531). So a candidate scale only proposes codes and is judged at its own best scale: ten candidates do
what a plain grid of scales needs hundreds for.

Minifloats: a scale is one of few values (a power of two, an e4m3, a bfloat16), so the stored neighbours of the
plain scale are tried, and each block takes the one with the least error. All in float32, in chunks that stay in
cache.
"""

from __future__ import annotations

from itertools import groupby

import torch

from auto_round.codecs.block_float import BlockFloatSpec, effective_scale
from auto_round.codecs.int import QuantParams, default_scale_threshold, integer_qparams, round_to_stored
from auto_round.codecs.minifloat import MinifloatType, as_blocks, block_absmax, block_chunks, block_shape, block_sum
from auto_round.schemes import GroupSize

_CHUNK_ELEMENTS = 1 << 17  # float32 values in flight per buffer: a few buffers fit the last-level cache
_MAX_GPU_CHUNK = 1 << 24

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
    groups: torch.Tensor,
    bits: int,
    sym: bool,
    importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    threshold: float | None = None,
) -> QuantParams:
    """The grid of each group with the least importance-weighted squared error among the candidates.

    Args:
        groups: [rows, groups, group_size], any float dtype; searched in float32.
        bits: 2 to 8.
        sym: symmetric over the full range, or asymmetric with whole-number zero points.
        importance: [groups, group_size], >= 0: the second moment of each input channel; None weighs all alike.
        scale_dtype: scales are rounded to it before they are compared.
        threshold: smallest |scale|.

    Returns:
        QuantParams with scale [rows, groups, 1] (and zero of that shape when asymmetric). Never worse, in this error,
        than         the plain minimum/maximum grid.
    """
    rows, count, size = groups.shape
    weights = _normalized_importance(importance, groups)
    thresh = threshold or default_scale_threshold(scale_dtype)
    limit = _CHUNK_ELEMENTS if groups.device.type == "cpu" else _MAX_GPU_CHUNK
    step = max(1, limit // max(1, count * size))
    scales, zeros = [], []
    for start in range(0, rows, step):
        part = groups[start : start + step].float()
        search = _search_symmetric if sym else _search_asymmetric
        scale, zero = search(part, bits, weights, scale_dtype, thresh)
        scales.append(scale)
        zeros.append(zero)
    zero_point = float(2 ** (bits - 1)) if sym else torch.cat(zeros)
    return QuantParams(torch.cat(scales), zero_point, bits)


def _normalized_importance(importance: torch.Tensor | None, groups: torch.Tensor) -> torch.Tensor:
    """[1, groups, group_size] float32, mean one, never zero for a whole group: a channel that was never active in the
    calibration data still gets a small weight, so that its weights are not rounded at random."""
    _, count, size = groups.shape
    if importance is None:
        return torch.ones(1, count, size, device=groups.device)
    weights = importance.to(groups.device, torch.float32).reshape(1, count, size)
    mean = weights.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return torch.ones(1, count, size, device=groups.device)
    return weights / mean + 1e-4


def _search_symmetric(
    w: torch.Tensor, bits: int, h: torch.Tensor, scale_dtype: torch.dtype, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    base = integer_qparams(w, bits, True, scale_dtype=scale_dtype, threshold=threshold).scale
    hw = w * h
    buffer, square = torch.empty_like(w), torch.empty_like(w)

    def fit(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least-squares scale for the codes that `1/scale` proposes, and the error it takes away."""
        torch.mul(w, inverse, out=buffer)
        buffer.round_().clamp_(low, high)
        torch.mul(buffer, buffer, out=square)
        energy = square.mul_(h).sum(-1, keepdim=True)
        cross = buffer.mul_(hw).sum(-1, keepdim=True)
        scale = cross / energy.clamp(min=1e-30)
        return scale, cross * scale

    inverse = 1.0 / base
    best_scale, best_gain = fit(inverse)
    signs = (1.0, -1.0) if bits <= 4 else (1.0,)
    for factor in _FACTORS.get(bits, _FACTORS_MANY_BITS):
        for sign in signs:
            scale, gain = fit(inverse * (sign / factor))
            better = gain > best_gain
            best_scale = torch.where(better, scale, best_scale)
            best_gain = torch.where(better, gain, best_gain)
    stored = _safe_symmetric(best_scale, base, scale_dtype, threshold)
    best_stored, best_error = base, _error(w, h, base, low, high, buffer)
    for _ in range(_REFITS):  # the fit moves the rounding borders, which moves the fit
        error = _error(w, h, stored, low, high, buffer)
        better = error < best_error
        best_stored = torch.where(better, stored, best_stored)
        best_error = torch.where(better, error, best_error)
        scale, _ = fit(1.0 / stored)
        stored = _safe_symmetric(scale, base, scale_dtype, threshold)
    better = _error(w, h, stored, low, high, buffer) < best_error
    return torch.where(better, stored, best_stored), torch.empty(0)


def _safe_symmetric(
    scale: torch.Tensor, base: torch.Tensor, scale_dtype: torch.dtype, threshold: float
) -> torch.Tensor:
    scale = torch.where(torch.isfinite(scale) & (scale != 0), scale, base)
    return round_to_stored(scale, scale_dtype, threshold)


def _error(
    w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, low: int, high: int, buffer: torch.Tensor
) -> torch.Tensor:
    torch.div(w, scale, out=buffer)
    buffer.round_().clamp_(low, high).mul_(scale).sub_(w)
    return buffer.mul_(buffer).mul_(h).sum(-1, keepdim=True)


def _search_asymmetric(
    w: torch.Tensor, bits: int, h: torch.Tensor, scale_dtype: torch.dtype, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**bits - 1
    base = integer_qparams(w, bits, False, scale_dtype=scale_dtype, threshold=threshold)
    base_zero = base.zero
    assert isinstance(base_zero, torch.Tensor)
    hw = w * h
    buffer, square = torch.empty_like(w), torch.empty_like(w)

    def propose(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least-squares scale for the codes of (scale, zero), and the error it takes away."""
        torch.div(w, scale, out=buffer)
        buffer.round_()
        torch.maximum(torch.minimum(buffer, top - zero), -zero, out=buffer)
        torch.mul(buffer, buffer, out=square)
        energy = square.mul_(h).sum(-1, keepdim=True)
        cross = buffer.mul_(hw).sum(-1, keepdim=True)
        fitted = cross / energy.clamp(min=1e-30)
        return fitted, cross * fitted

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        torch.div(w, scale, out=buffer)
        buffer.round_()
        torch.maximum(torch.minimum(buffer, top - zero), -zero, out=buffer)
        buffer.mul_(scale).sub_(w)
        return buffer.mul_(buffer).mul_(h).sum(-1, keepdim=True)

    best_scale, best_gain = propose(base.scale, base_zero)
    best_zero = base_zero
    for factor in _FACTORS.get(bits, _FACTORS_MANY_BITS):
        for shift in (-1.0, 0.0, 1.0) if bits <= 4 else (0.0,):
            zero = (base_zero + shift).clamp(0, top)
            scale, gain = propose(base.scale * factor, zero)
            better = gain > best_gain
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best_gain = torch.where(better, gain, best_gain)
    stored = _safe_asymmetric(best_scale, base.scale, scale_dtype, threshold)
    best_stored, best_stored_zero, best_error = base.scale, base_zero, error(base.scale, base_zero)
    for _ in range(_REFITS + 1):
        trial = error(stored, best_zero)
        better = trial < best_error
        best_stored = torch.where(better, stored, best_stored)
        best_stored_zero = torch.where(better, best_zero, best_stored_zero)
        best_error = torch.where(better, trial, best_error)
        stored = _safe_asymmetric(propose(stored, best_zero)[0], base.scale, scale_dtype, threshold)
    return best_stored, best_stored_zero


def _safe_asymmetric(
    scale: torch.Tensor, base: torch.Tensor, scale_dtype: torch.dtype, threshold: float
) -> torch.Tensor:
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, base)
    return round_to_stored(scale, scale_dtype, threshold)


# Scale search for small floats, weighted by how much each input matters.
#
# A scale can only be one of few values (a power of two, an e4m3, a bfloat16), so the stored neighbours of the plain
# scale are tried as they are, and each tile takes the one with the least `sum h (w - W)^2`. In float32, in chunks
# that stay in cache.

_FLOAT_CHUNK = 1 << 16  # weights tried at a time: the buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 24


@torch.no_grad()
def search_scales(
    weight: torch.Tensor, family: BlockFloatSpec, group_size: GroupSize, importance: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The stored scale of each tile with the least importance-weighted squared error among the candidates.

    Args:
        weight: [out, in], any float dtype; searched in float32.
        group_size: see `QuantizationScheme`.
        importance: [in], >= 0: the second moment of each input channel; None weighs all alike.
        global_scale: float32 scalar, for types that have one.

    Returns:
        float32 [R, C] (see `data_type.blocks`). Never worse, in this error, than the type's own rule.
    """
    blocks = as_blocks(weight, group_size)
    shares = _block_importance(importance, weight, group_size)
    chunks = block_chunks(blocks, _FLOAT_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK)
    found = []
    for rows, parts in groupby(chunks, key=lambda piece: (piece[0].start, piece[0].stop)):
        inner = [blocks[slice(*rows), part[1]].float() for part in parts]
        largest = torch.stack([block_absmax(part) for part in inner]).amax(0)
        best = family.rule.scale(largest, global_scale)
        least = _block_error(inner, best, global_scale, shares, family.element)
        for scale in family.rule.candidates(best.clone()):
            error = _block_error(inner, scale, global_scale, shares, family.element)
            better = error < least
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
        found.append(best)
    scales = torch.cat(found)
    return scales.view(scales.shape[0], scales.shape[2])


def _block_error(
    parts: list[torch.Tensor], scale: torch.Tensor, global_scale: torch.Tensor | None, shares: torch.Tensor,
    element: MinifloatType,
) -> torch.Tensor:  # fmt: skip
    """[R, 1, C, 1]: the weighted squared error of tiles given in pieces of some rows each."""
    factor = effective_scale(scale, global_scale)
    total = torch.zeros_like(scale)
    for part in parts:
        difference = element.nearest(part / factor).mul_(factor).sub_(part)
        total += block_sum(difference.mul_(difference).mul_(shares))
    return total


def _block_importance(importance: torch.Tensor | None, weight: torch.Tensor, group_size: GroupSize) -> torch.Tensor:
    """[1, 1, C, N] float32 of mean one. A channel that was never active in the calibration data still gets a small
    share, so that its weights are not rounded at random."""
    _, _, c, n = block_shape((weight.shape[0], weight.shape[1]), group_size)
    ones = torch.ones(1, 1, c, n, device=weight.device)
    if importance is None:
        return ones
    given = importance.to(weight.device, torch.float32)
    mean = given.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return ones
    padded = torch.nn.functional.pad(given / mean + 1e-4, (0, c * n - given.shape[0]))
    return padded.view(1, 1, c, n)
