"""Scale (and zero point) search for integer rounding, weighted by how much each input matters.

For fixed codes q the weighted error `sum h (w - s q)^2` has its minimum at `s = sum(h w q) / sum(h q^2)`, and that
minimum is `sum(h w^2) - sum(h w q)^2 / sum(h q^2)` (ordinary least squares; Lin et al., "least squares refit" as in
ggml's quants and HQQ, arXiv 2309.15531). So a candidate scale only has to propose codes: each is judged at its own best
scale, and ten candidates do what a plain grid needs hundreds for. All in float32, in chunks that stay in cache.
"""

from __future__ import annotations

import torch

from auto_round.data_type.int import IntGrid, default_scale_threshold, integer_grid, round_to_stored

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


def search_grid(
    groups: torch.Tensor,
    bits: int,
    sym: bool,
    importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    threshold: float | None = None,
) -> IntGrid:
    """The grid of each group with the least importance-weighted squared error among the candidates.

    Args:
        groups: [rows, groups, group_size], any float dtype; searched in float32.
        bits: 2 to 8.
        sym: symmetric over the full range, or asymmetric with whole-number zero points.
        importance: [groups, group_size], >= 0: the second moment of each input channel; None weighs all alike.
        scale_dtype: scales are rounded to it before they are compared.
        threshold: smallest |scale|.

    Returns:
        IntGrid with scale [rows, groups, 1] (and zero of that shape when asymmetric). Never worse, in this error, than
        the plain minimum/maximum grid.
    """
    rows, count, size = groups.shape
    weights = _usable_importance(importance, groups)
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
    return IntGrid(torch.cat(scales), zero_point, bits)


def _usable_importance(importance: torch.Tensor | None, groups: torch.Tensor) -> torch.Tensor:
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
    base = integer_grid(w, bits, True, scale_dtype=scale_dtype, threshold=threshold).scale
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
    kept, kept_error = base, _error(w, h, base, low, high, buffer)
    for _ in range(_REFITS):  # the fit moves the rounding borders, which moves the fit
        error = _error(w, h, stored, low, high, buffer)
        better = error < kept_error
        kept = torch.where(better, stored, kept)
        kept_error = torch.where(better, error, kept_error)
        scale, _ = fit(1.0 / stored)
        stored = _safe_symmetric(scale, base, scale_dtype, threshold)
    better = _error(w, h, stored, low, high, buffer) < kept_error
    return torch.where(better, stored, kept), torch.empty(0)


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
    base = integer_grid(w, bits, False, scale_dtype=scale_dtype, threshold=threshold)
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
    kept, kept_zero, kept_error = base.scale, base_zero, error(base.scale, base_zero)
    for _ in range(_REFITS + 1):
        trial = error(stored, best_zero)
        better = trial < kept_error
        kept = torch.where(better, stored, kept)
        kept_zero = torch.where(better, best_zero, kept_zero)
        kept_error = torch.where(better, trial, kept_error)
        stored = _safe_asymmetric(propose(stored, best_zero)[0], base.scale, scale_dtype, threshold)
    return kept, kept_zero


def _safe_asymmetric(
    scale: torch.Tensor, base: torch.Tensor, scale_dtype: torch.dtype, threshold: float
) -> torch.Tensor:
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, base)
    return round_to_stored(scale, scale_dtype, threshold)
