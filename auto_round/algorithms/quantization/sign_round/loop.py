"""SignRound's tuning loop: samples, micro-batches, loss on held-out samples, and the best state of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from auto_round.algorithms.base import BlockResult, BlockTask, LayerTask, empty_device_cache, out_of_memory_error
from auto_round.algorithms.gptq import DAMPING, GPTQConfig, feedback_start, shared_hessian_factors
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.learnable_group import (
    AutogradTunableLinear,
    LearnableGroup,
    State,
    TunableLinear,
    stack_tasks,
)
from auto_round.errors import NumericsError
from auto_round.logger import logger
from auto_round.threads import parallel_map

_TOKENS_PER_LAYER = 128  # on a CPU, this many tokens per layer still hide the cost of calling it
_EVALUATIONS = 8  # evaluations of the held-out loss during tuning, besides the start
Tunable = LearnableGroup | AutogradTunableLinear
T = TypeVar("T")


def split_samples(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(tuned on, held out): a sixteenth is held out, at least one; with fewer than four samples all are in both."""
    if count < 4:
        return list(range(count)), list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, count // 16)
    return sorted(order[held:]), sorted(order[:held])


def micro_batch_size(batch: int, tokens: int, layers: int, device: torch.device) -> int:
    """Samples in one pass: on a CPU fewer than the batch, for less memory in the same time; more for many layers."""
    if device.type != "cpu":
        return batch
    return max(1, min(batch, _TOKENS_PER_LAYER * layers // max(1, tokens)))


def is_evaluation_step(done: int, iters: int) -> bool:
    """Whether the held-out loss is evaluated after `done` steps: in the second half, and always at the end."""
    return done == iters or (done % max(1, iters // _EVALUATIONS) == 0 and done > iters // 2)


def shuffled_batches(samples: list[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches: every sample once per epoch, in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(samples))
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            queue += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        yield sorted(queue[:batch])
        queue = queue[batch:]


class MicroBatchRunner:
    """Runs steps in micro-batches, which shrink when the device runs out of memory; a failed step starts again."""

    def __init__(self, task: BlockTask, layers: Sequence[Tunable], micro_batch: int) -> None:
        self.task, self.layers, self.micro_batch = task, layers, micro_batch

    def run(self, step: Callable[[int], T]) -> T:
        """`step(micro_batch)`, retried with less on the device. Raises DeviceError when one sample does not fit."""
        device = self.task.device
        while True:
            try:
                return step(self.micro_batch)
            except torch.OutOfMemoryError as error:
                for layer in self.layers:
                    layer.drop_gradient()
                if self.micro_batch > 1:
                    self.micro_batch //= 2
                    logger.info("%s is out of memory: reducing the micro-batch to %d samples", device, self.micro_batch)
                elif self.task.offload(self.task):
                    logger.info("%s is out of memory: moving the inputs of the blocks to the CPU", device)
                else:
                    raise out_of_memory_error(f"tuning {self.task.name} on one sample", device) from error
            empty_device_cache(device)


class SignRoundQuantizer:
    """Signed gradient descent over rounding deltas and scale factors (arXiv 2309.05516, algorithm 1), started from the
    scales of the importance-weighted search. The state with the lowest loss on fixed held-out samples is kept, the
    start if none is better."""

    name = "SignRound"
    needs_targets = True

    def __init__(
        self, config: SignRoundConfig, scale_dtype: torch.dtype = torch.float16, optimized_start: bool = True,
        compile_step: bool = False, gptq: GPTQConfig | None = None,
    ) -> None:  # fmt: skip
        """`gptq`: start from codes by error feedback where they are better than the nearest ones on held-out samples;
        None: in layers of ggml types only, and without that comparison."""
        self.config, self.scale_dtype, self.compile_step, self.gptq = config, scale_dtype, compile_step, gptq
        self.optimized_start = self.needs_importance = optimized_start

    def needs_hessian(self, layer: LayerTask) -> bool:
        asked = self.gptq is not None
        return (asked or self.optimized_start) and layer.codec.uses_feedback(asked)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        tunables, replacements = self._tunables(task)
        places = {child: (parent, name) for parent in task.block.modules() for name, child in parent.named_children()}
        parameters = [(p, p.requires_grad) for p in task.block.parameters()]
        for layer in task.layers:
            setattr(*places[layer.module], replacements[layer.name])
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        try:
            before, after = self._tune(task, tunables)
            results = {layer.name: layer for part in tunables for layer in part.finish()}
        finally:
            for layer in task.layers:
                setattr(*places[layer.module], layer.module)
            for parameter, required_grad in parameters:
                parameter.requires_grad_(required_grad)
        return BlockResult([results[layer.name] for layer in task.layers], before, after, self.config.iters)

    def _tunables(self, task: BlockTask) -> tuple[list[Tunable], dict[str, torch.nn.Module]]:
        """The tuned groups and layers, and each layer's replacement module by its name."""
        config = self.config
        options: dict[str, Any] = {
            "compute_dtype": task.compute_dtype, "tune_scale": config.enable_minmax_tuning,
            "adam": config.enable_adam, "momentum": config.momentum,
        }  # fmt: skip
        tunables: list[Tunable] = []
        replacements: dict[str, torch.nn.Module] = {}
        for tasks in stack_tasks([layer for layer in task.layers if layer.codec.tuned(layer.weight.shape[1])]):
            # Started from searched scales and codes by error feedback.
            device, damping = tasks[0].weight.device, DAMPING if self.gptq is None else self.gptq.damping
            begin = partial(
                feedback_start, optimized=self.optimized_start, scale_dtype=self.scale_dtype, damping=damping,
                known=shared_hessian_factors(tasks, damping, device),
            )  # fmt: skip
            starts, codes = zip(*parallel_map(begin, tasks, device), strict=True)
            own: dict[str, Any] = {
                "compile_step": self.compile_step,
                "codes": codes if any(part is not None for part in codes) else (),
            }
            if not tasks[0].codec.tunes_scales and config.minmax_lr is None:
                own["tune_scale"] = False
            group = LearnableGroup(tasks, starts, **{**options, **own})
            tunables.append(group)
            replacements |= {layer.name: TunableLinear(group, index) for index, layer in enumerate(tasks)}
        for layer in task.layers:
            if layer.name not in replacements:
                one = AutogradTunableLinear(layer, scale_dtype=self.scale_dtype, **options)
                tunables.append(one)
                replacements[layer.name] = one
        return tunables, replacements

    def _tune(self, task: BlockTask, layers: Sequence[Tunable]) -> tuple[float, float]:
        """Tune the layers to their best state; returns the held-out loss before and after."""
        config = self.config
        assert task.inputs is not None
        samples, tokens = task.inputs.shape[:2]
        tuned_on, held_out = split_samples(samples, task.seed)
        batches = shuffled_batches(tuned_on, config.batch_size * config.gradient_accumulate_steps, task.seed + 1)
        rates = [config.learning_rates(layer.scheme.bits) for layer in layers]
        weights = None if task.loss_mask is None else task.loss_mask.float()
        micro_batch = config.batch_size  # the whole batch where some layer calls its data type's function in every pass
        if all(isinstance(layer, LearnableGroup) for layer in layers):
            micro_batch = micro_batch_size(micro_batch, int(tokens), len(task.layers), task.device)
        runner = MicroBatchRunner(task, layers, micro_batch)
        held_out_loss = partial(runner.run, partial(self._loss, task, held_out, weights))
        start = best = self._choose_start(layers, held_out_loss)
        best_state: list[State | None] = [None] * len(layers)
        for step in range(config.iters):
            runner.run(partial(self._backward, task, next(batches), weights))
            decay = 1.0 - step / config.iters
            for layer, (lr, scale_lr) in zip(layers, rates, strict=True):
                layer.step(lr * decay, scale_lr * decay)
            done = step + 1
            if is_evaluation_step(done, config.iters):
                loss = held_out_loss()
                if loss < best or config.not_use_best_mse:
                    best = loss
                    if done == config.iters:
                        return start, best  # the present state is the one to keep
                    best_state = [layer.snapshot(into) for layer, into in zip(layers, best_state, strict=True)]
        for layer, state in zip(layers, best_state, strict=True):
            if state is None:
                layer.restart()
            else:
                layer.restore(state)
        return start, best

    def _choose_start(self, layers: Sequence[Tunable], held_out_loss: Callable[[], float]) -> float:
        """The held-out loss at the start: with `gptq`, of the codes by error feedback or the nearest, if lower."""
        loss = held_out_loss()
        groups = [layer for layer in layers if isinstance(layer, LearnableGroup) and layer.start_delta is not None]
        if self.gptq is None or not groups:
            return loss
        deltas = [group.start_delta for group in groups]
        for group in groups:
            group.start_delta = None
            group.restart()
        nearest = held_out_loss()
        if nearest < loss:
            return nearest
        for group, delta in zip(groups, deltas, strict=True):
            group.start_delta = delta
            group.restart()
        return loss

    def _backward(self, task: BlockTask, samples: Sequence[int], weights: Tensor | None, micro_batch: int) -> None:
        """Accumulate the gradients of the weighted mean squared error of a step's samples over its passes."""
        assert task.inputs is not None and task.targets is not None
        for start in range(0, len(samples), micro_batch):
            part = samples[start : start + micro_batch]
            hidden = task.inputs[part].to(task.device, task.compute_dtype)
            with torch.enable_grad():
                output = task.run(hidden, part)
            with torch.no_grad():
                difference = output - task.targets[part].to(output)
                count = difference.numel() / difference.shape[0] * len(samples)
                if weights is not None:
                    difference.mul_(weights[part].to(difference).unsqueeze(-1))
            output.backward(difference.mul_(2.0 / count))

    @torch.no_grad()
    def _loss(self, task: BlockTask, samples: Sequence[int], weights: Tensor | None, micro_batch: int) -> float:
        """Weighted mean squared error, the same for any number of threads. Raises NumericsError for NaN or Inf."""
        assert task.inputs is not None and task.targets is not None
        total, count = 0.0, 0.0
        for start in range(0, len(samples), micro_batch):
            part = list(samples[start : start + micro_batch])
            output = task.run(task.inputs[part].to(task.device, task.compute_dtype), part).float()
            errors = output.sub_(task.targets[part].to(output.device)).square_().sum(-1, dtype=torch.float64)
            if weights is None:
                count += output.numel()
            else:
                shares = weights[part].to(errors)
                errors.mul_(shares)
                count += sum(shares.sum(-1).tolist()) * output.shape[-1]
            total += sum(errors.sum(-1).tolist())
        loss = total / max(count, 1.0)
        if not isfinite(loss):
            raise NumericsError(
                f"block {task.name}: the loss is {loss}; the block overflows in {task.compute_dtype} on this data"
            )
        return loss
