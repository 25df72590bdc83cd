"""Tuned parameters of layers stacked by rows, and the optimizers that update them (sign, momentum, AdamW).

Rows of a weight are independent, so layers with the same input width and scheme (q, k, v, gate and up; all
experts of a mixture) form one tall matrix. A step is a few passes over that matrix, whatever the number of
layers. There is no autograd graph over weights: the backward pass gives dL/dW, one matrix product, and the
group turns it into a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.codecs.quantized_layer import QuantizedLayer


class StepRule(Protocol):
    """State for one learnable tensor."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """Move `value` in place; `gradient` may be overwritten."""
        ...


class SignStep:
    """`value -= lr * sign(gradient)` (signSGD, Bernstein et al. 2018, arXiv 1802.04434)."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        value.sub_(gradient.sign_(), alpha=lr)


class MomentumSignStep:
    """The sign of a running sum of gradients: `m = momentum * m + g; value -= lr * sign(m)`."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.buffer: torch.Tensor | None = None

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        if self.buffer is None:
            self.buffer = torch.zeros_like(value)
        self.buffer.mul_(self.momentum).add_(gradient)
        value.sub_(self.buffer.sign(), alpha=lr)


class AdamStep:
    """AdamW without weight decay (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.steps = 0
        self.mean: torch.Tensor | None = None
        self.square: torch.Tensor | None = None

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.steps += 1
        self.mean.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = self.square.div(1 - self.beta2**self.steps).sqrt_()
        # Gradients of a mean over many outputs are tiny; an absolute epsilon would stop them. Scale it to the tensor.
        root.add_(root.mean().mul_(1e-4).add_(1e-30))
        value.addcdiv_(self.mean, root, value=-lr / (1 - self.beta1**self.steps))


def make_rule(adam: bool, momentum: float) -> StepRule:
    """A fresh rule for one tensor: AdamW, or the sign of the gradient with or without momentum."""
    if adam:
        return AdamStep()
    return MomentumSignStep(momentum) if momentum > 0 else SignStep()


# The learnables of a block's layers, stacked by rows, so that one pass updates many layers.
#
# Rows of a weight know nothing of each other, so layers with the same input width and scheme (q, k, v, gate and up; all
# experts of a mixture) are one tall matrix here. A step is then a few passes over that matrix, however many layers it
# holds. There is no autograd graph over weights: the backward pass gives dL/dW, one matrix product, and a bank turns it
# into steps of its learnables.

State = tuple[torch.Tensor, ...]
Index = slice | tuple[slice, slice]

SCALE_FACTOR_RANGE = (0.5, 1.5)
_CPU_CHUNK = 1 << 16  # weights handled at a time: the buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 24


class LearnableGroup(ABC):
    """Weights of some layers, quantized by learnables, and the gradient of a step.

    Attributes:
        tasks: the layers; `task.weight` is [out, in].
        scheme: of all of them.
        quantized: the quantized weights on top of each other, in `compute_dtype`; padded where a subclass wants it.
        gradient: dL/dW, shaped alike.
        v: the offsets, float32.
        rules: how offsets and factors move.
        fuse_update: the offsets' rule keeps no state, so that it can move a piece of them at a time.
        start_delta: where offsets start, like `rounding_delta`; None: at zero, which gives the nearest codes.
    """

    rounding_delta: torch.Tensor
    start_delta: torch.Tensor | None = None

    def __init__(
        self, tasks: Sequence[LayerTask], compute_dtype: torch.dtype, starts: Sequence[int], shape: tuple[int, int]
    ) -> None:
        """`starts`: the first row of each layer in matrices of `shape`."""
        self.tasks, self.scheme, self.compute_dtype = list(tasks), tasks[0].scheme, compute_dtype
        device = tasks[0].weight.device
        self.quantized = torch.zeros(shape, dtype=compute_dtype, device=device)
        self.gradient = torch.zeros(shape, dtype=compute_dtype, device=device)
        self._slices = [
            (slice(start, start + task.weight.shape[0]), slice(0, task.weight.shape[1]))
            for start, task in zip(starts, self.tasks, strict=True)
        ]
        self._with_gradient: set[int] = set()
        self._chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK

    def _make_rules(self, count: int, adam: bool, momentum: float) -> None:
        """One for the offsets, the others for factors."""
        self.rules = [make_rule(adam, momentum) for _ in range(count)]
        self.fuse_update = isinstance(self.rules[0], SignStep)

    def _row_chunks(self, groups: torch.Tensor) -> list[slice]:
        """The rows of [rows, groups, n] that are handled at a time."""
        count, step = groups.shape[0], max(1, self._chunk // max(1, groups.shape[1] * groups.shape[2]))
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def _update_rounding_delta(self, gradients: Iterable[tuple[Index, torch.Tensor]], lr: float) -> None:
        """One update of the offsets from (where, dL/dv there). They move there before the next piece is asked for."""
        if self.fuse_update:
            for where, part in gradients:
                self.rules[0].apply(self.rounding_delta[where], part, lr)
            return
        whole = torch.empty_like(self.rounding_delta)
        for where, part in gradients:
            whole[where] = part
        self.rules[0].apply(self.rounding_delta, whole, lr)

    def weight(self, index: int) -> torch.Tensor:
        """The quantized weight [out, in] of a layer; a view that `refresh` keeps current."""
        return self.quantized[self._slices[index]]

    def add_weight_gradient(self, index: int, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add grad.T @ x, [out, in], to the gradient of this step."""
        rows = self.gradient[self._slices[index]]
        if index in self._with_gradient:
            rows.addmm_(grad.t(), x)
        else:
            torch.mm(grad.t(), x, out=rows)
            self._with_gradient.add(index)

    def _complete_gradient(self) -> bool:
        """Whether any layer has gathered a gradient since the last call; those that did not (experts that no token
        reached) have one of zero."""
        if not self._with_gradient:
            return False
        for index, index_slice in enumerate(self._slices):
            if index not in self._with_gradient:
                self.gradient[index_slice].zero_()
        self._with_gradient.clear()
        return True

    def _restart_delta(self) -> None:
        """The offsets back to their start."""
        if self.start_delta is None:
            self.rounding_delta.zero_()
        else:
            self.rounding_delta.copy_(self.start_delta)

    def drop_gradient(self) -> None:
        """Forget what was gathered since the last step."""
        self._with_gradient.clear()

    @abstractmethod
    def refresh(self) -> None:
        """Make the quantized weights from the learnables."""

    @abstractmethod
    def step(self, lr: float, scale_lr: float) -> None:
        """One update of offsets and factors from the gradient gathered since the last one, then `refresh`."""

    @abstractmethod
    def restart(self) -> None:
        """Back to the state before the first step."""

    @abstractmethod
    def snapshot(self, into: State | None = None) -> State:
        """A copy of the present state, in the tensors of an earlier copy where one is given."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Back to a state."""

    @abstractmethod
    def finish(self) -> list[QuantizedLayer]:
        """The codes of the present state, decided once from the weights in their own dtype."""


def stack_tasks(tasks: Sequence[LayerTask]) -> list[list[LayerTask]]:
    """The layers that can share a bank, in the order of their first: of one scheme, stored type, width and device.
    Layers with one scale for the whole tensor are each alone."""
    groups: dict[Any, list[LayerTask]] = defaultdict(list)
    for index, task in enumerate(tasks):
        alone = index if task.scheme.group_size == 0 else None
        groups[task.scheme, task.ggml, task.weight.shape[1], task.weight.device, alone].append(task)
    return list(groups.values())


EDGE = 0.4  # of a step: where offsets start within a code that is not the nearest one, 0.1 inside its border


def copy_state(state: State, into: State | None) -> State:
    """Copies of tensors; in place of `into` where that is given."""
    if into is None:
        return tuple(part.clone() for part in state)
    for part, old in zip(state, into, strict=True):
        old.copy_(part)
    return into


def stacked_weights(tasks: Sequence[LayerTask], compute_dtype: torch.dtype) -> list[torch.Tensor]:
    """The weights [out, in] that learnables are applied to: as products see them, in `compute_dtype`, but in their own
    dtype where that is shorter and float32 holds it exactly."""
    own = compute_dtype == torch.float32
    return [task.weight.contiguous() if own else task.weight.to(compute_dtype) for task in tasks]


def concat_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts on top of each other; a single one as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def consecutive_slices(counts: Sequence[int]) -> list[slice]:
    """Consecutive slices of these lengths."""
    slices, start = [], 0
    for count in counts:
        slices.append(slice(start, start + count))
        start += count
    return slices
