"""How one block is quantized: in memory as a whole, or, if it does not fit, its experts one at a time.

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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from auto_round.algorithms.base import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer
from auto_round.algorithms.quantization.sign_round.loop import MicroBatchRunner, SignRoundQuantizer
from auto_round.calibration.disk_store import ActivationTensor, DiskStore, empty_beside
from auto_round.calibration.expert_rows import (
    GatheredRows,
    InputRecordingExperts,
    ReplayExperts,
    Routing,
    TokenRows,
    gather_rows,
    max_tokens_per_expert,
    replaced_submodule,
    routed_experts,
)
from auto_round.calibration.observers import InputHessian
from auto_round.codecs.activation import quantized_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.envs import work_space
from auto_round.modeling.partial_loading import BlockLoader, block_loader, expert_of
from auto_round.modeling.source import ModelSource
from auto_round.run.block_layers import (
    free_cast_copies,
    in_dtype,
    install_dequantized,
    restore_weight,
    share_global_scales,
    with_loaded_weights,
)
from auto_round.run.expert_layers import ExpertLayers, read_layers, store_layer
from auto_round.run.numerics import NumericsPolicy
from auto_round.run.plan import Job
from auto_round.run.settings import Settings
from auto_round.run.streams import Stream, samples_in_pass

MIN_TOKENS = 32  # tokens to tune an expert: one sixteenth is held out, and fewer than two tokens say nothing
_SEED_STEP = 1_000_003


def streams_experts(job: Job) -> bool:
    """Whether the experts of a block are read one at a time."""
    return job.memory_plan.streams_experts


class WholeBlock:
    """One block of a run that is in memory as a whole while it is quantized.

    Attributes:
        loader: loads and releases it.
        quantizer: of its layers.
        numerics: counts the scales that were clamped.
        layers: the quantized layers by name, once they are installed.
        recovers: its layers can be rounded to nearest when calibration data is not finite.
    """

    recovers = True

    def __init__(self, loader: BlockLoader, quantizer: BlockQuantizer, numerics: NumericsPolicy) -> None:
        self.loader, self.quantizer, self.numerics = loader, quantizer, numerics
        self.layers: Mapping[str, QuantizedLayer] = {}

    def recording(self, full: Stream, hessians: bool) -> AbstractContextManager[Any]:
        """Record what `quantize_block` needs while the block runs on the stream in full precision.

        `hessians`: error feedback is wanted for layers that use it.
        """
        return nullcontext()

    def needs_hessian(self, layer: LayerTask) -> bool:
        """Whether the Hessian of a layer is observed during the run in full precision."""
        return self.quantizer.needs_hessian(layer)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        return self.quantizer.quantize_block(task)

    def install(self, tasks: Sequence[LayerTask], result: BlockResult) -> list[LayerTask]:
        """Install dequantized weights and restore those of unquantized layers. Returns the tasks of quantized ones."""
        self.layers = {layer.name: layer for layer in result.layers}
        self._install(tasks, self.layers)
        return [task for task in tasks if task.name in self.layers]

    def _install(self, tasks: Sequence[LayerTask], layers: Mapping[str, QuantizedLayer]) -> None:
        for task in tasks:
            if task.name in layers:
                self.numerics.count(task, layers[task.name])
                install_dequantized(task, layers[task.name])
            else:
                restore_weight(task)

    def running(self) -> AbstractContextManager[None]:
        """While the context is open, the block can be called; with its quantized weights once they are installed."""
        return self.loader.running()


class StreamedBlock(WholeBlock):
    """A block whose experts are read one at a time. `quantize_block` installs the weights of the other layers."""

    recovers = False
    _dense: Callable[[str], Mapping[str, torch.Tensor]] | None = None

    def install(self, tasks: Sequence[LayerTask], result: BlockResult) -> list[LayerTask]:
        return list(tasks)

    def running(self) -> AbstractContextManager[None]:
        return self.loader.running(self._dense)

    def _set_layers(
        self, task: BlockTask, held: Mapping[str, QuantizedLayer],
        make: Callable[[str], Mapping[str, QuantizedLayer]],
    ) -> None:  # fmt: skip
        """Set the result: layers in memory, and what returns those of one expert."""
        layers = ExpertLayers([layer.name for layer in task.layers], held, make)
        self.layers, self._dense = layers, layers.dense


class RoundedExperts(StreamedBlock):
    """Rounds the experts whenever their codes are needed."""

    def quantize_block(self, task: BlockTask) -> BlockResult:
        others = [layer for layer in task.layers if not layer.weight.is_meta]
        held = {layer.name: layer for layer in super().quantize_block(replace(task, layers=others)).layers}
        self._install(others, held)
        # Not a method: a cycle of references would keep the block's weights in memory.
        self._set_layers(task, held, partial(round_expert, self.loader, self.quantizer, task))
        return BlockResult()


def round_expert(
    loader: BlockLoader, quantizer: BlockQuantizer, task: BlockTask, expert: str
) -> dict[str, QuantizedLayer]:
    """Load one expert and quantize its layers, by name."""
    loader.source.load(expert, loader.device)
    try:
        own = [with_loaded_weights(layer) for layer in task.layers if expert_of(layer.name) == expert]
        share_global_scales(own)
        result = quantizer.quantize_block(replace(task, layers=own))
    finally:
        loader.source.release(expert)
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

    def fed_rows(self) -> ActivationTensor:
        assert self.fed is not None
        return self.fed

    def offload(self) -> bool:
        """Move the buffers off the device. Returns whether any were on it."""
        moved = False
        for which in ("fed", "targets"):
            rows = getattr(self, which)
            if isinstance(rows, torch.Tensor) and rows.device.type != "cpu":
                setattr(self, which, rows.cpu())
                moved = True
        return moved


class PerExpertTuner(StreamedBlock):
    """Tunes a block whose experts are read one at a time (steps 1 to 4 of the module docstring).

    Args:
        loader: reads the block's experts.
        quantizer: tunes the other layers, and each expert.
        numerics: see `WholeBlock`.
        buffers: of the run.
        trim: called when much memory has become free.
    """

    quantizer: SignRoundQuantizer

    def __init__(
        self, loader: BlockLoader, quantizer: SignRoundQuantizer, numerics: NumericsPolicy, buffers: ExpertBuffers,
        trim: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(loader, quantizer, numerics)
        self._buffers, self._trim = buffers, trim
        ((self._inside, self._module),) = routed_experts(loader.module).items()

    def recording(self, full: Stream, hessians: bool) -> AbstractContextManager[Any]:
        """Record the outputs of the experts."""
        self._buffers.codes.clear()
        self._samples, self._tokens = int(full.hidden.shape[0]), int(full.hidden.shape[1])
        self._batch, self._hessians = full.batch, hessians
        assert self.loader.dtype is not None
        shape = (self._samples * self._tokens, self._module.hidden_dim)
        self._buffers.buffer("fed", full.hidden, shape, self.loader.dtype)
        self._record = record = TokenRows(self._buffers.fed_rows, self._tokens, lambda: full.captured.running)
        return self._module.register_forward_hook(lambda _module, _args, output: record.write(output))

    def needs_hessian(self, layer: LayerTask) -> bool:
        """Hessians of experts are computed later, from the tokens that each is tuned on."""
        return expert_of(layer.name) is None and super().needs_hessian(layer)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        rest = replace(task, layers=[layer for layer in task.layers if expert_of(layer.name) is None])
        offload = task.offload
        rest.offload = lambda changed: self._buffers.offload() | offload(changed)
        made = BlockResult()
        if rest.layers:
            with replaced_submodule(task.block, self._inside, ReplayExperts(self._record)):
                made = self.quantizer.quantize_block(rest)
        rest.targets = None
        held = {layer.name: layer for layer in made.layers}
        self._install(rest.layers, held)
        self._trim()
        routing, most = self._feed(rest)
        rest.inputs = None
        self._buffers.buffer("targets", self._buffers.fed_rows(), (most, self._module.hidden_dim), task.compute_dtype)
        counted = self._samples * self._tokens if task.loss_mask is None else int(task.loss_mask.sum())
        before, after = made.loss_before or 0.0, made.loss_after or 0.0
        stored: dict[str, QuantizedLayer] = {}
        for number in range(self._module.num_experts):
            name = f"{self.loader.block}.{self._inside}.{number}"
            own = [layer for layer in task.layers if expert_of(layer.name) == name]
            if own:
                one = replace(rest, name=name, layers=own, loss_mask=None, seed=expert_seed(task.seed, number))
                result = self._quantize(number, one, *routing.expert(number, most))
                stored |= {layer.name: store_layer(layer, self._buffers.codes) for layer in result.layers}
                share = routing.count(number) / max(1, counted)
                before += share * (result.loss_before or 0.0)
                after += share * (result.loss_after or 0.0)
                del one, result
                self._trim()
        self._set_layers(task, held, partial(read_layers, stored))
        return BlockResult([], before, after, self.quantizer.config.iters)

    @torch.no_grad()
    def _feed(self, task: BlockTask) -> tuple[Routing, int]:
        """Run the block up to its experts and record their inputs. Returns which tokens each of them gets, and on how
        many it is tuned at most."""
        fed, device = InputRecordingExperts(self._record), self.loader.device
        steps = {layer.module: layer.activation for layer in task.layers if layer.activation is not None}

        def run_all(micro_batch: int) -> None:
            assert task.inputs is not None
            for at in range(0, self._samples, micro_batch):
                samples = list(range(at, min(at + micro_batch, self._samples)))
                task.run(task.inputs[samples].to(device, task.compute_dtype), samples)

        with quantized_inputs(steps), replaced_submodule(task.block, self._inside, fed):
            MicroBatchRunner(task, (), self._batch, device).run(run_all)
        assert fed.index is not None and fed.weights is not None
        counted, experts = None if task.loss_mask is None else task.loss_mask.reshape(-1), self._module.num_experts
        most = max_tokens_per_expert(self._samples * self._tokens, fed.index.shape[1], experts)
        return Routing.of(fed.index, fed.weights, counted, experts), most

    def _quantize(self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor) -> BlockResult:
        """Quantize one expert. `tokens`: int64 [n], its rows in `fed`; `weights`: float32 [n], of the routing."""
        source = self.loader.source
        task.block = source.load(task.name, self.loader.device)
        try:
            task.layers = [with_loaded_weights(layer) for layer in task.layers]
            share_global_scales(task.layers)
            if tokens.numel() < MIN_TOKENS:
                result = self._buffers.rtn.quantize_block(task)
            else:
                with in_dtype(task.block, source.dtype, task.compute_dtype):
                    result = self._tune(number, task, tokens, weights)
            for layer_task, layer in zip(task.layers, result.layers, strict=True):
                self.numerics.count(layer_task, layer)
        finally:
            source.release(task.name)
        return result

    def _tune(self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor) -> BlockResult:
        """Tune one expert. Its tokens are split into as many sequences as there are samples, so that a step sees the
        same share of the data as a step of a block."""
        buffers, device, count = self._buffers, self.loader.device, tokens.numel()
        each = -(-count // self._samples)
        shares = torch.nn.functional.pad(weights, (0, -count % each)).view(-1, each, 1)

        def set_samples(changed: BlockTask) -> None:
            assert buffers.targets is not None
            changed.inputs = GatheredRows(buffers.fed_rows(), tokens, each)
            changed.targets = GatheredRows(buffers.targets, torch.arange(count), each)

        def offload(changed: BlockTask, outer: Callable[[BlockTask], bool] = task.offload) -> bool:
            moved = outer(changed)
            set_samples(changed)
            return moved

        def run(hidden: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
            made = self._module.run_expert(number, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
            return made * shares[list(sequences)].to(made.device)

        inner = {layer.name: layer.name.removeprefix(f"{task.name}.") for layer in task.layers}
        wanted = [layer for layer in task.layers if self._hessians and self.quantizer.needs_hessian(layer)]
        observed = [inner[layer.name] for layer in wanted]

        @torch.no_grad()
        def compute_targets(micro_batch: int) -> None:
            """The expert's full-precision outputs, `micro_batch` sequences in one pass, and the Hessians."""
            step = micro_batch * each
            with InputHessian(passes=-(-count // step)).observing(task.block, observed) as input_hessians:
                for at in range(0, count, step):
                    part = slice(at, min(at + step, count))
                    hidden = gather_rows(buffers.fed_rows(), tokens[part]).to(device, task.compute_dtype)
                    made = self._module.run_expert(number, hidden) * weights[part, None].to(device)
                    assert buffers.targets is not None
                    buffers.targets[part] = made.to(buffers.targets.device, buffers.targets.dtype)
            for layer in task.layers:
                layer.input_hessians = input_hessians.of(inner[layer.name])

        set_samples(task)
        assert isinstance(task.inputs, GatheredRows)
        task.loss_mask, task.run, task.offload = task.inputs.present, run, offload
        MicroBatchRunner(task, (), samples_in_pass(self._batch, each, device)).run(compute_targets)
        free_cast_copies(task.layers)
        return self.quantizer.quantize_block(task)


def block_opener(
    job: Job, settings: Settings, source: ModelSource, quantizer: Any, numerics: NumericsPolicy, dtype: torch.dtype,
    trim: Callable[[], None], stack: ExitStack,
) -> Callable[[str], WholeBlock]:  # fmt: skip
    """A function that returns a block of a run by its name.

    Args:
        quantizer: of all layers.
        dtype: of the matrix products.
        trim: called when much memory has become free.
        stack: closes the file of the experts' codes.
    """
    streamed: Callable[[BlockLoader, Any, NumericsPolicy], WholeBlock] = RoundedExperts
    if streams_experts(job) and settings.tunes:
        rtn = RTNQuantizer(RTNConfig(disable_opt_rtn=not settings.optimized_start), settings.scale_dtype)
        buffers = ExpertBuffers(stack.enter_context(DiskStore(work_space(), "codes")), rtn)
        streamed = partial(PerExpertTuner, buffers=buffers, trim=trim)

    def open_block(name: str) -> WholeBlock:
        loader = block_loader(source, name, settings.device, dtype, streams_experts(job))
        return (streamed if loader.streams_experts else WholeBlock)(loader, quantizer, numerics)

    return open_block
