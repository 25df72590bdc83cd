"""Tune layers in ggml types: learned rounding deltas, and scale factors on the super-block scales d and dmin.

A group has the step s = d k and the minimum m = e l: the float16 factors d and e (e = -dmin in the K types) of
its block times its own integers k and l. W = s q + m with q = clamp(round((w - m)/s + v), low, high). With G =
dL/dW and r = (w - m)/s the straight-through gradients are, where q is not cut off,
    dL/dv = G s            dL/ds = sum over the group of G (q - r)            dL/dm = 0
and where it is dL/dv = 0, dL/ds = sum of G q and dL/dm = sum of G (AutoRound, arXiv 2309.05516, section 3; the
mask as in LSQ, arXiv 1902.08153, equation 3). The integers stay where the search found them; d and e may be
tuned, as `start * factor` rounded to float16, and their gradients are sums over the groups of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.encode_layer import encode_ggml
from auto_round.algorithms.quantization.sign_round.learnable_group import (
    EDGE,
    SCALE_FACTOR_RANGE,
    Index,
    LearnableGroup,
    State,
    concat_rows,
    consecutive_slices,
    copy_state,
    stacked_weights,
)
from auto_round.codecs.ggml.types import GgmlBlocks, GgmlType, assign_codes, code_limits, inverse_of
from auto_round.codecs.quantized_layer import QuantizedLayer

Tensor = torch.Tensor
GgmlValues = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float], Tensor]
GgmlGradients = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float, Tensor], tuple[Tensor, Tensor, Tensor]]


def ggml_values(
    groups: Tensor, step: Tensor, inverse: Tensor, minimum: Tensor, rounding_delta: Tensor, low: float, high: float
) -> Tensor:
    """W, float32 [rows, groups, n].

    Args:
        groups: the weight, [rows, groups, n].
        step, inverse, minimum: s, 1/s (nearly zero for a step of zero) and m, [rows, groups, 1].
        v: offsets in units of one code, like `groups`.
        low, high: limits of the code less its zero.
    """
    codes = ((groups.float() - minimum) * inverse + rounding_delta).round().clamp(low, high)
    return codes * step + minimum


def ggml_gradients(
    groups: Tensor,
    step: Tensor,
    inverse: Tensor,
    minimum: Tensor,
    rounding_delta: Tensor,
    low: float,
    high: float,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dv like `groups`, dL/ds and dL/dm [rows, groups, 1]) for `grad` = dL/dW, float32 like `groups`."""
    ratio = (groups.float() - minimum) * inverse
    raw = (ratio + rounding_delta).round()
    codes = raw.clamp(low, high)
    inside = (raw == codes).to(grad.dtype)
    within = inside * grad
    by_step = (codes * grad - ratio * within).sum(-1, keepdim=True)
    return within * step, by_step, (grad - within).sum(-1, keepdim=True)


@lru_cache(maxsize=1)
def compiled_ggml() -> tuple[GgmlValues, GgmlGradients]:
    """Both functions compiled by PyTorch into one pass over the weights each, for any shape."""
    return torch.compile(ggml_values, dynamic=True), torch.compile(ggml_gradients, dynamic=True)


class GgmlTuner(LearnableGroup):
    """Offsets and factors of some layers, and the quantized weights that follow from them.

    Args:
        tasks: layers with equal in_features and ggml type; `task.weight` is [out, in].
        blocks: where tuning starts, one a layer; on the weights' device. Offsets start at zero where a code is the
            nearest one, else just far enough to give the code.
        compute_dtype: dtype of the matrix products.
        tune_scale: tune d and dmin as well.
        adam, momentum: how learnables move.
        compile_step: compile the elementwise passes.
    """

    def __init__(
        self, tasks: Sequence[LayerTask], blocks: Sequence[GgmlBlocks], compute_dtype: torch.dtype,
        tune_scale: bool = True, adam: bool = False, momentum: float = 0.0, compile_step: bool = False,
    ) -> None:  # fmt: skip
        self._values, self._gradients = compiled_ggml() if compile_step else (ggml_values, ggml_gradients)
        self.slices = consecutive_slices([task.weight.shape[0] for task in tasks])
        shape = self.slices[-1].stop, tasks[0].weight.shape[1]
        super().__init__(tasks, compute_dtype, [part.start for part in self.slices], shape)
        self.tune_scale, self.kind = tune_scale, blocks[0].kind
        self._limits = code_limits(self.kind)
        self.groups = concat_rows(stacked_weights(tasks, compute_dtype))
        self.groups = self.groups.view(shape[0], -1, self.kind.group)
        self.start = _without_codes(self.kind, blocks, torch.cat)
        self.rounding_delta = torch.zeros_like(self.groups, dtype=torch.float32)
        self.scale_factors = [torch.ones_like(part, dtype=torch.float32) for part in self._start_super_scales()]
        self._make_rules(1 + len(self.scale_factors), adam, momentum)
        self._apply_factors()
        self._set_start_delta(torch.cat([part.codes for part in blocks]))
        self.refresh()

    def _set_start_delta(self, codes: Tensor) -> None:
        """Offsets that lead to the codes [rows, in]."""
        low, high = self._limits
        for rows in self._row_chunks(self.groups):
            ratio = (self.groups[rows].float() - self.minima[rows]) * self.inverses[rows]
            wanted = codes[rows].view(ratio.shape).float() - self.kind.zero
            offset = torch.maximum(torch.minimum(ratio, wanted + EDGE), wanted - EDGE) - ratio
            self.rounding_delta[rows] = torch.where(ratio.round().clamp(low, high) == wanted, 0.0, offset)
        self.start_delta = self.rounding_delta.clone() if bool(self.rounding_delta.any()) else None

    def _start_super_scales(self) -> list[Tensor]:
        """d and, where there is one, dmin: float32 [rows, blocks]."""
        return [part.float() for part in (self.start.d, self.start.dmin) if part is not None]

    def _apply_factors(self) -> None:
        """The stored numbers under the present factors."""
        found = [(s * f).half() for s, f in zip(self._start_super_scales(), self.scale_factors, strict=True)]
        self.blocks = replace(self.start, d=found[0], dmin=found[1] if len(found) > 1 else None)
        self.steps = self.blocks.step().unsqueeze(-1)
        self.inverses = inverse_of(self.steps)
        minimum = self.blocks.minimum()
        self.minima = torch.zeros_like(self.steps) if minimum is None else minimum.unsqueeze(-1)

    def _chunk_arguments(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, float]:
        return (
            self.groups[rows],
            self.steps[rows],
            self.inverses[rows],
            self.minima[rows],
            self.rounding_delta[rows],
            *self._limits,
        )

    @torch.no_grad()
    def refresh(self) -> None:
        for rows in self._row_chunks(self.groups):
            values = self._values(*self._chunk_arguments(rows))
            self.quantized[rows].copy_(values.view(values.shape[0], -1))

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        if not self._complete_gradient():
            return
        grad = self.gradient.view_as(self.groups)
        slopes = [torch.empty_like(self.steps) for _ in range(2)]

        def gradients() -> Iterator[tuple[Index, Tensor]]:
            for rows in self._row_chunks(self.groups):
                part, slopes[0][rows], slopes[1][rows] = self._gradients(
                    *self._chunk_arguments(rows), grad[rows].float()
                )
                yield rows, part

        self._update_rounding_delta(gradients(), lr)
        if self.tune_scale:
            self._update_scale_factors(slopes, scale_lr)
        self.refresh()

    def _update_scale_factors(self, slopes: list[Tensor], lr: float) -> None:
        """One update of the factors, from the gradients of the groups' steps and minima."""
        kind = self.kind
        integers = (self.start.scales, self.start.mins)
        for index, start in enumerate(self._start_super_scales()):
            slope = slopes[index].squeeze(-1)
            whole = integers[index]
            if whole is not None:
                slope = (slope * whole).view(*start.shape, -1).sum(-1)
            sign = kind.min_sign if index else 1
            self.rules[1 + index].apply(self.scale_factors[index], slope * start * sign, lr)
            self.scale_factors[index].clamp_(*SCALE_FACTOR_RANGE)
        self._apply_factors()

    @torch.no_grad()
    def restart(self) -> None:
        self._restart_delta()
        for scale_factor in self.scale_factors:
            scale_factor.fill_(1.0)
        self._apply_factors()
        self.refresh()

    def snapshot(self, into: State | None = None) -> State:
        return copy_state((self.rounding_delta, *self.scale_factors), into)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        self.rounding_delta, *self.scale_factors = state
        self._apply_factors()
        self.refresh()

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        layers = []
        for task, rows in zip(self.tasks, self.slices, strict=True):
            own = _without_codes(self.kind, [self.blocks], partial(_cut, rows=rows))
            layers.append(encode_ggml(task, assign_codes(task.weight, own, self.rounding_delta[rows])))
        return layers


def _without_codes(kind: GgmlType, blocks: Sequence[GgmlBlocks], make: Callable[[list[Tensor]], Tensor]) -> GgmlBlocks:
    """Blocks without codes, each of their tensors made from that tensor of all of `blocks`."""
    own = lambda parts: None if parts[0] is None else make(parts)  # noqa: E731
    return GgmlBlocks(
        kind, torch.empty(0, dtype=torch.uint8), make([b.d for b in blocks]), own([b.scales for b in blocks]),
        own([b.dmin for b in blocks]), own([b.mins for b in blocks]),
    )  # fmt: skip


def _cut(parts: list[Tensor], rows: slice) -> Tensor:
    return parts[0][rows]
