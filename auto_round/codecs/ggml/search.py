"""Importance-weighted search for ggml types: integer scales and minima, super-block scales, codes.

It minimizes `sum h (w - W)^2` over all weights, where W is the dequantized weight and h the second moment of the
weight's input channel, in three parts:

1. the best step and minimum of each group, as real numbers (`search_fit.py`);
2. the super-block scales d and dmin, and with them the integers;
3. perturbations of the integers, kept where the *stored* values give a smaller error with new codes; then a refit of d
   and dmin, and the perturbations once more. This part gains most, because integers of 4 or 6 bits are coarse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from auto_round.codecs.ggml.search_fit import (
    SearchChunk,
    choose_super_scale,
    fit_steps,
    fit_steps_and_minima,
    over_groups,
    refit_super_scales,
    scale_limits,
    to_half,
)
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType
from auto_round.threads import parallel_map

Pair = tuple[float, float]


@dataclass(frozen=True)
class SearchConfig:
    """Candidates of one type.

    Attributes:
        starts: initial ranges of a group: (width, start) as fractions of its range; without minimum (width, sign of the
            step).
        refits: rounds of least squares after the best of them.
        perturbations: for each round, arguments of `StoredParams.perturbed`; without minimum the second is unused.
    """

    starts: tuple[Pair, ...]
    refits: int
    perturbations: tuple[tuple[Pair, ...], ...]


def _candidates(*widths: float, mirrored: tuple[float, ...] = ()) -> tuple[Pair, ...]:
    return tuple((width, 1.0) for width in widths) + tuple((width, -1.0) for width in mirrored)


def _scale_perturbations(*perturbations: float) -> tuple[Pair, ...]:
    return tuple((change, 0.0) for change in perturbations)


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
        _candidates(0.98, 0.86, 1.14, 0.74, 1.06, 0.94, mirrored=(0.94, 0.66)), 2,
        (_scale_perturbations(1.375, 1, 0.5, 0.25, -0.25),),
    ),
    "Q5_0": SearchConfig(
        _candidates(0.99, 1.06, 0.92, 1.02, 0.96, 0.88, mirrored=(0.99,)), 2,
        (_scale_perturbations(1.25, 0.75, 1.5, -1.5, 0.375, 1), _scale_perturbations(1.5, 1.25, 0.25, -1.5)),
    ),
    "Q8_0": SearchConfig(
        _candidates(1), 0,
        (_scale_perturbations(1.125, 1.5, 0.75, -0.5, -1, -0.25), _scale_perturbations(1.5, 1.125, 0.375, -1.5)),
    ),
    "Q4_1": SearchConfig(_FOUR_BITS, 2, _SHIFTS),
    "Q5_1": SearchConfig(_FIVE_BITS, 2, _SHIFTS),
    "Q2_K": SearchConfig(_TWO_BITS, 2, _MOVES_2),
    "Q3_K": SearchConfig(
        _candidates(0.95, 0.7, 1.2, 1.05, 0.85, 0.55, mirrored=(0.9, 0.65)), 2,
        (_scale_perturbations(-5, 6, 3, -3, 8, -7), _scale_perturbations(8, -7, -10, 6, -1, 1)),
    ),
    "Q4_K": SearchConfig(_FOUR_BITS, 2, _MOVES_4),
    "Q5_K": SearchConfig(_FIVE_BITS, 2, _MOVES_5),
    "Q6_K": SearchConfig(
        _candidates(1, 1.05, 1.03, 0.97, 1.06, 1.01, 0.99, mirrored=(1.04,)), 2,
        (
            _scale_perturbations(-6, 7, -4, 4, -9, 10, 3, -3),
            _scale_perturbations(-8, 8, -6, 10, -10, 6, -5, 5, 3, -3),
        ),
    ),
})  # fmt: skip

# For GPTQ, whose gain makes that of the rest irrelevant.
QUICK_SEARCH_CONFIGS: Mapping[str, SearchConfig] = MappingProxyType(
    {name: SearchConfig(config.starts[:4], 1, ()) for name, config in SEARCH_CONFIGS.items()}
)


@dataclass(frozen=True)
class StoredParams:
    """Super-block scales and integers of a chunk under search, as float32 that the stored types hold exactly.

    Attributes:
        d, dmin: [1, B]; dmin None without minima.
        scales, mins: [g, B]; ones where the type has no sub-blocks.
    """

    kind: GgmlType
    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None
    mins: torch.Tensor | None

    def step_and_minimum(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The groups' steps and minima, [g, B], as readers compute them."""
        step = self.d * self.scales
        if self.dmin is None or self.mins is None:
            return step, None
        return step, self.dmin * self.mins * self.kind.min_sign

    def perturbed(self, perturbation: tuple[float, float]) -> StoredParams:
        """Neighbouring values: adds to the integers of scale and minimum. Without sub-blocks, as fractions of a step:
        widens the range around its middle, and shifts it."""
        kind = self.kind
        if kind.is_k:
            low, high = scale_limits(kind)
            mins = None if self.mins is None else (self.mins + perturbation[1]).clamp_(0, high)
            return replace(self, scales=(self.scales + perturbation[0]).clamp_(low, high), mins=mins)
        if self.dmin is None:
            return replace(self, d=to_half(self.d * (1 + perturbation[0] / kind.zero)))
        return replace(
            self,
            d=to_half(self.d * (1 + perturbation[0] / (kind.codes - 1))),
            dmin=to_half(self.dmin + self.d * (perturbation[1] - perturbation[0] / 2)),
        )

    def zeros(self) -> StoredParams:
        """Parameters that make all weights zero: the groups' integers, or without sub-blocks d and dmin, are zero."""
        empty = lambda t: None if t is None else torch.zeros_like(t)  # noqa: E731
        if self.kind.is_k:
            return replace(self, scales=torch.zeros_like(self.scales), mins=empty(self.mins))
        return replace(self, d=torch.zeros_like(self.d), dmin=empty(self.dmin))

    def where(self, better: torch.Tensor, other: StoredParams) -> StoredParams:
        """`other` where `better` ([g, B], or [1, B] when d and dmin differ) is true, else this."""
        pick = lambda new, old: new if new is old else torch.where(better, new, old)  # noqa: E731
        dmin = None if self.dmin is None or other.dmin is None else pick(other.dmin, self.dmin)
        mins = None if self.mins is None or other.mins is None else pick(other.mins, self.mins)
        return StoredParams(self.kind, pick(other.d, self.d), pick(other.scales, self.scales), dmin, mins)

    def store(self, blocks: GgmlBlocks, rows: slice, cols: slice) -> None:
        """Write the values to a slice of `blocks`; B enumerates the block columns, and in each the rows."""
        pairs = ((self.d, blocks.d), (self.scales, blocks.scales), (self.dmin, blocks.dmin), (self.mins, blocks.mins))
        out, columns = blocks.codes.shape
        for value, target in pairs:
            if value is not None and target is not None:
                part = target.view(out, columns // self.kind.block, -1)[rows, cols]
                part.copy_(value.view(value.shape[0], part.shape[1], part.shape[0]).permute(2, 1, 0))


_CHUNK = 3 << 17  # weights searched at once: the few buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 23
_WIDTHS = (1.1, 1.05, 1.0, 0.97, 0.94, 0.9)  # candidates of d and dmin, as fractions of the integers' range


@torch.no_grad()
def search_blocks(
    weight: torch.Tensor, name: str, importance: torch.Tensor | None = None, quick: bool = False, codes: bool = True
) -> GgmlBlocks:
    """Blocks of a matrix with a small importance-weighted squared error.

    Args:
        weight: [out, in], any float dtype; searched in float32. `in` must fill blocks.
        name: of the type, `Q4_K`.
        importance: [in], >= 0: the second moment of each input channel; None weighs all alike.
        quick: a fifth of the time: fewer starts and no perturbations. Enough for GPTQ.
        codes: False leaves the codes uninitialized.

    Returns:
        GgmlBlocks on the weight's device. For NaN or Inf weights d is not finite or the codes are arbitrary; callers
        check.
    """
    kind, config = GGML_TYPES[name], (QUICK_SEARCH_CONFIGS if quick else SEARCH_CONFIGS)[name]
    out, columns = weight.shape
    assert columns % kind.block == 0, f"{columns} columns do not fill blocks of {kind.block}"
    count, per = columns // kind.block, kind.block // kind.group
    blocks = GgmlBlocks.empty(kind, out, columns, weight.device)
    grouped = weight.view(out, count, per, kind.group)
    weights = _normalized_importance(importance, columns, weight.device).view(count, per, kind.group)
    block_codes = blocks.codes.view(grouped.shape)
    chunk_weights = _CHUNK if weight.device.type == "cpu" else _GPU_CHUNK

    def search(chunk_slices: tuple[slice, slice]) -> None:
        rows, cols = chunk_slices
        part = grouped[rows, cols]
        shape = part.shape[:2]
        x = part.permute(3, 2, 1, 0).float().contiguous().view(kind.group, per, -1)
        h = weights[cols].permute(2, 1, 0).unsqueeze(-1)
        # The same for all rows; chunks of several block columns need it expanded.
        h = h.squeeze(-1) if shape[1] == 1 else h.expand(-1, -1, -1, shape[0]).reshape(x.shape)
        chunk = SearchChunk(x, h, kind)
        found = _search(chunk, config)
        if codes:
            nearest = chunk.codes(*found.step_and_minimum()).view(kind.group, per, shape[1], shape[0])
            block_codes[rows, cols] = nearest.permute(3, 2, 1, 0)
        found.store(blocks, rows, cols)

    parallel_map(search, list(_chunks(out, count, max(1, chunk_weights // kind.block))), weight.device)
    return blocks


def _chunks(out: int, count: int, blocks: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that are searched together: one block column, or several if rows are few."""
    columns = max(1, min(count, blocks // out))
    some = -(-out // -(-out // blocks))  # equal parts, without a small remainder
    for c in range(0, count, columns):
        for r in range(0, out, some):
            yield slice(r, min(r + some, out)), slice(c, min(c + columns, count))


def _normalized_importance(importance: torch.Tensor | None, columns: int, device: torch.device) -> torch.Tensor:
    """float32 [in] of mean one. A channel that was never active in the calibration data still gets a small weight, so
    that its weights are not rounded at random."""
    given = torch.ones(columns, device=device) if importance is None else importance.to(device, torch.float32)
    mean = given.double().mean().float()
    if not torch.isfinite(mean) or mean <= 0:
        given = mean = torch.ones(columns, device=device)
    return given / mean + 1e-4


def _search(chunk: SearchChunk, config: SearchConfig) -> StoredParams:
    found = _start(chunk, config)
    least = chunk.error(*found.step_and_minimum())
    for index, perturbations in enumerate(config.perturbations):
        if index:
            found, least = _refit(chunk, found, least)
        origin = found
        for perturbation in perturbations:
            trial = origin.perturbed(perturbation)
            error = chunk.error(*trial.step_and_minimum())
            better = error < least
            found, least = found.where(better, trial), torch.where(better, error, least)
    # Weights too small for a float16 d, or a group with few important weights.
    return found.where(chunk.sum_hxx < least, found.zeros())


def _refit(chunk: SearchChunk, found: StoredParams, least: torch.Tensor) -> tuple[StoredParams, torch.Tensor]:
    """Refit d and dmin to the integers and codes, where that reduces a block's error."""
    d, dmin = refit_super_scales(chunk, found.d, found.scales, found.dmin, found.mins)
    trial = replace(found, d=d, dmin=dmin)
    error = chunk.error(*trial.step_and_minimum())
    better = over_groups(error.clone()) < over_groups(least.clone())
    return found.where(better, trial), torch.where(better, error, least)


def _start(chunk: SearchChunk, config: SearchConfig) -> StoredParams:
    """Stored parameters close to the groups' best steps and minima."""
    kind = chunk.kind
    minimum: torch.Tensor | None = None
    if kind.has_min:
        step, minimum = fit_steps_and_minima(chunk, config.starts, config.refits, above_zero=kind.min_sign > 0)
    else:
        step = fit_steps(chunk, config.starts, config.refits)
    low, high = scale_limits(kind)
    if not kind.is_k:
        one = torch.ones_like(step)
        return StoredParams(kind, to_half(step), one, None if minimum is None else to_half(minimum), one)
    d, scales = choose_super_scale(step, chunk.sums(step, minimum).qq, low, high, _WIDTHS)
    if minimum is None:
        return StoredParams(kind, d, scales, None, None)
    dmin, mins = choose_super_scale(-minimum, chunk.sum_h, low, high, _WIDTHS)
    return StoredParams(kind, d, scales, dmin, mins)
