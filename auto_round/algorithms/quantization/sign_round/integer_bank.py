"""Integer layers under tuning: offsets, scale factors, and the quantized weights that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.layer_codes import as_groups, integer_layer
from auto_round.algorithms.quantization.sign_round.fake_quant import (
    compiled,
    quantized_values,
    straight_through_gradients,
)
from auto_round.algorithms.quantization.sign_round.layer_bank import (
    FACTOR_RANGE,
    LayerBank,
    Place,
    State,
    copied,
    joined,
    slices_of,
    stacked_weights,
)
from auto_round.data_type.int import IntGrid, default_scale_threshold, round_to_stored
from auto_round.quantized_layer import QuantizedLayer


class IntegerBank(LayerBank):
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
        rows = slices_of([task.weight.shape[0] for task in tasks])
        columns = tasks[0].weight.shape[1]
        super().__init__(tasks, compute_dtype, [part.start for part in rows], (rows[-1].stop, columns))
        self.bits, self.tune_scale, self.scale_dtype = grids[0].bits, tune_scale, scale_dtype
        assert isinstance(self.scheme.group_size, int)
        pieces = [as_groups(weight, self.scheme.group_size) for weight in stacked_weights(tasks, compute_dtype)]
        self.slices = slices_of([piece.shape[0] for piece in pieces])
        self.groups = joined(pieces)
        del pieces
        self.start_scale = torch.cat([grid.scale for grid in grids])
        self.scale = self.start_scale
        zeros = [grid.zero for grid in grids]
        self.zero: torch.Tensor | float = zeros[0] if isinstance(zeros[0], float) else torch.cat(zeros)  # type: ignore[arg-type]
        self.v = torch.zeros_like(self.groups, dtype=torch.float32)
        self.factor = torch.ones_like(self.scale)
        self.padded = self.groups.numel() != self.quantized.numel()
        self._make_rules(2, adam, momentum)
        self.refresh()

    def _limits(self, rows: slice) -> tuple[Any, Any]:
        top = 2**self.bits - 1
        if isinstance(self.zero, torch.Tensor):
            return -self.zero[rows], top - self.zero[rows]
        return -self.zero, top - self.zero

    @torch.no_grad()
    def refresh(self) -> None:
        columns = self.quantized.shape[1]
        for rows in self._pieces(self.groups):
            low, high = self._limits(rows)
            values = self._values(self.groups[rows], self.scale[rows], self.v[rows], low, high)
            if self.scheme.group_size == 0:
                self.quantized.copy_(values.view_as(self.quantized))
            else:
                self.quantized[rows].copy_(values.view(values.shape[0], -1)[:, :columns])

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        if not self._take_gradient():
            return
        assert isinstance(self.scheme.group_size, int)
        grad = as_groups(self.gradient, self.scheme.group_size) if self.padded else self.gradient
        grad = grad.view_as(self.groups)
        slopes = torch.empty_like(self.factor)

        def gradients() -> Iterator[tuple[Place, torch.Tensor]]:
            for rows in self._pieces(self.groups):
                low, high = self._limits(rows)
                part, slopes[rows] = self._gradients(
                    self.groups[rows], self.scale[rows], self.v[rows], low, high, grad[rows].float()
                )
                yield rows, part

        self._move_offsets(gradients(), lr)
        if self.tune_scale:
            self.rules[1].apply(self.factor, slopes.mul_(self.start_scale), scale_lr)
            self.factor.clamp_(*FACTOR_RANGE)
            threshold = default_scale_threshold(self.scale_dtype)
            self.scale = round_to_stored(self.start_scale * self.factor, self.scale_dtype, threshold)
        self.refresh()

    @torch.no_grad()
    def restart(self) -> None:
        self.v.zero_()
        self.factor.fill_(1.0)
        self.scale = self.start_scale
        self.refresh()

    @torch.no_grad()
    def snapshot(self, into: State | None = None) -> State:
        """The codes, a byte each, with factors and scales: offsets matter by what they round to only."""
        made = torch.empty(self.groups.shape, dtype=torch.uint8, device=self.v.device) if into is None else into[0]
        for rows in self._pieces(self.groups):
            low, high = self._limits(rows)
            codes = (self.groups[rows].float() / self.scale[rows]).add_(self.v[rows]).round_()
            made[rows] = torch.clamp(codes, low, high).sub_(low).to(torch.uint8)
        return made, *copied((self.factor, self.scale), None if into is None else into[1:])

    @torch.no_grad()
    def restore(self, state: State) -> None:
        codes, self.factor, self.scale = state
        for rows in self._pieces(self.groups):
            low, _ = self._limits(rows)
            self.v[rows] = (codes[rows].float() + low).sub_(self.groups[rows].float() / self.scale[rows])
        self.refresh()

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        layers = []
        for task, rows in zip(self.tasks, self.slices, strict=True):
            zero = self.zero[rows] if isinstance(self.zero, torch.Tensor) else self.zero
            layers.append(
                integer_layer(task, IntGrid(self.scale[rows], zero, self.bits), self.v[rows], self.scale_dtype)
            )
        return layers
