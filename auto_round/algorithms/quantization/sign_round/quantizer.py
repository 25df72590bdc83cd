"""SignRound: tune the rounding of a block's linears so that the block's output stays what it was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from auto_round.algorithms.quantization.block_task import BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.column_feedback import shared_feedback
from auto_round.algorithms.quantization.layer_codes import ggml_kind, is_integer, small_float
from auto_round.algorithms.quantization.rtn.quantizer import DAMPING, start_blocks, start_grid, start_scales
from auto_round.algorithms.quantization.sign_round.bank_linear import BankLinear
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.float_bank import FloatBank
from auto_round.algorithms.quantization.sign_round.function_linear import FunctionTuningLinear
from auto_round.algorithms.quantization.sign_round.ggml_bank import GgmlBank
from auto_round.algorithms.quantization.sign_round.integer_bank import IntegerBank
from auto_round.algorithms.quantization.sign_round.layer_bank import LayerBank, stack_tasks
from auto_round.algorithms.quantization.sign_round.passes import Learnables, Passes
from auto_round.algorithms.quantization.sign_round.samples import (
    is_checked,
    samples_at_once,
    shuffled_batches,
    split_samples,
)
from auto_round.errors import NumericsError
from auto_round.threads import side_by_side


class SignRoundQuantizer:
    """Signed gradient descent over rounding offsets and scale factors (arXiv 2309.05516, algorithm 1), started from the
    grid that the importance-weighted search finds. The state kept is the best on samples that were not tuned on, judged
    on the same ones every time; if none beats the start, the start."""

    name = "SignRound"
    needs_targets = True

    def __init__(
        self, config: SignRoundConfig, scale_dtype: torch.dtype = torch.float16, optimized_start: bool = True,
        compile_step: bool = False,
    ) -> None:  # fmt: skip
        self.compile_step = compile_step
        self.config = config
        self.scale_dtype = scale_dtype
        self.optimized_start = optimized_start
        self.needs_importance = optimized_start

    def needs_products(self, layer: LayerTask) -> bool:
        return self.optimized_start and ggml_kind(layer) is not None

    def quantize_block(self, task: BlockTask) -> BlockResult:
        learnables, stand_ins = self._learnables(task)
        parents = [_swap(task.block, layer.module, stand_ins[layer.name]) for layer in task.layers]
        parameters = [(p, p.requires_grad) for p in task.block.parameters()]
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        try:
            before, after = self._tune(task, learnables)
            results = {layer.name: layer for part in learnables for layer in part.finish()}
        finally:
            for layer, (parent, attribute) in zip(task.layers, parents, strict=True):
                setattr(parent, attribute, layer.module)
            for parameter, wanted in parameters:
                parameter.requires_grad_(wanted)
        return BlockResult([results[layer.name] for layer in task.layers], before, after, self.config.iters)

    def _learnables(self, task: BlockTask) -> tuple[list[Learnables], dict[str, torch.nn.Module]]:
        """What is tuned, and by layer the module that stands in for it."""
        config = self.config
        options: dict[str, Any] = {
            "compute_dtype": task.compute_dtype,
            "tune_scale": config.enable_minmax_tuning,
            "adam": config.enable_adam,
            "momentum": config.momentum,
        }
        learnables: list[Learnables] = []
        stand_ins: dict[str, torch.nn.Module] = {}
        banked = [layer for layer in task.layers if _has_bank(layer)]
        for tasks in stack_tasks(banked):
            bank = self._bank(tasks, options)
            learnables.append(bank)
            stand_ins |= {layer.name: BankLinear(bank, index) for index, layer in enumerate(tasks)}
        for layer in task.layers:
            if layer.name not in stand_ins:
                one = FunctionTuningLinear(layer, scale_dtype=self.scale_dtype, **options)
                learnables.append(one)
                stand_ins[layer.name] = one
        return learnables, stand_ins

    def _bank(self, tasks: Sequence[LayerTask], options: dict[str, Any]) -> LayerBank:
        """The learnables of layers of one ggml type, integer or small float scheme, at their start."""
        # A moved scale undoes what offsets have learned, where few can be stored or a block's factor moves 256 weights
        # (docs/tuning.md, docs/gguf.md). So such scales stay, unless a rate for them is given.
        moves = self.config.enable_minmax_tuning and self.config.minmax_lr is not None
        device = tasks[0].weight.device
        kind = ggml_kind(tasks[0])
        if kind is not None:
            shared = shared_feedback(tasks, DAMPING, device)
            chosen = partial(start_blocks, kind=kind, optimized=self.optimized_start, shared=shared)
            blocks = side_by_side(chosen, tasks, device)
            return GgmlBank(tasks, blocks, compile_step=self.compile_step, **options | {"tune_scale": moves})
        family = small_float(tasks[0].scheme)
        if family is not None:
            searched = partial(start_scales, family=family, optimized=self.optimized_start)
            starts = side_by_side(searched, tasks, device)
            options = options | {"tune_scale": moves}
            return FloatBank(tasks, family, starts, compile_step=self.compile_step, **options)
        start = partial(start_grid, optimized=self.optimized_start, scale_dtype=self.scale_dtype)
        grids = side_by_side(start, tasks, device)
        return IntegerBank(tasks, grids, scale_dtype=self.scale_dtype, compile_step=self.compile_step, **options)

    def _tune(self, task: BlockTask, layers: Sequence[Learnables]) -> tuple[float, float]:
        config = self.config
        assert task.inputs is not None
        tuned_on, held_out = split_samples(task.inputs.shape[0], task.seed)
        batches = shuffled_batches(tuned_on, config.batch_size * config.gradient_accumulate_steps, task.seed + 1)
        rates = [config.learning_rates(layer.scheme.bits) for layer in layers]
        weights = token_weights(task)
        passes = Passes(task, layers, self._at_once(task, layers))
        start = best = passes.run(lambda at_once: self._loss(task, held_out, weights, at_once))
        best_state: list[tuple[torch.Tensor, ...]] | None = None
        for step in range(config.iters):
            samples = next(batches)
            passes.run(partial(self._gradients, task, samples, weights))
            decay = 1.0 - step / config.iters
            for layer, (lr, scale_lr) in zip(layers, rates, strict=True):
                layer.step(lr * decay, scale_lr * decay)
            done = step + 1
            if is_checked(done, config.iters):
                loss = passes.run(lambda at_once: self._loss(task, held_out, weights, at_once))
                if loss < best or config.not_use_best_mse:
                    best = loss
                    if done == config.iters:
                        return start, best  # the present state is the one to keep
                    best_state = [
                        layer.snapshot(None if best_state is None else best_state[index])
                        for index, layer in enumerate(layers)
                    ]
        for index, layer in enumerate(layers):
            if best_state is None:
                layer.restart()
            else:
                layer.restore(best_state[index])
        return start, best

    def _at_once(self, task: BlockTask, layers: Sequence[Learnables]) -> int:
        """Samples in one pass. The others' functions run in every pass, so they get as few passes as can be."""
        assert task.inputs is not None
        batch = self.config.batch_size
        if not all(isinstance(layer, LayerBank) for layer in layers):
            return batch
        return samples_at_once(batch, int(task.inputs.shape[1]), len(task.layers), task.layers[0].weight.device)

    def _gradients(self, task: BlockTask, samples: Sequence[int], weights: torch.Tensor | None, at_once: int) -> None:
        """The gradients of one step, over passes of `at_once` samples."""
        for at in range(0, len(samples), at_once):
            self._backward(task, samples[at : at + at_once], len(samples), weights)

    def _backward(self, task: BlockTask, samples: Sequence[int], total: int, weights: torch.Tensor | None) -> None:
        """Gradients of the weighted mean squared error of these samples, by their share of the step."""
        assert task.inputs is not None and task.targets is not None
        hidden = task.inputs[samples].to(_device(task), task.compute_dtype)
        with torch.enable_grad():
            output = task.run(hidden, samples)
        with torch.no_grad():
            difference = output - task.targets[samples].to(output)
            count = difference.numel() / difference.shape[0] * total
            if weights is not None:
                difference.mul_(weights[samples].to(difference).unsqueeze(-1))
        output.backward(difference.mul_(2.0 / count))

    @torch.no_grad()
    def _loss(self, task: BlockTask, samples: Sequence[int], weights: torch.Tensor | None, at_once: int) -> float:
        """Weighted mean squared error. Summed along fixed dimensions in float64, so that the number of threads does not
        change it.

        Raises:
            NumericsError: the loss is NaN or Inf.
        """
        assert task.inputs is not None and task.targets is not None
        total, count = 0.0, 0.0
        for at in range(0, len(samples), at_once):
            part = list(samples[at : at + at_once])
            output = task.run(task.inputs[part].to(_device(task), task.compute_dtype), part).float()
            errors = output.sub_(task.targets[part].to(output.device)).square_().sum(-1, dtype=torch.float64)
            if weights is None:
                count += output.numel()
            else:
                shares = weights[part].to(errors)
                errors.mul_(shares)
                count += sum(shares.sum(-1).tolist()) * output.shape[-1]
            total += sum(errors.sum(-1).tolist())
        loss = total / max(count, 1.0)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise NumericsError(
                f"block {task.name}: the loss is {loss}; the block overflows in {task.compute_dtype} on this data"
            )
        return loss


def _device(task: BlockTask) -> torch.device:
    """Where the block is; its samples may be elsewhere."""
    return task.layers[0].weight.device


def _has_bank(layer: LayerTask) -> bool:
    """Whether codes of the layer are stored; other data types are tuned through their function."""
    return ggml_kind(layer) is not None or is_integer(layer.scheme) or small_float(layer.scheme) is not None


def token_weights(task: BlockTask) -> torch.Tensor | None:
    """float32 [N, T], one where a position counts and zero where it is masked; None when all count."""
    return None if task.loss_mask is None else task.loss_mask.float()


def _swap(block: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """Put `new` where `old` is inside `block`; returns the parent and attribute, to put it back."""
    for parent in block.modules():
        for attribute, child in parent.named_children():
            if child is old:
                setattr(parent, attribute, new)
                return parent, attribute
    raise LookupError(f"module {old} is not in its block")
