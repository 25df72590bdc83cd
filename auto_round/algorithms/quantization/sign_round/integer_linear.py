"""A linear layer whose integer rounding is being tuned, as one fused step without an autograd graph over weights.

The backward pass gives dL/dW, one matrix product; `fake_quant` turns it into steps of the learnables.
"""

from __future__ import annotations

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


class _FusedLinear(torch.autograd.Function):
    """`x @ W.T + bias` whose backward hands dL/dW to the layer instead of to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: IntegerTuningLinear) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.quantized, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grad_outputs
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        flat = grad.reshape(-1, grad.shape[-1])
        layer.add_weight_gradient(flat, x.reshape(-1, x.shape[-1]))
        grad_x = (flat @ layer.quantized).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None


class IntegerTuningLinear(torch.nn.Module):
    """Stands in for a linear while its block is tuned.

    Args:
        task: the layer; `task.weight` [out, in].
        grid: where tuning starts.
        compute_dtype: dtype of the matrix products.
        scale_dtype: dtype in which scales are stored.
        tune_scale: tune the factor on the scale as well.
        adam, momentum: how learnables move.
        compile_step: compile the elementwise passes.
    """

    anchor: torch.Tensor

    def __init__(
        self, task: LayerTask, grid: IntGrid, compute_dtype: torch.dtype, scale_dtype: torch.dtype,
        tune_scale: bool = True, adam: bool = False, momentum: float = 0.0, compile_step: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._values, self._gradients = compiled() if compile_step else (quantized_values, straight_through_gradients)
        self.task = task
        assert isinstance(task.scheme.group_size, int)
        self.bias = None if task.bias is None else task.bias.to(compute_dtype)
        # autograd calls backward only if some input of the function wants a gradient, and the block's input does not
        self.anchor = torch.zeros(1, requires_grad=True, device=task.weight.device)
        self.groups = as_groups(task.weight.to(compute_dtype), task.scheme.group_size)
        self.start_scale = grid.scale
        self.scale = grid.scale
        self.zero = grid.zero
        self.bits = grid.bits
        self.tune_scale = tune_scale
        self.scale_dtype = scale_dtype
        self.v = torch.zeros_like(self.groups, dtype=torch.float32)
        self.factor = torch.ones_like(grid.scale)
        self.padded = self.groups.numel() != task.weight.numel()
        self.quantized = torch.empty_like(task.weight, dtype=compute_dtype)
        self.gradient: torch.Tensor | None = None
        self.rules = [make_rule(adam, momentum) for _ in range(2)]
        self.fuse_update = isinstance(self.rules[0], SignStep)  # no state: it can move a piece at a time
        self._chunk = _CPU_CHUNK if task.weight.device.type == "cpu" else _GPU_CHUNK
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FusedLinear.apply(x.to(self.quantized.dtype), self.anchor, self)

    def add_weight_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add grad.T @ x, [out, in], to the gradient of this step."""
        if self.gradient is None:
            self.gradient = grad.t() @ x
        else:
            self.gradient.addmm_(grad.t(), x)

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
        """Make the quantized weight from the learnables."""
        for rows in self._rows():
            low, high = self._limits(rows)
            values = self._values(self.groups[rows], self.scale[rows], self.v[rows], low, high)
            if self.task.scheme.group_size == 0:
                self.quantized.copy_(values.view_as(self.quantized))
            else:
                columns = self.quantized.shape[1]
                self.quantized[rows].copy_(values.view(values.shape[0], -1)[:, :columns])

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        """One update of offsets and factors from the gradient gathered since the last one, then `refresh`."""
        if self.gradient is None:  # an expert that no token reached
            return
        assert isinstance(self.task.scheme.group_size, int)
        grad = as_groups(self.gradient, self.task.scheme.group_size) if self.padded else self.gradient
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
        self.gradient = None
        self.refresh()

    def snapshot(self) -> tuple[torch.Tensor, ...]:
        return self.v.clone(), self.factor.clone(), self.scale.clone()

    @torch.no_grad()
    def restore(self, state: tuple[torch.Tensor, ...]) -> None:
        self.v, self.factor, self.scale = state
        self.refresh()

    @torch.no_grad()
    def finish(self) -> QuantizedLayer:
        """The codes of the present state, decided once from the weight in its own dtype."""
        return integer_layer(self.task, IntGrid(self.scale, self.zero, self.bits), self.v, self.scale_dtype)
