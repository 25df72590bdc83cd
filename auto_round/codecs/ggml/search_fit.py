"""Least-squares fits for the ggml search: step and minimum of each group, super-block scales d and dmin.

For fixed codes q the weighted error of `s q + m` is quadratic in s and m, and the least-squares pair reduces
`sum h x^2` by `s sum(h q x) + m sum(h x)`. So a candidate only proposes codes, and is evaluated at its own best pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from auto_round.codecs.ggml.types import GgmlType, code_limits, inverse_of, round_codes


def pairwise_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, whose size is a power of two; `values` is overwritten, and the result a view.

    By halves, because the order of `torch.sum` depends on strides and the number of threads, and a search that compares
    sums would not be reproducible.
    """
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = torch.add(values[:half], values[half:], out=values[:half])
    return values[0]


class Sums(NamedTuple):
    """Sums over each group of its codes q, [g, B] each: h q, h q^2, h q x."""

    q: torch.Tensor
    qq: torch.Tensor
    qx: torch.Tensor


class SearchChunk:
    """Blocks in columns, so that sums over a group are vectorized sums of long rows.

    Args:
        x: weights, float32 [n, g, B]: n weights in a group, g groups in a block, B blocks.
        h: importance, like `x`, or [n, g, 1] for all blocks.
        kind: the type. Codes are `low` to `high` here, minus their zero.
    """

    def __init__(self, x: torch.Tensor, h: torch.Tensor, kind: GgmlType) -> None:
        self.x, self.h, self.kind = x, h, kind
        self.low, self.high = code_limits(kind)
        self.hx = h * x
        self._t, self._q = torch.empty_like(x), torch.empty_like(x)
        self.sum_h, self.sum_hx = (pairwise_sum(self._t.copy_(part)).clone() for part in (h.expand_as(x), self.hx))
        self.sum_hxx = pairwise_sum(torch.mul(self.hx, x, out=self._t)).clone()

    def _round(self, step: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """Write weights in units of steps to `_t` and their codes to `_q`; returns the latter."""
        inverse = inverse_of(step)
        if minimum is None:
            torch.mul(self.x, inverse, out=self._t)
        else:
            torch.sub(self.x, minimum, out=self._t).mul_(inverse)
        return torch.round(self._t, out=self._q).clamp_(self.low, self.high)

    def error(self, step: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
        """[g, B]: sum over the group of h (step q + minimum - x)^2 at the nearest codes, for steps of any sign or
        zero."""
        wrong = self._round(step, minimum).sub_(self._t)
        found = pairwise_sum(torch.mul(wrong, wrong, out=self._t).mul_(self.h)) * step * step
        flat = self.sum_hxx
        if minimum is not None:
            flat = flat + minimum * (minimum * self.sum_h - 2 * self.sum_hx)
        return torch.where(step == 0, flat, found)

    def sums(self, step: torch.Tensor, minimum: torch.Tensor | None = None) -> Sums:
        """Sums of the nearest codes."""
        q = self._round(step, minimum)
        qx = pairwise_sum(torch.mul(q, self.hx, out=self._t)).clone()
        weighted = torch.mul(q, self.h, out=self._t)
        qq = pairwise_sum(q.mul_(weighted)).clone()
        return Sums(pairwise_sum(weighted).clone(), qq, qx)

    def codes(self, step: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 like `x`: the nearest stored codes, by the formula of `assign_codes`."""
        found = round_codes(self.x, inverse_of(step), minimum, None, (self.low, self.high))
        return found.add_(self.kind.zero).to(torch.uint8)


_TINY = 1e-30


def fit_steps(chunk: SearchChunk, candidates: Sequence[tuple[float, float]], refits: int) -> torch.Tensor:
    """Steps without minimum, [g, B]; zero where all weights are.

    Args:
        candidates: (factor, sign) on the step that maps the weight of largest magnitude to the lowest code. The other
            sign maps it to the highest one.
        refits: rounds of codes and least squares after the best candidate.
    """
    high, low = chunk.x.amax(0), chunk.x.amin(0)
    base = torch.where(high > -low, high, low) / chunk.low
    best, gain = base, torch.full_like(base, -1.0)
    for index in range(len(candidates) + refits):
        trial = base * (candidates[index][0] * candidates[index][1]) if index < len(candidates) else best
        sums = chunk.sums(trial)
        step = sums.qx / sums.qq.clamp(min=_TINY)
        found = step * sums.qx
        better = found > gain
        best, gain = torch.where(better, step, best), torch.where(better, found, gain)
    return best


def fit_steps_and_minima(
    chunk: SearchChunk, candidates: Sequence[tuple[float, float]], refits: int, above_zero: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(steps >= 0, minima), [g, B].

    Args:
        candidates: (width, start), as fractions of the group's range.
        refits: rounds of codes and least squares after the best candidate.
        above_zero: whether a minimum may be above zero.
    """
    bottom = chunk.x.amin(0)
    if not above_zero:
        bottom = bottom.clamp(max=0)
    span = chunk.x.amax(0) - bottom
    step, minimum = span / chunk.high, bottom
    gain = torch.full_like(bottom, -1.0)
    for index in range(len(candidates) + refits):
        if index < len(candidates):
            width, start = candidates[index]
            trial = span * (width / chunk.high), bottom + span * start
        else:
            trial = step, minimum
        s, m, found = _fit_both(chunk, chunk.sums(*trial), above_zero)
        better = found > gain
        step, minimum = torch.where(better, s, step), torch.where(better, m, minimum)
        gain = torch.where(better, found, gain)
    return step, minimum


def _fit_both(chunk: SearchChunk, sums: Sums, above_zero: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step, minimum and gain; the gain is -1 where the codes determine no positive step."""
    spread = chunk.sum_h * sums.qq - sums.q * sums.q
    over = spread.clamp(min=_TINY).reciprocal_()
    step = (chunk.sum_h * sums.qx - chunk.sum_hx * sums.q) * over
    minimum = (sums.qq * chunk.sum_hx - sums.q * sums.qx) * over
    if not above_zero:
        high = minimum > 0
        step = torch.where(high, sums.qx / sums.qq.clamp(min=_TINY), step)
        minimum = minimum.masked_fill_(high, 0.0)
    gain = step * sums.qx + minimum * chunk.sum_hx
    return step, minimum, torch.where((spread > 1e-5 * chunk.sum_h * sums.qq) & (step > 0), gain, -1.0)


def to_half(value: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to float16; Inf where they exceed it, which `encode_ggml` rejects."""
    return value.half().float()


def scale_limits(kind: GgmlType) -> tuple[int, int]:
    """Smallest and largest integer of a group's scale (and minimum)."""
    if kind.signed_scales:
        return -(1 << (kind.scale_bits - 1)), (1 << (kind.scale_bits - 1)) - 1
    return 0, (1 << kind.scale_bits) - 1


def over_groups(values: torch.Tensor) -> torch.Tensor:
    """[g, B] summed to [1, B]; `values` is overwritten."""
    return pairwise_sum(values).unsqueeze(0)


def choose_super_scale(
    values: torch.Tensor, weights: torch.Tensor, low: int, high: int, candidates: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The super-block scale d with the least `sum a (v - d k)^2` over the groups, among the candidates.

    Args:
        values: v, [g, B]; not negative where `low` is 0.
        weights: a, [g, B].
        low, high: limits of the integers k.
        candidates: factors on the d that maps the value of largest magnitude to the end of the integers' range.

    Returns:
        (d float32 [1, B], values of float16; k float32 [g, B]).
    """
    top, bottom = values.amax(0, keepdim=True), values.amin(0, keepdim=True)
    base = top / high if low == 0 else torch.where(top > -bottom, top, bottom) / low
    # All candidates at once, [g, candidates, B], because single ones are small.
    d = torch.stack([base * width for width in candidates], dim=1)
    v, a = values.unsqueeze(1), weights.unsqueeze(1)
    for _ in range(2):
        whole = _integers(v, d, low, high)
        part = a * whole
        d = over_groups(part * v) / over_groups(part.mul_(whole)).clamp(min=_TINY)
    d = to_half(d)
    whole = _integers(v, d, low, high)
    errors = over_groups((v - d * whole).square_().mul_(a))
    least, found, integers = errors[:, 0], d[:, 0], whole[:, 0]
    for index in range(1, len(candidates)):
        better = errors[:, index] < least
        least = torch.where(better, errors[:, index], least)
        found = torch.where(better, d[:, index], found)
        integers = torch.where(better, whole[:, index], integers)
    return found, integers


def _integers(values: torch.Tensor, d: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (values / torch.where(d == 0, 1 / _TINY, d)).round_().clamp_(low, high)


def refit_super_scales(
    chunk: SearchChunk, d: torch.Tensor, scales: torch.Tensor, dmin: torch.Tensor | None, mins: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and dmin with the least weighted error for given integers, rounded to float16.

    Args:
        d, dmin: float32 [1, B].
        scales, mins: float32 [g, B], ones where there are no sub-blocks.
    """
    if dmin is None or mins is None:
        sums = chunk.sums(d * scales)
        u, a = over_groups(scales * sums.qx), over_groups(scales * scales * sums.qq)
        return to_half(torch.where(a > _TINY, u / a.clamp(min=_TINY), d)), None
    sign = chunk.kind.min_sign
    sums = chunk.sums(d * scales, dmin * mins * sign)
    # The normal equations of sum h (d k q + e m - x)^2, with e = sign * dmin
    a = over_groups(scales * scales * sums.qq)
    b = over_groups(scales * mins * sums.q)
    c = over_groups(mins * mins * chunk.sum_h)
    u, v = over_groups(scales * sums.qx), over_groups(mins * chunk.sum_hx)
    spread = a * c - b * b
    inverse_determinant = spread.clamp(min=_TINY).reciprocal_()
    new_d, new_dmin = (u * c - b * v) * inverse_determinant, (a * v - b * u) * inverse_determinant * sign
    usable = (spread > 1e-5 * a * c) & (new_d > 0)
    if sign < 0:
        usable &= new_dmin >= 0
    return to_half(torch.where(usable, new_d, d)), to_half(torch.where(usable, new_dmin, dmin))
