"""Quantize the experts of a block one at a time, for blocks that do not fit in memory.

Rounding to nearest needs one layer only, so an expert's codes are computed again whenever they are needed: for
the smoke sample's tokens and for each format that is written. That costs time and no memory. Tuning works in
four steps:

1. Run the block in full precision with one expert in memory at a time; record the experts' outputs.
2. Tune the other layers on the block's loss, with the recorded outputs in place of the experts.
3. Run the block with those layers quantized up to its experts; record the experts' inputs and the routing.
4. Tune each expert by itself: its tokens of step 3 against its full-precision outputs, both multiplied by the
   routing weight, so that a token counts as it does in the block. Write its codes to a file.

The result does not depend on how many experts would fit. docs/adr/0018 gives the reasons and the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from auto_round.algorithms.base import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.sign_round.loop import MicroBatchRunner, SignRoundQuantizer
from auto_round.calibration.capture import CapturedInputs
from auto_round.calibration.disk_store import ActivationTensor, DiskStore, empty_beside
from auto_round.calibration.expert_rows import (
    GatheredRows,
    InputRecordingExperts,
    ReplayExperts,
    Routing,
    TokenRows,
    gather_rows,
    max_tokens_per_expert,
    record_outputs,
    replaced_submodule,
    routed_experts,
)
from auto_round.calibration.observers import InputHessian
from auto_round.codecs.activation import quantized_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.modeling.partial_loading import ExpertStreamer, expert_of
from auto_round.modeling.source import ModelSource
from auto_round.run.block_layers import (
    free_cast_copies,
    in_dtype,
    install_dequantized,
    share_global_scales,
    with_loaded_weights,
)
from auto_round.run.expert_layers import LayersPerExpert, StoredLayers, store_layer
from auto_round.run.plan import Job
from auto_round.run.streams import samples_in_pass

MIN_TOKENS = 32  # tokens to tune an expert: one sixteenth is held out, and fewer than two tokens say nothing
_SEED_STEP = 1_000_003


def streams_experts(job: Job) -> bool:
    """Whether the experts of a block are read one at a time."""
    return job.memory_plan is not None and job.memory_plan.streams_experts


def expert_streamer(
    job: Job, source: ModelSource, block: str, device: torch.device, dtype: torch.dtype
) -> ExpertStreamer | None:
    """Reads the experts of a block one at a time; None when the block has none or is loaded as a whole."""
    if not streams_experts(job) or not any(expert_of(name) for name in job.layers if name.startswith(f"{block}.")):
        return None
    return ExpertStreamer(source, block, device, dtype)


@contextmanager
def streaming_experts(experts: ExpertStreamer | None, result: BlockResult | None = None) -> Iterator[None]:
    """Make a block with streamed experts callable: with its own experts, or with the quantized ones of `result`."""
    if experts is None:
        yield
        return
    layers = None if result is None else result.layers
    with experts.running(layers.dense if isinstance(layers, LayersPerExpert) else None):
        yield


def layer_names(layers: Sequence[QuantizedLayer]) -> list[str]:
    """Names of layers, without computing lazy ones."""
    return layers.names if isinstance(layers, LayersPerExpert) else [layer.name for layer in layers]


class LazyExpertQuantizer:
    """A quantizer that rounds the layers of a block, but those of streamed experts only when they are accessed."""

    def __init__(self, inner: BlockQuantizer, experts: ExpertStreamer) -> None:
        self.name, self.needs_importance = inner.name, inner.needs_importance
        self.needs_targets = inner.needs_targets
        self._inner, self._experts = inner, experts

    def needs_hessian(self, layer: LayerTask) -> bool:
        return self._inner.needs_hessian(layer)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        others = [layer for layer in task.layers if not layer.weight.is_meta]
        quantized = self._inner.quantize_block(replace(task, layers=others))
        held = {layer.name: layer for layer in quantized.layers}
        return BlockResult(LazyExpertLayers(self._experts, task, held, self._inner))


class LazyExpertLayers(LayersPerExpert):
    """Layers of a block; those of an expert are loaded and rounded when they are accessed."""

    def __init__(
        self, experts: ExpertStreamer, task: BlockTask, held: Mapping[str, QuantizedLayer], quantizer: BlockQuantizer
    ) -> None:
        super().__init__([layer.name for layer in task.layers], held)
        self._experts, self._task, self._quantizer = experts, task, quantizer

    def _make(self, expert: str) -> dict[str, QuantizedLayer]:
        source = self._experts.source
        source.load(expert, self._experts.device)
        try:
            own = [with_loaded_weights(task) for task in self._task.layers if expert_of(task.name) == expert]
            share_global_scales(own)
            result = self._quantizer.quantize_block(replace(self._task, layers=own))
        finally:
            source.release(expert)
        return {layer.name: layer for layer in result.layers}


def expert_seed(block_seed: int, number: int) -> int:
    """Seed of the order in which the tokens of expert `number` are sampled."""
    return block_seed + _SEED_STEP * (number + 1)


@dataclass
class ExpertBuffers:
    """Buffers that all blocks of a run share when their experts are tuned one at a time.

    Attributes:
        codes: file for the codes of a block's experts.
        rtn: quantizes experts that too few tokens reach.
        fed: [N * T, H], the outputs of the block's experts, and later their inputs.
        targets: [max tokens per expert, H], the full-precision outputs of one expert.
    """

    codes: DiskStore
    rtn: BlockQuantizer
    fed: ActivationTensor | None = None
    targets: ActivationTensor | None = None

    def buffer(
        self, which: str, like: ActivationTensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> ActivationTensor:
        """`fed` or `targets` with this shape, stored like `like`; the previous block's buffer is reused if it fits."""
        rows: ActivationTensor | None = getattr(self, which)
        if rows is None or (tuple(rows.shape), rows.dtype) != (shape, dtype):
            rows = empty_beside(like, shape, dtype)
            setattr(self, which, rows)
        return rows

    def offload(self) -> bool:
        """Move the buffers off the device. Returns whether any were on it."""
        moved = False
        for which in ("fed", "targets"):
            rows = getattr(self, which)
            if isinstance(rows, torch.Tensor) and rows.device.type != "cpu":
                setattr(self, which, rows.cpu())
                moved = True
        return moved


class PerExpertTuner:
    """Tunes a block whose experts are read one at a time (steps 1 to 4 of the module docstring).

    Args:
        inner: tunes the other layers, and each expert.
        buffers: of the run.
        experts: reads the block's experts.
        captured: the samples.
        hidden: their hidden states [N, T, H], used for shape and storage only.
        batch: samples in one pass without gradients.
        weighs: importance and Hessians come from calibration data.
        done: called with each quantized layer while its original weight is in memory.
        between: called when much memory has become free.
    """

    needs_targets = True

    def __init__(
        self, inner: SignRoundQuantizer, buffers: ExpertBuffers, experts: ExpertStreamer, captured: CapturedInputs,
        hidden: ActivationTensor, batch: int, weighs: bool, done: Callable[[LayerTask, QuantizedLayer], None],
        between: Callable[[], None],
    ) -> None:  # fmt: skip
        self.name, self.needs_importance = inner.name, inner.needs_importance
        self._inner, self._buffers, self._experts, self._captured = inner, buffers, experts, captured
        self._batch, self._weighs, self._done, self._between = batch, weighs, done, between
        block = experts.source.model.get_submodule(experts.block)
        ((self._inside, self._module),) = routed_experts(block).items()
        self._samples, self._tokens = int(hidden.shape[0]), int(hidden.shape[1])
        assert experts.dtype is not None
        buffers.buffer("fed", hidden, (self._samples * self._tokens, self._module.hidden_dim), experts.dtype)

    def needs_hessian(self, layer: LayerTask) -> bool:
        """Hessians of experts are computed later, from the tokens that each is tuned on."""
        return expert_of(layer.name) is None and self._inner.needs_hessian(layer)

    def recording(self) -> AbstractContextManager[None]:
        """Record the outputs of the experts inside this context."""
        return record_outputs(self._module, self._record())

    def quantize_block(self, task: BlockTask) -> BlockResult:
        rest = replace(task, layers=[layer for layer in task.layers if expert_of(layer.name) is None])
        rest.offload = partial(self._offload, task.offload)
        made = BlockResult()
        if rest.layers:
            with replaced_submodule(task.block, self._inside, ReplayExperts(self._record())):
                made = self._inner.quantize_block(rest)
        rest.targets = None
        for layer_task, layer in zip(rest.layers, made.layers, strict=True):
            self._done(layer_task, layer)
            install_dequantized(layer_task, layer)
        self._between()
        fed = self._feed(rest)
        rest.inputs = None
        tokens, counted = self._samples * self._tokens, task.loss_mask
        assert fed.index is not None and fed.weights is not None
        most = max_tokens_per_expert(tokens, fed.index.shape[1], self._module.num_experts)
        routing = Routing.of(
            fed.index, fed.weights, None if counted is None else counted.reshape(-1), self._module.num_experts
        )
        del fed
        self._buffers.buffer("targets", self._fed(), (most, self._module.hidden_dim), task.compute_dtype)
        tokens = tokens if counted is None else int(counted.sum())
        before, after = made.loss_before or 0.0, made.loss_after or 0.0
        stored: dict[str, QuantizedLayer] = {}
        for number in range(self._module.num_experts):
            name = f"{self._experts.block}.{self._inside}.{number}"
            own = [layer for layer in task.layers if expert_of(layer.name) == name]
            if own:
                one = replace(rest, name=name, layers=own, loss_mask=None, seed=expert_seed(task.seed, number))
                result = self._quantize(number, one, *routing.expert(number, most))
                stored |= {layer.name: store_layer(layer, self._buffers.codes) for layer in result.layers}
                share = routing.count(number) / max(1, tokens)
                before += share * (result.loss_before or 0.0)
                after += share * (result.loss_after or 0.0)
                del one, result
                self._between()
        held = {layer.name: layer for layer in made.layers}
        layers = StoredLayers([layer.name for layer in task.layers], held, stored)
        return BlockResult(layers, before, after, self._inner.config.iters)

    def _record(self) -> TokenRows:
        return TokenRows(self._fed, self._tokens, lambda: self._captured.running)

    def _fed(self) -> ActivationTensor:
        assert self._buffers.fed is not None
        return self._buffers.fed

    def _offload(self, streams: Callable[[BlockTask], bool], task: BlockTask) -> bool:
        """Move the buffers and the hidden states off the device."""
        moved = self._buffers.offload()
        return streams(task) or moved

    @torch.no_grad()
    def _feed(self, task: BlockTask) -> InputRecordingExperts:
        """Run the block up to its experts and record their inputs and routing."""
        fed, device = InputRecordingExperts(self._record()), self._experts.device
        steps = {layer.module: layer.activation for layer in task.layers if layer.activation is not None}
        with quantized_inputs(steps), replaced_submodule(task.block, self._inside, fed):

            def run_all(micro_batch: int) -> None:
                assert task.inputs is not None
                for at in range(0, self._samples, micro_batch):
                    samples = list(range(at, min(at + micro_batch, self._samples)))
                    task.run(task.inputs[samples].to(device, task.compute_dtype), samples)

            MicroBatchRunner(task, (), self._batch, device).run(run_all)
        return fed

    def _quantize(self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor) -> BlockResult:
        """Quantize one expert. `tokens`: int64 [n], its rows in `fed`; `weights`: float32 [n], of the routing."""
        source = self._experts.source
        task.block = source.load(task.name, self._experts.device)
        try:
            task.layers = [with_loaded_weights(layer) for layer in task.layers]
            share_global_scales(task.layers)
            if tokens.numel() < MIN_TOKENS:
                result = self._buffers.rtn.quantize_block(task)
            else:
                with in_dtype(task.block, source.dtype, task.compute_dtype):
                    result = self._tune(number, task, tokens, weights)
            for layer_task, layer in zip(task.layers, result.layers, strict=True):
                self._done(layer_task, layer)
        finally:
            source.release(task.name)
        return result

    def _tune(self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor) -> BlockResult:
        """Tune one expert. Its tokens are split into as many sequences as there are samples, so that a step sees the
        same share of the data as a step of a block."""
        each = -(-tokens.numel() // self._samples)
        rows = torch.arange(tokens.numel())
        shares = torch.zeros(-(-tokens.numel() // each) * each)
        shares[: tokens.numel()] = weights
        shares = shares.view(-1, each, 1)

        def set_samples(task: BlockTask) -> None:
            fed, targets = self._fed(), self._buffers.targets
            assert targets is not None
            task.inputs, task.targets = GatheredRows(fed, tokens, each), GatheredRows(targets, rows, each)

        offload_all = task.offload

        def offload(task: BlockTask) -> bool:
            moved = offload_all(task)
            set_samples(task)
            return moved

        def run(hidden: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
            made = self._module.run_expert(number, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
            return made * shares[list(sequences)].to(made.device)

        set_samples(task)
        assert isinstance(task.inputs, GatheredRows)
        task.loss_mask, task.run, task.offload = task.inputs.present, run, offload
        micro_batch = samples_in_pass(self._batch, each, self._experts.device)
        MicroBatchRunner(task, (), micro_batch).run(partial(self._target, number, task, tokens, weights, each))
        free_cast_copies(task.layers)
        return self._inner.quantize_block(task)

    @torch.no_grad()
    def _target(
        self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor, each: int, micro_batch: int
    ) -> None:
        """Compute the expert's full-precision outputs, `micro_batch` sequences of `each` tokens in one pass."""
        buffers, device, step = self._buffers, self._experts.device, micro_batch * each
        assert buffers.fed is not None and buffers.targets is not None
        inner = {layer.name: layer.name.removeprefix(f"{task.name}.") for layer in task.layers}
        paired = [inner[layer.name] for layer in task.layers if self._weighs and self._inner.needs_hessian(layer)]
        with InputHessian(passes=-(-tokens.numel() // step)).observing(task.block, paired) as input_hessians:
            for at in range(0, tokens.numel(), step):
                part = slice(at, min(at + step, tokens.numel()))
                hidden = gather_rows(buffers.fed, tokens[part]).to(device, task.compute_dtype)
                made = self._module.run_expert(number, hidden) * weights[part, None].to(device)
                buffers.targets[part] = made.to(buffers.targets.device, buffers.targets.dtype)
        for layer in task.layers:
            layer.input_hessians = input_hessians.of(inner[layer.name])
