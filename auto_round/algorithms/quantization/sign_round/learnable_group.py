"""Tuned parameters of layers stacked by rows, the optimizers that update them, and the linears that run on them.

Rows of a weight are independent, so layers with the same input width and scheme (q, k, v, gate and up; all experts of a
mixture) form one tall matrix. Only a data type without codes, which is a function, is tuned by autograd.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from auto_round.algorithms.base import LayerTask
from auto_round.codecs.kinds import FunctionCodec
from auto_round.codecs.minifloat import as_blocks, block_chunks, block_shape
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.codecs.registry import reshape_pad_tensor_by_group_size

State = tuple[Tensor, ...]
Index = tuple[slice, slice]
SCALE_FACTOR_RANGE = (0.5, 1.5)
_CPU_CHUNK = 1 << 16  # weights processed at once: the buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 24

# Update rules of one learnable tensor. `apply` moves `value` in place, and may overwrite `gradient`.


class SignStep:
    """`value -= lr * sign(m)` with `m = momentum * m + gradient` (signSGD, Bernstein et al. 2018, arXiv 1802.04434)."""

    def __init__(self, momentum: float = 0.0) -> None:
        self.momentum = momentum
        self.buffer: Tensor | None = None

    def apply(self, value: Tensor, gradient: Tensor, lr: float) -> None:
        if self.momentum:
            self.buffer = torch.zeros_like(value) if self.buffer is None else self.buffer
            gradient.copy_(self.buffer.mul_(self.momentum).add_(gradient))
        value.sub_(gradient.sign_(), alpha=lr)


class AdamStep:
    """AdamW without weight decay (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2, self.steps = beta1, beta2, 0
        self.moments: tuple[Tensor, Tensor] | None = None

    def apply(self, value: Tensor, gradient: Tensor, lr: float) -> None:
        self.moments = self.moments or (torch.zeros_like(value), torch.zeros_like(value))
        self.steps += 1
        mean, square = self.moments
        mean.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = square.div(1 - self.beta2**self.steps).sqrt_()
        # Gradients of a mean over many outputs are tiny; an absolute epsilon would stop them. Scale it to the tensor.
        root.add_(root.mean().mul_(1e-4).add_(1e-30))
        value.addcdiv_(mean, root, value=-lr / (1 - self.beta1**self.steps))


def make_rule(adam: bool, momentum: float) -> AdamStep | SignStep:
    """A fresh update rule for one tensor."""
    return AdamStep() if adam else SignStep(momentum)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled by PyTorch into one pass over the weights, for any shape."""
    return torch.compile(function, dynamic=True)


def copy_state(state: State, into: State | None) -> State:
    """Copies of tensors; in place of `into` where that is given."""
    into = tuple(map(torch.empty_like, state)) if into is None else into
    for part, old in zip(state, into, strict=True):
        old.copy_(part)
    return into


class LearnableGroup:
    """Rounding deltas and scale factors of layers, as blocks [R, M, C, N] stacked along R, and their weights."""

    start_delta: Tensor | None = None  # before the first step; None: zero, which gives the nearest codes

    def __init__(
        self, tasks: Sequence[LayerTask], starts: Sequence[Any], compute_dtype: torch.dtype,
        codes: Sequence[Tensor | None] = (), tune_scale: bool = True, adam: bool = False, momentum: float = 0.0,
        compile_step: bool = False,
    ) -> None:  # fmt: skip
        """Layers with equal in_features and scheme; only one when scales are per tensor. One a layer: `starts`, the
        scales where tuning starts, and `codes`, uint8 [out, in] where rounding starts, None where the grid says.
        `compute_dtype` is that of the matrix products; `compile_step` compiles the elementwise passes."""
        self.tasks, self.scheme, self.codec = list(tasks), tasks[0].scheme, tasks[0].codec
        self.grid = grid = self.codec.tunable(starts)
        self.compute_dtype, self.tune_scale = compute_dtype, tune_scale
        self._values, self._gradients = map(compiled, grid.functions) if compile_step else grid.functions
        shapes = [block_shape((task.weight.shape[0], task.weight.shape[1]), grid.group_size) for task in tasks]
        self.slices = [slice(*ends) for ends in pairwise(accumulate((shape[0] for shape in shapes), initial=0))]
        _, m, c, n = shapes[0]
        self._layer_slices = [
            (slice(part.start * m, part.start * m + task.weight.shape[0]), slice(0, task.weight.shape[1]))
            for part, task in zip(self.slices, self.tasks, strict=True)
        ]
        device = tasks[0].weight.device
        # Rows of all layers, zero-padded: the quantized weights and dL/dW.
        self.quantized = torch.zeros(self.slices[-1].stop * m, c * n, dtype=compute_dtype, device=device)
        self.gradient = torch.zeros_like(self.quantized)
        # As matrix products see the weights, in `compute_dtype`, or in their own dtype where float32 holds it exactly.
        own = compute_dtype == torch.float32
        weights = [as_blocks(task.weight if own else task.weight.to(compute_dtype), grid.group_size) for task in tasks]
        self.blocks = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.chunks = block_chunks(self.blocks, _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK)
        self._with_gradient: set[int] = set()
        self.scale_factors = [torch.ones_like(scale) for scale in grid.start_scales]
        self.rounding_delta = torch.zeros_like(self.blocks, dtype=torch.float32)
        self.rules = [make_rule(adam, momentum) for _ in range(1 + len(self.scale_factors))]
        self.fuse_update = not (adam or momentum)  # without state, chunks can be updated one by one
        self.apply_scale_factors()
        self._start_from(list(codes) or list(grid.start_codes))
        self.refresh()

    @torch.no_grad()
    def _start_from(self, codes: Sequence[Tensor | None]) -> None:
        """Start from `codes`, uint8 [out, in], one a layer; None: from the nearest ones."""
        for rows, given in zip(self.slices, codes, strict=False):
            if given is None:
                continue
            wanted = as_blocks(given, self.grid.group_size)
            for outer, inner in block_chunks(wanted, _CPU_CHUNK if given.device.type == "cpu" else _GPU_CHUNK):
                own = slice(rows.start + outer.start, rows.start + outer.stop), inner
                arguments = self.grid.arguments(own[0])
                self.rounding_delta[own] = self.grid.delta_of(self.blocks[own], wanted[outer, inner], *arguments)
        if bool(self.rounding_delta.any()):
            self.start_delta = self.rounding_delta.clone()

    def apply_scale_factors(self) -> None:
        """Compute the stored scales from `grid.start_scales` and `scale_factors`."""
        self.grid.store([s * f for s, f in zip(self.grid.start_scales, self.scale_factors, strict=True)])

    def _arguments(self, index: Index) -> tuple[Any, ...]:
        return self.blocks[index], self.rounding_delta[index], *self.grid.arguments(index[0])

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        """The layers in their present state, encoded from the weights in their own dtype."""
        return [
            task.quantized(self.codec.encode(task.weight, self.grid.layer(index, rows), self.rounding_delta[rows]))
            for index, (task, rows) in enumerate(zip(self.tasks, self.slices, strict=True))
        ]

    def weight(self, index: int) -> Tensor:
        return self.quantized[self._layer_slices[index]]

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the quantized weights from the learnables."""
        quantized = self.quantized.view(self.blocks.shape)
        for index in self.chunks:
            quantized[index].copy_(self._values(*self._arguments(index)))

    def add_weight_gradient(self, index: int, grad: Tensor, x: Tensor) -> None:
        """Add grad.T @ x, [out, in], to the gradient of this step."""
        rows = self.gradient[self._layer_slices[index]]
        if index in self._with_gradient:
            rows.addmm_(grad.t(), x)
        else:
            torch.mm(grad.t(), x, out=rows)
            self._with_gradient.add(index)

    def drop_gradient(self) -> None:
        self._with_gradient.clear()

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        """Update the learnables from the gradient accumulated since the last step; nothing without one."""
        if not self._with_gradient:
            return
        for index, rows in enumerate(self._layer_slices):
            if index not in self._with_gradient:  # an expert that no token reached
                self.gradient[rows].zero_()
        self._with_gradient.clear()
        r, _, c, _ = self.blocks.shape
        gradient = self.gradient.view(self.blocks.shape)
        slopes: list[Tensor] = []
        whole = None if self.fuse_update else torch.empty_like(self.rounding_delta)
        for where in self.chunks:
            part, *own = self._gradients(*self._arguments(where), gradient[where].float())
            slopes = slopes or [part.new_zeros(r, 1, c, 1) for _ in own]
            for slope, value in zip(slopes, own, strict=True):
                slope[where[0]] += value
            if whole is None:
                self.rules[0].apply(self.rounding_delta[where], part, lr)
            else:
                whole[where] = part
        if whole is not None:
            self.rules[0].apply(self.rounding_delta, whole, lr)
        if self.tune_scale:
            gradients = self.grid.factor_gradients(slopes)
            for rule, factor, slope in zip(self.rules[1:], self.scale_factors, gradients, strict=True):
                rule.apply(factor, slope, scale_lr)
                factor.clamp_(*SCALE_FACTOR_RANGE)
            self.apply_scale_factors()
        self.refresh()

    @torch.no_grad()
    def restart(self) -> None:
        self.rounding_delta.zero_()
        if self.start_delta is not None:
            self.rounding_delta.copy_(self.start_delta)
        for factor in self.scale_factors:
            factor.fill_(1.0)
        self.apply_scale_factors()
        self.refresh()

    @torch.no_grad()
    def snapshot(self, into: State | None = None) -> State:
        """A copy of the state, in the tensors of an earlier copy where one is given."""
        saved = torch.empty_like(self.blocks, dtype=self.grid.state_dtype) if into is None else into[0]
        for index in self.chunks:
            saved[index] = self.grid.to_state(*self._arguments(index))
        return saved, *copy_state(tuple(self.scale_factors), None if into is None else into[1:])

    @torch.no_grad()
    def restore(self, state: State) -> None:
        saved, *self.scale_factors = state
        self.apply_scale_factors()
        for index in self.chunks:
            blocks, _, *arguments = self._arguments(index)
            self.rounding_delta[index] = self.grid.from_state(blocks, saved[index], *arguments)
        self.refresh()


def stack_tasks(tasks: Sequence[LayerTask]) -> list[list[LayerTask]]:
    """Layers that can share a group: of one scheme, stored type, width and device, without a scale for all of it."""
    groups: dict[Any, list[LayerTask]] = defaultdict(list)
    for index, task in enumerate(tasks):
        alone = index if task.scheme.group_size == 0 else None
        groups[task.scheme, task.ggml, task.weight.shape[1], task.weight.device, alone].append(task)
    return list(groups.values())


class _FusedLinear(torch.autograd.Function):
    """`x @ W.T + bias` whose backward gives dL/dW to the group instead of to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: TunableLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.quantized, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,), (x,), layer = grad_outputs, ctx.saved_tensors, ctx.layer
        flat = grad.reshape(-1, grad.shape[-1])
        layer.learnable_group.add_weight_gradient(layer.index, flat, x.reshape(-1, x.shape[-1]))
        return (flat @ layer.quantized).view_as(x) if ctx.needs_input_grad[0] else None, None, None


class TunableLinear(torch.nn.Module):
    """Replaces the linear of `learnable_group.tasks[index]` while its block is tuned."""

    def __init__(self, learnable_group: LearnableGroup, index: int) -> None:
        super().__init__()
        task = learnable_group.tasks[index]
        self.learnable_group, self.index = learnable_group, index
        self.bias = None if task.bias is None else task.bias.to(learnable_group.compute_dtype)
        # autograd calls backward only if some input requires a gradient, and the block's input does not
        self.anchor = torch.zeros(1, requires_grad=True, device=task.weight.device)
        self.quantized = learnable_group.weight(index)
        self.activation = task.activation

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.quantized.dtype)
        if self.activation is not None:
            x = self.activation(x)
        return _FusedLinear.apply(x, self.anchor, self)


class AutogradTunableLinear(torch.nn.Module):
    """Replaces a linear while its block is tuned with autograd through the function of any data type, whose `v` is in
    units of the weight. Steps are in units of one code: `v = u * unit`, the scale that the untuned function
    returned."""

    def __init__(
        self, task: LayerTask, compute_dtype: torch.dtype, scale_dtype: torch.dtype, tune_scale: bool = True,
        adam: bool = False, momentum: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.task, self.compute_dtype = task, compute_dtype
        self.scheme = scheme = task.scheme
        self.codec = FunctionCodec(scheme)
        self.options = task.start_options(True, scale_dtype)
        self.weight_value = weight = task.weight.float()
        self.bias = None if task.bias is None else task.bias.to(compute_dtype)
        with torch.no_grad():
            start, scale, _ = self.codec.call(weight, self.options)
        self.unit = self._expand(scale)
        groups, _ = reshape_pad_tensor_by_group_size(weight, scheme.group_size)
        count = groups.shape[0] * groups.shape[1] if groups.dim() == 4 else groups.shape[0]
        factors = [torch.ones(count, 1, device=weight.device, requires_grad=tune_scale) for _ in range(2)]
        self.learned = [torch.zeros_like(weight, requires_grad=True), *factors]
        self.rules = [make_rule(adam, momentum) for _ in self.learned]
        self.quantized, self.is_current = start.to(compute_dtype), False

    def _expand(self, scale: object) -> Tensor:
        """The scale as one positive value per weight; estimated from the row's range for a scale of unknown shape."""
        weight, scheme = self.weight_value, self.task.scheme
        if isinstance(scale, Tensor) and scale.numel() and not isinstance(scheme.group_size, tuple):
            sizes = scale.detach().abs().float()
            if sizes.numel() == 1:
                return sizes.reshape(1, 1).expand_as(weight)
            if sizes.numel() % weight.shape[0] == 0:
                rows = sizes.reshape(weight.shape[0], -1)
                return rows.repeat_interleave(-(-weight.shape[1] // rows.shape[1]), dim=1)[:, : weight.shape[1]]
        return (weight.abs().amax(-1, keepdim=True) / 2 ** (scheme.bits - 1)).clamp(min=1e-9).expand_as(weight)

    def _learned_parameters(self) -> dict[str, Tensor]:
        return {"v": self.learned[0] * self.unit, "min_scale": self.learned[1], "max_scale": self.learned[2]}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized
        if torch.is_grad_enabled() or not self.is_current:
            weight = self.codec.call(self.weight_value, self.options, **self._learned_parameters())[0]
            weight = weight.to(self.compute_dtype)
        if not torch.is_grad_enabled():
            self.quantized, self.is_current = weight, True
        x = x.to(self.compute_dtype)
        if self.task.activation is not None:
            x = self.task.activation(x)
        return torch.nn.functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        for value, rule, rate in zip(self.learned, self.rules, (lr, scale_lr, scale_lr), strict=True):
            if value.grad is not None:
                rule.apply(value, value.grad, rate)
        for factor in self.learned[1:]:
            factor.clamp_(0.0, 1.0)
        self.drop_gradient()
        self.is_current = False

    def drop_gradient(self) -> None:
        for value in self.learned:
            value.grad = None

    def restart(self) -> None:
        self.restore((torch.zeros(()), torch.ones(()), torch.ones(())))

    def snapshot(self, into: State | None = None) -> State:
        return copy_state(tuple(value.detach() for value in self.learned), into)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        for value, saved in zip(self.learned, state, strict=True):
            value.copy_(saved)
        self.is_current = False

    def finish(self) -> list[QuantizedLayer]:
        codes = self.codec.encode(self.task.weight, self.options, None, **self._learned_parameters())
        return [self.task.quantized(codes)]
