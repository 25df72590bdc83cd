"""The best step and minimum of each group before they are stored, by weighted least squares.

For fixed codes q the weighted error of `s q + m` is quadratic in s and m, and the least-squares pair takes
`s sum(h q x) + m sum(h x)` away from `sum h x^2`. So a candidate only has to propose codes, and is judged at its own
best pair (ordinary least squares; `rtn/search.py` does the same for whole zero points).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from auto_round.data_type.gguf.search_piece import Piece, Sums

_TINY = 1e-30


def fit_steps(piece: Piece, candidates: Sequence[tuple[float, float]], refits: int) -> torch.Tensor:
    """Steps without minimum, [g, B]; zero where all weights are.

    Args:
        candidates: (factor, sign) on the step that maps the weight of largest magnitude to the lowest code. With the
            other sign it is the other end of the range that holds one code more.
        refits: rounds of codes and least squares after the best candidate.
    """
    high, low = piece.x.amax(0), piece.x.amin(0)
    base = torch.where(high > -low, high, low) / piece.low
    best, gain = base, torch.full_like(base, -1.0)
    for factor, sign in candidates:
        step, found = _least_squares(piece.sums(base * (factor * sign)))
        better = found > gain
        best, gain = torch.where(better, step, best), torch.where(better, found, gain)
    for _ in range(refits):
        step, found = _least_squares(piece.sums(best))
        best = torch.where(found > gain, step, best)
        gain = torch.maximum(found, gain)
    return best


def _least_squares(sums: Sums) -> tuple[torch.Tensor, torch.Tensor]:
    step = sums.qx / sums.qq.clamp(min=_TINY)
    return step, step * sums.qx


def fit_steps_and_minima(
    piece: Piece, candidates: Sequence[tuple[float, float]], refits: int, above_zero: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(steps >= 0, minima), [g, B].

    Args:
        candidates: (width, start) of the grid, as parts of the group's range (which holds zero).
        refits: rounds of codes and least squares after the best candidate.
        above_zero: whether a minimum may be above zero.
    """
    bottom = piece.x.amin(0)
    if not above_zero:
        bottom = bottom.clamp(max=0)
    span = piece.x.amax(0) - bottom
    step, minimum = span / piece.high, bottom
    gain = torch.full_like(bottom, -1.0)
    for index in range(len(candidates) + refits):
        if index < len(candidates):
            width, start = candidates[index]
            trial = span * (width / piece.high), bottom + span * start
        else:
            trial = step, minimum
        s, m, found = _fit_both(piece, piece.sums(*trial), above_zero)
        better = found > gain
        step, minimum = torch.where(better, s, step), torch.where(better, m, minimum)
        gain = torch.where(better, found, gain)
    return step, minimum


def _fit_both(piece: Piece, sums: Sums, above_zero: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step, minimum and gain; the gain is -1 where codes do not determine a positive step."""
    spread = piece.sum_h * sums.qq - sums.q * sums.q
    over = spread.clamp(min=_TINY).reciprocal_()
    step = (piece.sum_h * sums.qx - piece.sum_hx * sums.q) * over
    minimum = (sums.qq * piece.sum_hx - sums.q * sums.qx) * over
    if not above_zero:
        high = minimum > 0
        step = torch.where(high, sums.qx / sums.qq.clamp(min=_TINY), step)
        minimum = minimum.masked_fill_(high, 0.0)
    gain = step * sums.qx + minimum * piece.sum_hx
    return step, minimum, torch.where((spread > 1e-5 * piece.sum_h * sums.qq) & (step > 0), gain, -1.0)
