"""Importance-weighted search of scales (and zero points), for integer groups and for minifloat blocks.

Integers: for fixed codes q (minus the zero point) the weighted error `sum h (w - s q)^2` is least at
`s = sum(h w q) / sum(h q^2)`, where it is `sum(h w^2) - sum(h w q)^2 / sum(h q^2)` (least squares refit, as in ggml's
quants and HQQ, arXiv 2309.15531). So a candidate scale only proposes codes and is evaluated at its own best scale.

Minifloats: few scales can be stored, so each block tries the stored neighbours of the plain scale.
"""

from __future__ import annotations

from itertools import groupby

import torch

from auto_round.codecs.block_float import BlockFloatSpec, effective_scale
from auto_round.codecs.int import (
    QuantParams,
    concat_qparams,
    default_scale_threshold,
    integer_qparams,
    round_to_stored,
)
from auto_round.codecs.minifloat import as_blocks, block_absmax, block_chunks, block_sum
from auto_round.schemes import GroupSize

_CHUNK_ELEMENTS = 1 << 17  # float32 values per buffer: a few buffers fit the last-level cache
_FLOAT_CHUNK = 1 << 16
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
    groups: torch.Tensor, bits: int, sym: bool, importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantParams:  # fmt: skip
    """The scale and zero point of each group with the least importance-weighted squared error among the candidates.

    Args:
        groups: [rows, groups, group_size], any float dtype; searched in float32.
        sym: symmetric over the full range, or asymmetric with integer zero points.
        importance: [groups, group_size], >= 0: the second moment of each input channel; None weighs all alike.
        scale_dtype: scales are rounded to it before they are compared.

    Returns:
        Scales [rows, groups, 1], never worse, in this error, than the plain minimum/maximum scales.
    """
    rows, count, size = groups.shape
    ones = torch.ones(count * size, device=groups.device)
    weights = _normalized(ones if importance is None else importance.to(groups.device)).view(1, count, size)
    limit = _CHUNK_ELEMENTS if groups.device.type == "cpu" else _GPU_CHUNK
    step = max(1, limit // max(1, count * size))
    chunks = (groups[start : start + step].float() for start in range(0, rows, step))
    return concat_qparams([_search(chunk, bits, sym, weights, scale_dtype) for chunk in chunks])


def _normalized(importance: torch.Tensor) -> torch.Tensor:
    """float32 importance of mean one. A channel that was never active in the calibration data still gets a small
    weight, so that its weights are not rounded at random."""
    weights = importance.float()
    mean = weights.mean()
    return weights / mean + 1e-4 if torch.isfinite(mean) and mean > 0 else torch.ones_like(weights)


def _search(w: torch.Tensor, bits: int, sym: bool, h: torch.Tensor, scale_dtype: torch.dtype) -> QuantParams:
    """`search_qparams` for a chunk `w` [rows, groups, group_size] with normalized importance `h`."""
    base = integer_qparams(w, bits, sym, scale_dtype=scale_dtype)
    top, hw = 2**bits - 1, w * h
    codes, squares = torch.empty_like(w), torch.empty_like(w)

    def clamp_codes(zero: torch.Tensor | float) -> None:
        if isinstance(zero, torch.Tensor):
            torch.maximum(torch.minimum(codes.round_(), top - zero), -zero, out=codes)
        else:
            codes.round_().clamp_(-zero, top - zero)

    def fit(proposal: torch.Tensor, zero: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Least-squares scale for the codes of a proposal (1/scale when symmetric, else scale), and the error that it
        removes."""
        (torch.mul if sym else torch.div)(w, proposal, out=codes)
        clamp_codes(zero)
        energy = torch.mul(codes, codes, out=squares).mul_(h).sum(-1, keepdim=True)
        cross = codes.mul_(hw).sum(-1, keepdim=True)
        scale = cross / energy.clamp(min=1e-30)
        return scale, cross * scale

    def error(scale: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
        torch.div(w, scale, out=codes)
        clamp_codes(zero)
        codes.mul_(scale).sub_(w)
        return codes.mul_(codes).mul_(h).sum(-1, keepdim=True)

    def stored(scale: torch.Tensor) -> torch.Tensor:
        usable = torch.isfinite(scale) & (scale != 0 if sym else scale > 0)
        usual = default_scale_threshold(scale_dtype)
        return round_to_stored(torch.where(usable, scale, base.scale), scale_dtype, usual)

    def pick(better: torch.Tensor, new: torch.Tensor | float, old: torch.Tensor | float) -> torch.Tensor | float:
        return torch.where(better, new, old) if isinstance(old, torch.Tensor) else old

    start = 1.0 / base.scale if sym else base.scale
    best_zero = base.zero
    best_scale, best_gain = fit(start, best_zero)
    for factor in _FACTORS.get(bits, _FACTORS_MANY_BITS):
        # Symmetric: either sign of the scale. Asymmetric: neighbouring zero points.
        for shift in ((1.0, -1.0) if sym else (-1.0, 0.0, 1.0)) if bits <= 4 else ((1.0,) if sym else (0.0,)):
            proposal, zero = (start * (shift / factor) if sym else start * factor), base.zero
            if isinstance(zero, torch.Tensor):
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


@torch.no_grad()
def search_scales(
    weight: torch.Tensor, spec: BlockFloatSpec, group_size: GroupSize, importance: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The stored scale of each block with the least importance-weighted squared error among the candidates.

    Args:
        weight: [out, in], any float dtype; searched in float32.
        importance: [in], >= 0: the second moment of each input channel; None weighs all alike.
        global_scale: float32 scalar, for types that have one.

    Returns:
        float32 [R, C] (see `codecs.minifloat`). Never worse, in this error, than the type's own rule.
    """
    blocks = as_blocks(weight, group_size)
    _, _, c, n = blocks.shape
    given = torch.ones(weight.shape[1]) if importance is None else importance
    h = torch.nn.functional.pad(_normalized(given.to(weight.device)), (0, c * n - given.shape[0])).view(1, 1, c, n)
    chunks = block_chunks(blocks, _FLOAT_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK)
    found: list[torch.Tensor] = []

    def error(parts: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """[R, 1, C, 1]: the weighted squared error of blocks given in chunks of rows."""
        factor, total = effective_scale(scale, global_scale), torch.zeros_like(scale)
        for part in parts:
            difference = spec.element.nearest(part / factor).mul_(factor).sub_(part)
            total += block_sum(difference.mul_(difference).mul_(h))
        return total

    for rows, group in groupby(chunks, key=lambda chunk: (chunk[0].start, chunk[0].stop)):
        parts = [blocks[slice(*rows), part[1]].float() for part in group]
        best = spec.rule.scale(torch.stack([block_absmax(part) for part in parts]).amax(0), global_scale)
        least = error(parts, best)
        for scale in spec.rule.candidates(best.clone()):
            trial = error(parts, scale)
            better = trial < least
            best, least = torch.where(better, scale, best), torch.where(better, trial, least)
        found.append(best)
    scales = torch.cat(found)
    return scales.view(scales.shape[0], scales.shape[2])
