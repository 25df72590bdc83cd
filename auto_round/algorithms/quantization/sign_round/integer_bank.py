"""The learnables of a block's integer layers, stacked by rows, so that one pass updates many layers.

Rows of a weight know nothing of each other, so layers with the same input width and scheme (q, k, v, gate and up; all
experts of a mixture) are one tall matrix here. A step is then a few passes over that matrix, however many layers it
holds. There is no autograd graph over weights: the backward pass gives dL/dW, one matrix product, and `fake_quant`
turns it into steps of the learnables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.layer_codes import as_groups, integer_layer
from auto_round.algorithms.quantization.sign_round.fake_quant import (
    compiled,
    quantized_values,
    straight_through_gradients,
)
from auto_round.algorithms.quantization.sign_round.step_rules import SignStep, make_rule
from auto_round.data_type.int import IntGrid, default_scale_threshold, round_to_stored
from auto_round.quantized_layer import QuantizedLayer

_CPU_CHUNK = 1 << 16  # weights handled at a time: the buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 24
_FACTOR_RANGE = (0.5, 1.5)


class IntegerBank:
    """Offsets and scale factors of some layers, and the quantized weights that follow from them.

    Args:
        tasks: layers with equal in_features and scheme; `task.weight` is [out, in]. Only one when scales are per
            tensor.
        grids: where tuning starts, one a layer.
        compute_dtype: dtype of the matrix products.
        scale_dtype: dtype in which scales are stored.
        tune_scale: tune the factor on the scale as well.
        adam, momentum: how learnables move.
        compile_step: compile the elementwise passes.
    """

    def __init__(
        self, tasks: Sequence[LayerTask], grids: Sequence[IntGrid], compute_dtype: torch.dtype,
        scale_dtype: torch.dtype, tune_scale: bool = True, adam: bool = False, momentum: float = 0.0,
        compile_step: bool = False,
    ) -> None:  # fmt: skip
        self._values, self._gradients = compiled() if compile_step else (quantized_values, straight_through_gradients)
        self.tasks, self.bits, self.scheme = list(tasks), grids[0].bits, tasks[0].scheme
        self.tune_scale, self.scale_dtype, self.compute_dtype = tune_scale, scale_dtype, compute_dtype
        assert isinstance(self.scheme.group_size, int)
        device, columns = tasks[0].weight.device, tasks[0].weight.shape[1]
        pieces = [as_groups(task.weight.to(compute_dtype), self.scheme.group_size) for task in tasks]
        self.slices = _slices([piece.shape[0] for piece in pieces])
        self._weight_slices = _slices([task.weight.shape[0] for task in tasks])
        self.groups = torch.cat(pieces)
        del pieces
        self.start_scale = torch.cat([grid.scale for grid in grids])
        self.scale = self.start_scale
        zeros = [grid.zero for grid in grids]
        self.zero: torch.Tensor | float = zeros[0] if isinstance(zeros[0], float) else torch.cat(zeros)  # type: ignore[arg-type]
        self.v = torch.zeros_like(self.groups, dtype=torch.float32)
        self.factor = torch.ones_like(self.scale)
        rows = self._weight_slices[-1].stop
        self.quantized = torch.empty(rows, columns, dtype=compute_dtype, device=device)
        self.gradient = torch.empty(rows, columns, dtype=compute_dtype, device=device)
        self._touched: set[int] = set()
        self.padded = self.groups.numel() != self.quantized.numel()
        self.rules = [make_rule(adam, momentum) for _ in range(2)]
        self.fuse_update = isinstance(self.rules[0], SignStep)  # no state: it can move a piece at a time
        self._chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
        self.refresh()

    def weight(self, index: int) -> torch.Tensor:
        """The quantized weight [out, in] of a layer; a view that `refresh` keeps current."""
        return self.quantized[self._weight_slices[index]]

    def add_weight_gradient(self, index: int, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add grad.T @ x, [out, in], to the gradient of this step."""
        rows = self.gradient[self._weight_slices[index]]
        if index in self._touched:
            rows.addmm_(grad.t(), x)
        else:
            torch.mm(grad.t(), x, out=rows)
            self._touched.add(index)

    def _rows(self) -> list[slice]:
        count = self.groups.shape[0]
        step = max(1, self._chunk // max(1, self.groups.shape[1] * self.groups.shape[2]))
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def _limits(self, rows: slice) -> tuple[Any, Any]:
        top = 2**self.bits - 1
        if isinstance(self.zero, torch.Tensor):
            return -self.zero[rows], top - self.zero[rows]
        return -self.zero, top - self.zero

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the quantized weights from the learnables."""
        columns = self.quantized.shape[1]
        for rows in self._rows():
            low, high = self._limits(rows)
            values = self._values(self.groups[rows], self.scale[rows], self.v[rows], low, high)
            if self.scheme.group_size == 0:
                self.quantized.copy_(values.view_as(self.quantized))
            else:
                self.quantized[rows].copy_(values.view(values.shape[0], -1)[:, :columns])

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        """One update of offsets and factors from the gradient gathered since the last one, then `refresh`. Layers that
        gathered none (experts that no token reached) have a gradient of zero."""
        if not self._touched:
            return
        for index, rows in enumerate(self._weight_slices):
            if index not in self._touched:
                self.gradient[rows].zero_()
        self._touched.clear()
        assert isinstance(self.scheme.group_size, int)
        grad = as_groups(self.gradient, self.scheme.group_size) if self.padded else self.gradient
        grad = grad.view_as(self.groups)
        slopes = torch.empty_like(self.factor)
        whole = None if self.fuse_update else torch.empty_like(self.v)
        for rows in self._rows():
            low, high = self._limits(rows)
            part, slopes[rows] = self._gradients(
                self.groups[rows], self.scale[rows], self.v[rows], low, high, grad[rows].float()
            )
            if whole is None:
                self.rules[0].apply(self.v[rows], part, lr)
            else:
                whole[rows] = part
        if whole is not None:
            self.rules[0].apply(self.v, whole, lr)
        if self.tune_scale:
            self.rules[1].apply(self.factor, slopes.mul_(self.start_scale), scale_lr)
            self.factor.clamp_(*_FACTOR_RANGE)
            threshold = default_scale_threshold(self.scale_dtype)
            self.scale = round_to_stored(self.start_scale * self.factor, self.scale_dtype, threshold)
        self.refresh()

    def initial(self) -> tuple[torch.Tensor, ...]:
        """The state before the first step."""
        return torch.zeros_like(self.v), torch.ones_like(self.factor), self.start_scale

    def snapshot(self) -> tuple[torch.Tensor, ...]:
        return self.v.clone(), self.factor.clone(), self.scale.clone()

    @torch.no_grad()
    def restore(self, state: tuple[torch.Tensor, ...]) -> None:
        self.v, self.factor, self.scale = state
        self.refresh()

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        """The codes of the present state, decided once from the weights in their own dtype."""
        layers = []
        for task, rows in zip(self.tasks, self.slices, strict=True):
            zero = self.zero[rows] if isinstance(self.zero, torch.Tensor) else self.zero
            layers.append(
                integer_layer(task, IntGrid(self.scale[rows], zero, self.bits), self.v[rows], self.scale_dtype)
            )
        return layers


def stack_tasks(tasks: Sequence[LayerTask]) -> list[list[LayerTask]]:
    """The layers that can share a bank, in the order of their first."""
    groups: dict[Any, list[LayerTask]] = defaultdict(list)
    for index, task in enumerate(tasks):
        alone = index if task.scheme.group_size == 0 else None
        groups[task.scheme, task.weight.shape[1], task.weight.device, alone].append(task)
    return list(groups.values())


def _slices(counts: Sequence[int]) -> list[slice]:
    slices, start = [], 0
    for count in counts:
        slices.append(slice(start, start + count))
        start += count
    return slices
