"""The tuned weights of integer, minifloat and ggml layers, with straight-through gradients.

With G = dL/dW, v the rounding delta and f the factor on a scale, the gradients inside the clamp are as follows; where a
code is clamped, dL/dv = 0 and the terms with r (or w/s) vanish (AutoRound, arXiv 2309.05516, section 3; the mask as in
LSQ, arXiv 1902.08153, equation 3). Scales are `start * factor` rounded to what can be stored; that rounding passes
gradients straight through too.

Integers, W = s q, q = clamp(round(w/s + v), low, high) (codes minus the zero point), s = s0 f:
    dL/dv = G s            dL/df = sum over the group of G s0 (q - w/s)

Minifloats, W = s q, q = nearest(r + v u) with r = w/s and u the distance of the type's values at r (a delta of one half
reaches the next value at any magnitude):
    dL/dv = G s u          dL/ds = sum over the block of G (q - r)

ggml types, W = s q + m, q = clamp(round(r + v), low, high) with r = (w - m)/s, s = d k and m = e l, where k and l are
the group's integers and d and e (e = -dmin in the K types) belong to its super-block:
    dL/dv = G s            dL/ds = sum over the group of G (q - r)            dL/dm = 0, or sum of G where clamped
The integers stay as the search found them; d and e may be tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.sign_round.learnable_group import EDGE, Index, LearnableGroup, State, copy_state
from auto_round.codecs.block_float import BlockFloatSpec, add_rounding_delta, effective_scale
from auto_round.codecs.ggml.types import GgmlBlocks, assign_codes, code_limits, inverse_of
from auto_round.codecs.int import QuantParams, default_scale_threshold, round_to_stored
from auto_round.codecs.kinds import FloatStart
from auto_round.codecs.minifloat import MinifloatType, as_blocks, block_sum
from auto_round.codecs.quantized_layer import QuantizedLayer

Tensor = torch.Tensor
Limit = Tensor | float


def _clamp(x: Tensor, low: Limit, high: Limit) -> Tensor:
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.maximum(torch.minimum(x, high), low)
    assert isinstance(low, float | int) and isinstance(high, float | int)
    return x.clamp(low, high)


def int_values(blocks: Tensor, scale: Tensor, rounding_delta: Tensor, low: Limit, high: Limit) -> Tensor:
    """W, float32 like `blocks`.

    Args:
        blocks: the weight, [R, M, C, N], in any dtype; computed in float32.
        scale: s, [R, 1, C, 1].
        rounding_delta: v, like `blocks`.
        low, high: limits of the code minus the zero point; numbers or [R, 1, C, 1].
    """
    return _clamp((blocks.float() / scale + rounding_delta).round(), low, high) * scale


def int_gradients(
    blocks: Tensor, scale: Tensor, rounding_delta: Tensor, low: Limit, high: Limit, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/dv like `blocks`, (dL/df) / s0 [R, 1, C, 1]) for `grad` = dL/dW, float32 like `blocks`."""
    ratio = blocks.float() / scale
    raw = (ratio + rounding_delta).round()
    codes = _clamp(raw, low, high)
    inside = (raw == codes).to(grad.dtype)
    return inside * grad * scale, block_sum((codes - ratio * inside) * grad)


class IntTuner(LearnableGroup):
    """Integer layers.

    `qparams`: where tuning starts, one a layer; `scale_dtype`: stored dtype of scales; `codes`: uint8 [out, in] to
    start from, one a layer, or None for the nearest ones.
    """

    functions = (int_values, int_gradients)

    def __init__(
        self, tasks: Sequence[LayerTask], qparams: Sequence[QuantParams], compute_dtype: torch.dtype,
        scale_dtype: torch.dtype, codes: Sequence[Tensor | None] = (), **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(tasks, tasks[0].scheme.group_size, compute_dtype, **options)
        self.bits, self.scale_dtype = qparams[0].bits, scale_dtype
        zeros = [params.zero for params in qparams if isinstance(params.zero, Tensor)]
        self.zero: Limit = torch.cat(zeros).unsqueeze(1) if zeros else float(qparams[0].zero)
        self._start(torch.cat([params.scale for params in qparams]).unsqueeze(1))
        size = self.scheme.group_size
        self._start_from([None if wanted is None else as_blocks(wanted, size) for wanted in codes])

    def _delta_of(self, index: Index, codes: Tensor) -> Tensor:
        blocks, scale, _, low, high = self._arguments(index)
        ratio, wanted = blocks.float() / scale, codes.float() + low
        delta = _clamp(ratio, wanted - EDGE, wanted + EDGE) - ratio
        return torch.where(_clamp(ratio.round(), low, high) == wanted, 0.0, delta)

    def apply_scale_factors(self) -> None:
        scale = self.start_scales[0] * self.scale_factors[0]
        self.scale = round_to_stored(scale, self.scale_dtype, default_scale_threshold(self.scale_dtype))

    def _limits(self, rows: slice) -> tuple[Any, Any]:
        zero = self.zero[rows] if isinstance(self.zero, Tensor) else self.zero
        return -zero, 2**self.bits - 1 - zero

    def _arguments(self, index: Index) -> tuple[Any, ...]:
        rows = index[0]
        return self.blocks[index], self.scale[rows], self.rounding_delta[index], *self._limits(rows)

    def _factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        return [slopes[0].mul_(self.start_scales[0])]

    @torch.no_grad()
    def snapshot(self, into: State | None = None) -> State:
        """Codes, one byte each, and scale factors: a rounding delta only matters by the code it leads to."""
        state_codes = torch.empty_like(self.blocks, dtype=torch.uint8) if into is None else into[0]
        for index in self.chunks:
            blocks, scale, rounding_delta, low, high = self._arguments(index)
            codes = (blocks.float() / scale).add_(rounding_delta).round_()
            state_codes[index] = torch.clamp(codes, low, high).sub_(low).to(torch.uint8)
        return state_codes, *copy_state(tuple(self.scale_factors), None if into is None else into[1:])

    @torch.no_grad()
    def restore(self, state: State) -> None:
        codes, *self.scale_factors = state
        self.apply_scale_factors()
        for index in self.chunks:
            blocks, scale, _, low, _ = self._arguments(index)
            self.rounding_delta[index] = (codes[index].float() + low).sub_(blocks.float() / scale)
        self.refresh()

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        layers = []
        for task, rows in zip(self.tasks, self.slices, strict=True):
            zero = self.zero[rows].squeeze(1) if isinstance(self.zero, Tensor) else self.zero
            qparams = QuantParams(self.scale[rows].squeeze(1), zero, self.bits, self.scale_dtype)
            delta = self.rounding_delta[rows].reshape(*qparams.scale.shape[:2], -1)
            layers.append(task.quantized(task.codec.encode(task.weight, qparams, delta)))
        return layers


def float_values(blocks: Tensor, scale: Tensor, rounding_delta: Tensor, element: MinifloatType) -> Tensor:
    """W, float32 [R, M, C, N], of weights and deltas like it and effective scales [R, 1, C, 1]."""
    return element.nearest(add_rounding_delta(blocks.float() / scale, rounding_delta, element)).mul_(scale)


def float_gradients(
    blocks: Tensor, scale: Tensor, rounding_delta: Tensor, element: MinifloatType, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/dv like `blocks`, dL/ds [R, 1, C, 1]) for `grad` = dL/dW, float32 like `blocks`."""
    ratio = blocks.float() / scale
    step = element.step(ratio)
    moved = ratio + rounding_delta * step
    inside = (moved.abs() < element.saturation).float()
    return inside * step * grad * scale, block_sum((element.nearest(moved) - ratio * inside) * grad)


class FloatTuner(LearnableGroup):
    """Layers of a small float type.

    `starts`: stored scales where tuning starts and global scale or None, by layer; `codes`: as in `IntTuner`.
    """

    functions = (float_values, float_gradients)

    def __init__(
        self, tasks: Sequence[LayerTask], spec: BlockFloatSpec, starts: Sequence[tuple[Tensor, Tensor | None]],
        compute_dtype: torch.dtype, codes: Sequence[Tensor | None] = (), **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(tasks, tasks[0].scheme.group_size, compute_dtype, **options)
        self.spec = spec
        self._globals = [given for _, given in starts]
        columns = self.blocks.shape[2]
        self._start(torch.cat([scale.reshape(-1, 1, columns, 1) for scale, _ in starts]).to(self.blocks.device))
        size = self.scheme.group_size
        self._start_from([None if wanted is None else as_blocks(wanted, size) for wanted in codes])

    def _delta_of(self, index: Index, codes: Tensor) -> Tensor:
        blocks, factors, _, element = self._arguments(index)
        ratio, wanted = blocks.float() / factors, element.decode(codes)
        # Towards zero the next value may be half as far away as the other one.
        size = wanted.abs()
        outer, towards_zero = element.step(size) * EDGE, element.step(size * (1 - 2.0**-10)) * EDGE
        above = torch.where(wanted < 0, towards_zero, outer)
        below = torch.where(wanted > 0, towards_zero, outer)
        moved = torch.maximum(torch.minimum(ratio, wanted + above), wanted - below) - ratio
        return torch.where(element.nearest(ratio) == wanted, 0.0, moved / element.step(ratio))

    def _effective(self, scale: Tensor) -> Tensor:
        """Factors from element values to weights, [R, 1, C, 1]."""
        if not self.spec.has_global_scale:
            return scale
        parts = zip(self.slices, self._globals, strict=True)
        return torch.cat([effective_scale(scale[rows], None if g is None else g.to(scale)) for rows, g in parts])

    def apply_scale_factors(self) -> None:
        self.scale = self.spec.rule.store(self.start_scales[0] * self.scale_factors[0])
        self._factors = self._effective(self.scale)

    def _arguments(self, index: Index) -> tuple[Any, ...]:
        return self.blocks[index], self._factors[index[0]], self.rounding_delta[index], self.spec.element

    def _factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        return [slopes[0].mul_(self._effective(self.start_scales[0]))]

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        return [
            task.quantized(
                task.codec.encode(task.weight, FloatStart(self.scale[rows], given), self.rounding_delta[rows])
            )
            for task, rows, given in zip(self.tasks, self.slices, self._globals, strict=True)
        ]


def ggml_values(
    blocks: Tensor, step: Tensor, inverse: Tensor, minimum: Tensor, rounding_delta: Tensor, low: float, high: float
) -> Tensor:
    """W, float32 like `blocks`.

    Args:
        blocks: the weight, [R, 1, C, N].
        step, inverse, minimum: s, 1/s (nearly zero for a step of zero) and m, [R, 1, C, 1].
        rounding_delta: v, like `blocks`.
        low, high: limits of the code minus its zero.
    """
    codes = ((blocks.float() - minimum) * inverse + rounding_delta).round().clamp(low, high)
    return codes * step + minimum


def ggml_gradients(
    blocks: Tensor, step: Tensor, inverse: Tensor, minimum: Tensor, rounding_delta: Tensor, low: float, high: float,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dL/dv like `blocks`, dL/ds and dL/dm [R, 1, C, 1]) for `grad` = dL/dW, float32 like `blocks`."""
    ratio = (blocks.float() - minimum) * inverse
    raw = (ratio + rounding_delta).round()
    codes = raw.clamp(low, high)
    within = (raw == codes).to(grad.dtype) * grad
    return within * step, block_sum(codes * grad - ratio * within), block_sum(grad - within)


class GgmlTuner(LearnableGroup):
    """Layers in a ggml type. `starts`: where tuning starts, one a layer; where a code is not the nearest one, the
    rounding delta starts just large enough to give it."""

    functions = (ggml_values, ggml_gradients)

    def __init__(
        self, tasks: Sequence[LayerTask], starts: Sequence[GgmlBlocks], compute_dtype: torch.dtype, **options: Any
    ) -> None:
        self.kind = starts[0].kind
        super().__init__(tasks, self.kind.group, compute_dtype, **options)
        self._limits = code_limits(self.kind)
        self.start = _without_codes(starts, torch.cat)
        self._start(*(part.float() for part in (self.start.d, self.start.dmin) if part is not None))
        self._start_from([part.codes.view(-1, *self.blocks.shape[1:]) for part in starts])

    def _delta_of(self, index: Index, codes: Tensor) -> Tensor:
        blocks, _, inverse, minimum, _, low, high = self._arguments(index)
        ratio, wanted = (blocks.float() - minimum) * inverse, codes.float() - self.kind.zero
        delta = torch.maximum(torch.minimum(ratio, wanted + EDGE), wanted - EDGE) - ratio
        return torch.where(ratio.round().clamp(low, high) == wanted, 0.0, delta)

    def apply_scale_factors(self) -> None:
        found = [(s * f).half() for s, f in zip(self.start_scales, self.scale_factors, strict=True)]
        self.stored = replace(self.start, d=found[0], dmin=found[1] if len(found) > 1 else None)
        shape = (self.blocks.shape[0], 1, self.blocks.shape[2], 1)
        self.steps, minimum = self.stored.step().view(shape), self.stored.minimum()
        self.inverses = inverse_of(self.steps)
        self.minima = torch.zeros_like(self.steps) if minimum is None else minimum.view(shape)

    def _arguments(self, index: Index) -> tuple[Any, ...]:
        rows = index[0]
        return (
            self.blocks[index], self.steps[rows], self.inverses[rows], self.minima[rows], self.rounding_delta[index],
            *self._limits,
        )  # fmt: skip

    def _factor_gradients(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the groups of each super-block."""
        found = []
        integers, signs = (self.start.scales, self.start.mins), (1, self.kind.min_sign)
        for start, slope, whole, sign in zip(self.start_scales, slopes, integers, signs, strict=False):
            slope = slope[:, 0, :, 0]
            if whole is not None:
                slope = (slope * whole).view(*start.shape, -1).sum(-1)
            found.append(slope * start * sign)
        return found

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        layers = []
        for task, rows in zip(self.tasks, self.slices, strict=True):
            own = _without_codes([self.stored], partial(_cut, rows=rows))
            layers.append(task.quantized(assign_codes(task.weight, own, self.rounding_delta[rows])))
        return layers


def _without_codes(blocks: Sequence[GgmlBlocks], make: Callable[[list[Tensor]], Tensor]) -> GgmlBlocks:
    """Blocks without codes, each of their tensors made from that tensor of all of `blocks`."""
    own = lambda parts: None if parts[0] is None else make(parts)  # noqa: E731
    return GgmlBlocks(
        blocks[0].kind, torch.empty(0, dtype=torch.uint8), make([b.d for b in blocks]),
        own([b.scales for b in blocks]), own([b.dmin for b in blocks]), own([b.mins for b in blocks]),
    )  # fmt: skip


def _cut(parts: list[Tensor], rows: slice) -> Tensor:
    return parts[0][rows]
