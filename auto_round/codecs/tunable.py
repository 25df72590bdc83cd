"""What SignRound learns of integers, minifloats and ggml types, with straight-through gradients.

With G = dL/dW and v the rounding delta, the gradients inside the clamp are as follows; where a code is clamped,
dL/dv = 0 and the terms with r vanish (AutoRound, arXiv 2309.05516, section 3; the mask as in LSQ, arXiv 1902.08153,
equation 3). Scales are `start * factor` rounded to what can be stored; that passes gradients straight through too.

integers    W = s q, q = clamp(round(r + v), low, high), r = w/s: dL/dv = G s, dL/ds = sum over the group of G (q - r)
minifloats  W = s q, q = nearest(r + v u), r = w/s, u the distance of the type's values at r (a delta of one half
            reaches the next value at any magnitude): dL/dv = G s u, dL/ds = sum over the block of G (q - r)
ggml types  W = s q + m, q as for integers, r = (w - m)/s, s = d k and m = e l, where k and l are the group's integers
            and d and e (e = -dmin in the K types) belong to its super-block, and may be tuned: dL/dv and dL/ds as for
            integers, dL/dm = 0, or sum of G where clamped

Weights are blocks [R, M, C, N] (see `codecs.minifloat`), layers stacked along R; scales of blocks are [R, 1, C, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from auto_round.codecs.block_float import BlockFloatSpec, add_rounding_delta, effective_scale
from auto_round.codecs.ggml.types import GgmlBlocks, code_limits, inverse_of
from auto_round.codecs.int import QuantParams, concat_qparams, default_scale_threshold, round_to_stored
from auto_round.codecs.minifloat import MinifloatType, block_sum
from auto_round.schemes import GroupSize

Limit = Tensor | float
# Of a step: where the rounding delta starts within a code that is not the nearest one, 0.1 inside its border.
EDGE = 0.4


class TunableGrid(ABC):
    """The scales of stacked layers while they are tuned, and what weights become on them."""

    # (values, gradients) as pure functions, which may be compiled: `values(blocks, delta, *arguments)` is W, float32
    # like `blocks`; `gradients(blocks, delta, *arguments, dL/dW)` gives dL/dv like `blocks` and the gradients of the
    # blocks' scales, [R, 1, C, 1] each.
    functions: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    state_dtype: ClassVar[torch.dtype] = torch.float32  # of `to_state`
    group_size: GroupSize
    start_scales: list[Tensor]  # float32, of which factors are learned
    start_codes: Sequence[Tensor | None] = ()  # uint8 [out, in] by layer, where rounding starts; None: nearest codes

    @abstractmethod
    def store(self, scales: Sequence[Tensor]) -> None:
        """Use `scales`, which are shaped like `start_scales`, rounded to what can be stored."""

    @abstractmethod
    def arguments(self, rows: slice) -> tuple[Any, ...]:
        """Arguments of `functions` for some rows of blocks."""

    @abstractmethod
    def factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the factors from those of the blocks' scales, which may be overwritten."""

    @abstractmethod
    def delta_of(self, blocks: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
        """The rounding delta that leads to `codes` of a chunk: zero where they are the nearest, else just enough."""

    @abstractmethod
    def layer(self, index: int, rows: slice) -> Any:
        """The present scales of one layer, which has these rows of blocks, as its codec's `start` gives them."""

    def to_state(self, blocks: Tensor, delta: Tensor, *arguments: Any) -> Tensor:
        """What is kept of a chunk's rounding deltas in a copy of the state, in `state_dtype`."""
        return delta

    def from_state(self, blocks: Tensor, state: Tensor, *arguments: Any) -> Tensor:
        """The inverse of `to_state`, as far as codes are concerned."""
        return state


def _clamp(x: Tensor, low: Limit, high: Limit) -> Tensor:
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.maximum(torch.minimum(x, high), low)
    assert isinstance(low, float | int) and isinstance(high, float | int)
    return x.clamp(low, high)


def _delta_to(wanted: Tensor, ratio: Tensor, low: Limit, high: Limit) -> Tensor:
    """`TunableGrid.delta_of` of whole numbers: from weights in units of a step to numbers between `low` and `high`."""
    delta = _clamp(ratio, wanted - EDGE, wanted + EDGE) - ratio
    return torch.where(_clamp(ratio.round(), low, high) == wanted, 0.0, delta)


def int_values(blocks: Tensor, delta: Tensor, scale: Tensor, low: Limit, high: Limit) -> Tensor:
    """`low`, `high`: limits of the code minus the zero point; numbers or [R, 1, C, 1]."""
    return _clamp((blocks.float() / scale + delta).round(), low, high) * scale


def int_gradients(
    blocks: Tensor, delta: Tensor, scale: Tensor, low: Limit, high: Limit, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/dv, (dL/df) / s0)."""
    ratio = blocks.float() / scale
    raw = (ratio + delta).round()
    codes = _clamp(raw, low, high)
    inside = (raw == codes).to(grad.dtype)
    return inside * grad * scale, block_sum((codes - ratio * inside) * grad)


class IntGrid(TunableGrid):
    """Integers. A copy of the state holds codes: a rounding delta only matters by the code it leads to."""

    functions = (int_values, int_gradients)
    state_dtype = torch.uint8

    def __init__(self, starts: Sequence[QuantParams], group_size: GroupSize) -> None:
        self.group_size, self.start = group_size, concat_qparams(list(starts))
        self.zero = self.start.zero.unsqueeze(1) if isinstance(self.start.zero, Tensor) else self.start.zero
        self.start_scales = [self.start.scale.unsqueeze(1)]

    def store(self, scales: Sequence[Tensor]) -> None:
        dtype = self.start.scale_dtype
        self.scale = round_to_stored(scales[0], dtype, default_scale_threshold(dtype))

    def arguments(self, rows: slice) -> tuple[Any, ...]:
        zero = self.zero[rows] if isinstance(self.zero, Tensor) else self.zero
        return self.scale[rows], -zero, 2**self.start.bits - 1 - zero

    def factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        return [slopes[0].mul_(self.start_scales[0])]

    def delta_of(self, blocks: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
        scale, low, high = arguments
        return _delta_to(codes.float() + low, blocks.float() / scale, low, high)

    def layer(self, index: int, rows: slice) -> QuantParams:
        return self.start._replace(scale=self.scale.squeeze(1)).select(rows)

    def to_state(self, blocks: Tensor, delta: Tensor, *arguments: Any) -> Tensor:
        scale, low, high = arguments
        return torch.clamp((blocks.float() / scale).add_(delta).round_(), low, high).sub_(low).to(torch.uint8)

    def from_state(self, blocks: Tensor, state: Tensor, *arguments: Any) -> Tensor:
        scale, low, _ = arguments
        return (state.float() + low).sub_(blocks.float() / scale)


def float_values(blocks: Tensor, delta: Tensor, factor: Tensor, element: MinifloatType) -> Tensor:
    """`factor`: from element values to weights."""
    return element.nearest(add_rounding_delta(blocks.float() / factor, delta, element)).mul_(factor)


def float_gradients(
    blocks: Tensor, delta: Tensor, factor: Tensor, element: MinifloatType, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/dv, dL/ds)."""
    ratio = blocks.float() / factor
    step = element.step(ratio)
    moved = ratio + delta * step
    inside = (moved.abs() < element.saturation).float()
    return inside * step * grad * factor, block_sum((element.nearest(moved) - ratio * inside) * grad)


class FloatStart(NamedTuple):
    """Stored scales float32 [R, C] (see `codecs.minifloat`), and the global scale, a float32 scalar, or None."""

    scale: Tensor
    global_scale: Tensor | None


class FloatGrid(TunableGrid):
    """Small floats."""

    functions = (float_values, float_gradients)

    def __init__(self, starts: Sequence[FloatStart], spec: BlockFloatSpec, group_size: GroupSize) -> None:
        self.spec, self.group_size, self.starts = spec, group_size, starts
        self.start_scales = [torch.cat([start.scale for start in starts])[:, None, :, None]]

    def _effective(self, scale: Tensor) -> Tensor:
        """Factors from element values to weights, [R, 1, C, 1]."""
        if not self.spec.has_global_scale:
            return scale
        parts = scale.split([start.scale.shape[0] for start in self.starts])
        shared = [None if start.global_scale is None else start.global_scale.to(scale) for start in self.starts]
        return torch.cat([effective_scale(part, g) for part, g in zip(parts, shared, strict=True)])

    def store(self, scales: Sequence[Tensor]) -> None:
        self.scale = self.spec.rule.store(scales[0])
        self.factors = self._effective(self.scale)

    def arguments(self, rows: slice) -> tuple[Any, ...]:
        return self.factors[rows], self.spec.element

    def factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        return [slopes[0].mul_(self._effective(self.start_scales[0]))]

    def delta_of(self, blocks: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
        factor, element = arguments
        ratio, wanted = blocks.float() / factor, element.decode(codes)
        # Towards zero the next value may be half as far away as the other one.
        size = wanted.abs()
        outer, towards_zero = element.step(size) * EDGE, element.step(size * (1 - 2.0**-10)) * EDGE
        above = torch.where(wanted < 0, towards_zero, outer)
        below = torch.where(wanted > 0, towards_zero, outer)
        moved = _clamp(ratio, wanted - below, wanted + above) - ratio
        return torch.where(element.nearest(ratio) == wanted, 0.0, moved / element.step(ratio))

    def layer(self, index: int, rows: slice) -> FloatStart:
        return FloatStart(self.scale[rows], self.starts[index].global_scale)


def ggml_values(
    blocks: Tensor, delta: Tensor, step: Tensor, inverse: Tensor, minimum: Tensor, low: float, high: float
) -> Tensor:
    """`step`, `inverse`, `minimum`: s, 1/s and m; `low`, `high`: limits of the code minus its zero."""
    codes = ((blocks.float() - minimum) * inverse + delta).round().clamp(low, high)
    return codes * step + minimum


def ggml_gradients(
    blocks: Tensor, delta: Tensor, step: Tensor, inverse: Tensor, minimum: Tensor, low: float, high: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dv, dL/ds, dL/dm)."""
    ratio = (blocks.float() - minimum) * inverse
    raw = (ratio + delta).round()
    codes = raw.clamp(low, high)
    within = (raw == codes).to(grad.dtype) * grad
    return within * step, block_sum(codes * grad - ratio * within), block_sum(grad - within)


class GgmlGrid(TunableGrid):
    """Layers in a ggml type, started from their codes. Factors are learned for d and dmin, [R, in/block]."""

    functions = (ggml_values, ggml_gradients)

    def __init__(self, starts: Sequence[GgmlBlocks]) -> None:
        self.kind, self.group_size = starts[0].kind, starts[0].kind.group
        self.start_codes = [start.codes for start in starts]
        names = [name for name in starts[0].tensors() if name != "codes"]
        joined = {name: torch.cat([getattr(start, name) for start in starts]) for name in names}
        self.start = GgmlBlocks(self.kind, torch.empty(0, 0, dtype=torch.uint8), **joined)
        self.start_scales = [part.float() for part in (self.start.d, self.start.dmin) if part is not None]

    def store(self, scales: Sequence[Tensor]) -> None:
        halves = [scale.half() for scale in scales]
        self.stored = replace(self.start, d=halves[0], dmin=halves[1] if len(halves) > 1 else None)
        steps, minimum = self.stored.step()[:, None, :, None], self.stored.minimum()
        minima = torch.zeros_like(steps) if minimum is None else minimum[:, None, :, None]
        self.chunked = steps, inverse_of(steps), minima

    def arguments(self, rows: slice) -> tuple[Any, ...]:
        return *(part[rows] for part in self.chunked), *code_limits(self.kind)

    def factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the groups of each super-block."""
        found = []
        integers, signs = (self.start.scales, self.start.mins), (1, self.kind.min_sign)
        for start, slope, whole, sign in zip(self.start_scales, slopes, integers, signs, strict=False):
            slope = slope[:, 0, :, 0]
            if whole is not None:
                slope = (slope * whole).view(*start.shape, -1).sum(-1)
            found.append(slope * start * sign)
        return found

    def delta_of(self, blocks: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
        _, inverse, minimum, low, high = arguments
        return _delta_to(codes.float() - self.kind.zero, (blocks.float() - minimum) * inverse, low, high)

    def layer(self, index: int, rows: slice) -> GgmlBlocks:
        return self.stored.map(lambda t: t[rows])
