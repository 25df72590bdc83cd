"""Importance-weighted search for ggml types: integer scales and minima, super-block scales, codes.

It minimizes `sum h (w - W)^2`, with W the dequantized weight and h the second moment of its input channel, in three
parts:

1. the best step and minimum of each group, as real numbers. For fixed codes q the error of `s q + m` is quadratic in s
   and m, and the least-squares pair reduces it by `s sum(h q x) + m sum(h x)`: a candidate only proposes codes, and is
   evaluated at its own best pair;
2. the super-block scales d and dmin, and with them the integers;
3. perturbations of the integers, kept where the *stored* values give a smaller error with new codes; then a refit of d
   and dmin, and the perturbations once more. This part gains most, because integers of 4 or 6 bits are coarse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType, code_limits, inverse_of, round_codes
from auto_round.threads import parallel_map

Pair = tuple[float, float]
_TINY = 1e-30
_WIDTHS = (1.1, 1.05, 1.0, 0.97, 0.94, 0.9)  # candidates of d and dmin, as fractions of the integers' range
_CHUNK = 3 << 17  # weights searched at once: the few buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 23


class SearchConfig(NamedTuple):
    """Candidates of one type."""

    # Initial ranges of a group: (width, start) as fractions of its range; without minimum a width, signed as the step.
    starts: tuple[Pair, ...]
    perturbations: tuple[tuple[Pair, ...], ...]  # for each round, arguments of `StoredParams.perturbed`
    refits: int = 2  # rounds of least squares after the best start


def _alone(*values: float) -> tuple[Pair, ...]:
    """Values of a type without minimum, which has no second ones."""
    return tuple((value, 0.0) for value in values)


_TWO_BITS = ((0.8, 0.1), (0.8, 0.2), (0.8, 0), (0.5, 0.3), (1.05, 0), (0.55, 0.15), (0.75, 0.3), (0.65, 0))
_FOUR_BITS = (
    (0.96, 0.02), (1.02, 0.02), (0.96, 0), (0.96, 0.04), (1.06, -0.04), (1.06, -0.02), (0.88, 0.06), (0.94, 0),
)  # fmt: skip
_FIVE_BITS = ((1, 0), (1.04, 0), (0.98, 0), (0.98, 0.02), (1.06, 0), (1.06, -0.02), (1.02, 0), (0.96, 0.02))

# Without sub-blocks, as fractions of a step.
_SHIFTS = (
    ((0, 1), (-0.75, 0), (-0.75, 0.25), (1, -0.25), (1, 1), (1.5, -0.5), (-0.25, 0), (-1.25, -0.25), (0.5, 0)),
    ((0, 1), (-0.25, 0), (1.5, -0.5), (0.25, 0), (-0.75, 0.75), (1.5, -0.25), (-1, 0.5), (-1.5, -0.25), (0.5, 1)),
)  # fmt: skip
# With sub-blocks, in integers.
_MOVES_2 = (
    ((0, -1), (-1, 0), (1, 0), (0, 1), (-1, -1), (1, 1)),
    ((-1, -1), (1, 1), (-1, -2), (1, 0), (1, 2), (-1, 0), (0, -1), (0, 1)),
)  # fmt: skip
_MOVES_4 = (
    ((0, -1), (-1, -1), (-1, 0), (1, 1), (1, 0), (-2, -3), (0, -4), (-3, -2), (3, 4), (4, 0)),
    ((-1, -1), (1, 1), (-2, -3), (0, -4), (4, 0), (-3, -2), (3, 4), (-2, -4), (0, -1), (-1, 0), (3, 3), (0, 1)),
)  # fmt: skip
_MOVES_5 = (
    ((-1, 0), (1, 0), (-1, -1), (1, 1), (3, 3), (2, 1), (-2, -1), (3, -1), (0, 3), (2, 0)),
    ((3, 3), (4, 3), (3, 4), (0, 3), (0, -3), (-1, -1), (2, 1), (1, 1), (-2, -1), (4, 1), (-2, 1), (0, 2), (1, 0)),
)  # fmt: skip

SEARCH_CONFIGS: Mapping[str, SearchConfig] = MappingProxyType({
    "Q4_0": SearchConfig(
        _alone(0.98, 0.86, 1.14, 0.74, 1.06, 0.94, -0.94, -0.66), (_alone(1.375, 1, 0.5, 0.25, -0.25),)
    ),
    "Q5_0": SearchConfig(
        _alone(0.99, 1.06, 0.92, 1.02, 0.96, 0.88, -0.99),
        (_alone(1.25, 0.75, 1.5, -1.5, 0.375, 1), _alone(1.5, 1.25, 0.25, -1.5)),
    ),
    "Q8_0": SearchConfig(
        _alone(1), (_alone(1.125, 1.5, 0.75, -0.5, -1, -0.25), _alone(1.5, 1.125, 0.375, -1.5)), refits=0
    ),
    "Q4_1": SearchConfig(_FOUR_BITS, _SHIFTS), "Q5_1": SearchConfig(_FIVE_BITS, _SHIFTS),
    "Q2_K": SearchConfig(_TWO_BITS, _MOVES_2),
    "Q3_K": SearchConfig(
        _alone(0.95, 0.7, 1.2, 1.05, 0.85, 0.55, -0.9, -0.65),
        (_alone(-5, 6, 3, -3, 8, -7), _alone(8, -7, -10, 6, -1, 1)),
    ),
    "Q4_K": SearchConfig(_FOUR_BITS, _MOVES_4), "Q5_K": SearchConfig(_FIVE_BITS, _MOVES_5),
    "Q6_K": SearchConfig(
        _alone(1, 1.05, 1.03, 0.97, 1.06, 1.01, 0.99, -1.04),
        (_alone(-6, 7, -4, 4, -9, 10, 3, -3), _alone(-8, 8, -6, 10, -10, 6, -5, 5, 3, -3)),
    ),
})  # fmt: skip


def pairwise_sum(values: Tensor) -> Tensor:
    """The sum over the first dimension, a power of two, by halves, in a fixed order; `values` is overwritten."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = torch.add(values[:half], values[half:], out=values[:half])
    return values[0]


def over_groups(values: Tensor) -> Tensor:
    """[g, B] summed to [1, B]; `values` is overwritten."""
    return pairwise_sum(values).unsqueeze(0)


def to_half(value: Tensor) -> Tensor:
    """float32 values rounded to float16; Inf where they exceed it, which is refused when the layer is stored."""
    return value.half().float()


def scale_limits(kind: GgmlType) -> tuple[int, int]:
    """Smallest and largest integer of a group's scale (and minimum)."""
    half = 1 << (kind.scale_bits - 1)
    return (-half, half - 1) if kind.signed_scales else (0, 2 * half - 1)


class Sums(NamedTuple):
    """Sums over each group of its codes q, [g, B] each: h q, h q^2, h q x."""

    q: Tensor
    qq: Tensor
    qx: Tensor


class SearchChunk:
    """Weights `x` float32 [n, g, B], n in a group, g groups in a block and B blocks, so that sums over a group are
    vectorized sums of long rows; `h` is their importance, like `x`, or [n, g, 1] for all blocks."""

    def __init__(self, x: Tensor, h: Tensor, kind: GgmlType) -> None:
        self.x, self.h, self.kind = x, h, kind
        self.low, self.high = code_limits(kind)
        self.hx = h * x
        self._t, self._q = torch.empty_like(x), torch.empty_like(x)
        self.sum_h, self.sum_hx = (pairwise_sum(self._t.copy_(part)).clone() for part in (h.expand_as(x), self.hx))
        self.sum_hxx = pairwise_sum(torch.mul(self.hx, x, out=self._t)).clone()

    def _round(self, step: Tensor, minimum: Tensor | None) -> Tensor:
        """Write weights in units of steps to `_t` and their codes to `_q`; returns the latter."""
        inverse = inverse_of(step)
        if minimum is None:
            torch.mul(self.x, inverse, out=self._t)
        else:
            torch.sub(self.x, minimum, out=self._t).mul_(inverse)
        return torch.round(self._t, out=self._q).clamp_(self.low, self.high)

    def error(self, step: Tensor, minimum: Tensor | None = None) -> Tensor:
        """[g, B]: sum over the group of h (step q + minimum - x)^2 at the nearest codes; steps may be zero."""
        wrong = self._round(step, minimum).sub_(self._t)
        found = pairwise_sum(torch.mul(wrong, wrong, out=self._t).mul_(self.h)) * step * step
        flat = self.sum_hxx
        if minimum is not None:
            flat = flat + minimum * (minimum * self.sum_h - 2 * self.sum_hx)
        return torch.where(step == 0, flat, found)

    def sums(self, step: Tensor, minimum: Tensor | None = None) -> Sums:
        q = self._round(step, minimum)
        qx = pairwise_sum(torch.mul(q, self.hx, out=self._t)).clone()
        weighted = torch.mul(q, self.h, out=self._t)
        qq = pairwise_sum(q.mul_(weighted)).clone()
        return Sums(pairwise_sum(weighted).clone(), qq, qx)


def fit_steps(chunk: SearchChunk, config: SearchConfig) -> Tensor:
    """Steps without minimum, [g, B], from factors on that which maps the largest magnitude to the lowest code."""
    high, low = chunk.x.amax(0), chunk.x.amin(0)
    base = torch.where(high > -low, high, low) / chunk.low
    best, gain = base, torch.full_like(base, -1.0)
    for index in range(len(config.starts) + config.refits):
        trial = base * config.starts[index][0] if index < len(config.starts) else best
        sums = chunk.sums(trial)
        step = sums.qx / sums.qq.clamp(min=_TINY)
        found = step * sums.qx
        better = found > gain
        best, gain = torch.where(better, step, best), torch.where(better, found, gain)
    return best


def fit_steps_and_minima(chunk: SearchChunk, config: SearchConfig) -> tuple[Tensor, Tensor]:
    """(steps >= 0, minima), [g, B]. In K types no minimum is above zero."""
    bottom, above_zero = chunk.x.amin(0), chunk.kind.min_sign > 0
    if not above_zero:
        bottom = bottom.clamp(max=0)
    span = chunk.x.amax(0) - bottom
    best, least, gain = span / chunk.high, bottom, torch.full_like(bottom, -1.0)
    for index in range(len(config.starts) + config.refits):
        trial = best, least
        if index < len(config.starts):
            width, start = config.starts[index]
            trial = span * (width / chunk.high), bottom + span * start
        sums = chunk.sums(*trial)
        spread = chunk.sum_h * sums.qq - sums.q * sums.q
        over = spread.clamp(min=_TINY).reciprocal_()
        step = (chunk.sum_h * sums.qx - chunk.sum_hx * sums.q) * over
        minimum = (sums.qq * chunk.sum_hx - sums.q * sums.qx) * over
        if not above_zero:
            high = minimum > 0
            step = torch.where(high, sums.qx / sums.qq.clamp(min=_TINY), step)
            minimum = minimum.masked_fill_(high, 0.0)
        # Without a gain where the codes determine no positive step.
        usable = (spread > 1e-5 * chunk.sum_h * sums.qq) & (step > 0)
        found = torch.where(usable, step * sums.qx + minimum * chunk.sum_hx, -1.0)
        better = found > gain
        best, least = torch.where(better, step, best), torch.where(better, minimum, least)
        gain = torch.where(better, found, gain)
    return best, least


def choose_super_scale(values: Tensor, weights: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """(d, k): the scale float16 in float32 [1, B] with the least `sum a (v - d k)^2` over the groups, among `_WIDTHS`,
    and its integers float32 [g, B] from `low` to `high`. `values`: v, not negative where `low` is 0; `weights`: a."""
    top, bottom = values.amax(0, keepdim=True), values.amin(0, keepdim=True)
    base = top / high if low == 0 else torch.where(top > -bottom, top, bottom) / low
    # All candidates at once, [g, candidates, B], because single ones are small.
    d = torch.stack([base * width for width in _WIDTHS], dim=1)
    v, a = values.unsqueeze(1), weights.unsqueeze(1)
    integers = lambda d: (v / torch.where(d == 0, 1 / _TINY, d)).round_().clamp_(low, high)  # noqa: E731
    for _ in range(2):
        whole = integers(d)
        part = a * whole
        d = over_groups(part * v) / over_groups(part.mul_(whole)).clamp(min=_TINY)
    d = to_half(d)
    whole = integers(d)
    errors = over_groups((v - d * whole).square_().mul_(a))
    least, found, chosen = errors[:, 0], d[:, 0], whole[:, 0]
    for index in range(1, len(_WIDTHS)):
        better = errors[:, index] < least
        least = torch.where(better, errors[:, index], least)
        found, chosen = torch.where(better, d[:, index], found), torch.where(better, whole[:, index], chosen)
    return found, chosen


@dataclass(frozen=True)
class StoredParams:
    """Scales and integers as stored, in float32: d and dmin [1, B], scales and mins [g, B], ones without sub-blocks."""

    kind: GgmlType
    d: Tensor
    scales: Tensor
    dmin: Tensor | None
    mins: Tensor | None

    def step_and_minimum(self) -> tuple[Tensor, Tensor | None]:
        """The groups' steps and minima, [g, B], as readers compute them."""
        step = self.d * self.scales
        if self.dmin is None or self.mins is None:
            return step, None
        return step, self.dmin * self.mins * self.kind.min_sign

    def perturbed(self, perturbation: Pair) -> StoredParams:
        """Neighbours: integers of scale and minimum moved, or without sub-blocks the range widened and shifted."""
        kind = self.kind
        if kind.is_k:
            low, high = scale_limits(kind)
            mins = None if self.mins is None else (self.mins + perturbation[1]).clamp_(0, high)
            return replace(self, scales=(self.scales + perturbation[0]).clamp_(low, high), mins=mins)
        if self.dmin is None:
            return replace(self, d=to_half(self.d * (1 + perturbation[0] / kind.zero)))
        dmin = to_half(self.dmin + self.d * (perturbation[1] - perturbation[0] / 2))
        return replace(self, d=to_half(self.d * (1 + perturbation[0] / (kind.codes - 1))), dmin=dmin)

    def refitted(self, chunk: SearchChunk) -> StoredParams:
        """With the d and dmin of the least weighted error for these integers, rounded to float16."""
        d, scales, dmin, mins = self.d, self.scales, self.dmin, self.mins
        sums = chunk.sums(*self.step_and_minimum())
        a, u = over_groups(scales * scales * sums.qq), over_groups(scales * sums.qx)
        if dmin is None or mins is None:
            return replace(self, d=to_half(torch.where(a > _TINY, u / a.clamp(min=_TINY), d)))
        # The normal equations of sum h (d k q + e m - x)^2, with e = sign * dmin
        sign, b = self.kind.min_sign, over_groups(scales * mins * sums.q)
        c, v = over_groups(mins * mins * chunk.sum_h), over_groups(mins * chunk.sum_hx)
        spread = a * c - b * b
        inverse_determinant = spread.clamp(min=_TINY).reciprocal_()
        new_d, new_dmin = (u * c - b * v) * inverse_determinant, (a * v - b * u) * inverse_determinant * sign
        usable = (spread > 1e-5 * a * c) & (new_d > 0)
        if sign < 0:
            usable &= new_dmin >= 0
        new_d, new_dmin = torch.where(usable, new_d, d), torch.where(usable, new_dmin, dmin)
        return replace(self, d=to_half(new_d), dmin=to_half(new_dmin))

    def zeros(self) -> StoredParams:
        """Parameters that make all weights zero: the groups' integers, or without sub-blocks d and dmin, are zero."""
        empty = lambda t: None if t is None else torch.zeros_like(t)  # noqa: E731
        if self.kind.is_k:
            return replace(self, scales=torch.zeros_like(self.scales), mins=empty(self.mins))
        return replace(self, d=torch.zeros_like(self.d), dmin=empty(self.dmin))

    def where(self, better: Tensor, other: StoredParams) -> StoredParams:
        """`other` where `better` ([g, B], or [1, B] when d and dmin differ) is true, else this."""
        pick = lambda new, old: new if new is old else torch.where(better, new, old)  # noqa: E731
        d, scales = pick(other.d, self.d), pick(other.scales, self.scales)
        return StoredParams(self.kind, d, scales, pick(other.dmin, self.dmin), pick(other.mins, self.mins))

    def store(self, blocks: GgmlBlocks, rows: slice, cols: slice) -> None:
        """Write the values to a slice of `blocks`; B enumerates the block columns, and in each the rows."""
        out, columns = blocks.codes.shape
        for name in ("d", "scales", "dmin", "mins"):
            value, target = getattr(self, name), getattr(blocks, name)
            if target is not None:
                part = target.view(out, columns // self.kind.block, -1)[rows, cols]
                part.copy_(value.view(value.shape[0], part.shape[1], part.shape[0]).permute(2, 1, 0))


@torch.no_grad()
def search_blocks(
    weight: Tensor, name: str, importance: Tensor | None = None, quick: bool = False, codes: bool = True
) -> GgmlBlocks:
    """Blocks of a matrix [out, in] in the ggml type `name` with a small squared error, weighted by `importance` [in].
    For NaN or Inf weights d is not finite or the codes are arbitrary; callers check. `quick`: a fifth of the time,
    enough for GPTQ, whose gain is far larger; without `codes` these are left uninitialized."""
    kind, config = GGML_TYPES[name], SEARCH_CONFIGS[name]
    config = SearchConfig(config.starts[:4], (), refits=1) if quick else config
    out, columns = weight.shape
    assert columns % kind.block == 0, f"{columns} columns do not fill blocks of {kind.block}"
    count, per = columns // kind.block, kind.block // kind.group
    blocks = GgmlBlocks.empty(kind, out, columns, weight.device)
    grouped = weight.view(out, count, per, kind.group)
    # Of mean one. A channel that was never active in the calibration data still counts a little, so that its weights
    # are not rounded at random.
    ones = torch.ones(columns, device=weight.device)
    given = ones if importance is None else importance.to(weight.device, torch.float32)
    mean = given.double().mean().float()
    shares = given / mean if torch.isfinite(mean) and mean > 0 else ones
    weights = (shares + 1e-4).view(count, per, kind.group)
    block_codes = blocks.codes.view(grouped.shape)

    def search(chunk_slices: tuple[slice, slice]) -> None:
        rows, cols = chunk_slices
        part = grouped[rows, cols]
        shape = part.shape[:2]
        x = part.permute(3, 2, 1, 0).float().contiguous().view(kind.group, per, -1)
        h = weights[cols].permute(2, 1, 0).unsqueeze(-1)
        # The same for all rows; chunks of several block columns need it expanded.
        h = h.squeeze(-1) if shape[1] == 1 else h.expand(-1, -1, -1, shape[0]).reshape(x.shape)
        found = _search(SearchChunk(x, h, kind), config)
        if codes:
            step, minimum = found.step_and_minimum()
            nearest = round_codes(x, inverse_of(step), minimum, None, kind)
            block_codes[rows, cols] = nearest.view(kind.group, per, shape[1], shape[0]).permute(3, 2, 1, 0)
        found.store(blocks, rows, cols)

    chunk_weights = _CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    parallel_map(search, list(_chunks(out, count, max(1, chunk_weights // kind.block))), weight.device)
    return blocks


def _chunks(out: int, count: int, blocks: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that are searched together: one block column, or several if rows are few."""
    columns = max(1, min(count, blocks // out))
    some = -(-out // -(-out // blocks))  # equal parts, without a small remainder
    for c in range(0, count, columns):
        for r in range(0, out, some):
            yield slice(r, min(r + some, out)), slice(c, min(c + columns, count))


def _search(chunk: SearchChunk, config: SearchConfig) -> StoredParams:
    found = _start(chunk, config)
    least = chunk.error(*found.step_and_minimum())
    for index, perturbations in enumerate(config.perturbations):
        if index:  # refit d and dmin to the integers and codes, where that reduces a block's error
            trial = found.refitted(chunk)
            error = chunk.error(*trial.step_and_minimum())
            better = over_groups(error.clone()) < over_groups(least.clone())
            found, least = found.where(better, trial), torch.where(better, error, least)
        origin = found
        for perturbation in perturbations:
            trial = origin.perturbed(perturbation)
            error = chunk.error(*trial.step_and_minimum())
            better = error < least
            found, least = found.where(better, trial), torch.where(better, error, least)
    # Weights too small for a float16 d, or a group with few important weights.
    return found.where(chunk.sum_hxx < least, found.zeros())


def _start(chunk: SearchChunk, config: SearchConfig) -> StoredParams:
    """Stored parameters close to the groups' best steps and minima."""
    kind, minimum = chunk.kind, None
    if kind.has_min:
        step, minimum = fit_steps_and_minima(chunk, config)
    else:
        step = fit_steps(chunk, config)
    if not kind.is_k:
        one = torch.ones_like(step)
        return StoredParams(kind, to_half(step), one, None if minimum is None else to_half(minimum), one)
    limits = scale_limits(kind)
    d, scales = choose_super_scale(step, chunk.sums(step, minimum).qq, *limits)
    if minimum is None:
        return StoredParams(kind, d, scales, None, None)
    return StoredParams(kind, d, scales, *choose_super_scale(-minimum, chunk.sum_h, *limits))
