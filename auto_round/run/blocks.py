"""Quantize the model block by block: load, run calibration data, quantize, write the results, release."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.base import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.gptq import MIN_TOKENS
from auto_round.algorithms.transforms.base import BlockTransform, BlockView
from auto_round.calibration.observers import InputHessian, MinMaxObserver, SecondMomentObserver, observe_kv_cache
from auto_round.codecs.activation import quantized_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import NumericsError
from auto_round.modeling.attention import find_attention
from auto_round.modeling.blocks import weight_2d
from auto_round.modeling.partial_loading import BlockLoader, ExpertStreamer, block_loader, expert_of
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import HeapTrimmer
from auto_round.report.progress import Progress
from auto_round.report.run_report import BlockRecord
from auto_round.run import block_layers
from auto_round.run.journal_files import Unit
from auto_round.run.numerics import NumericsPolicy
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.settings import Settings
from auto_round.run.streams import Stream, first_non_finite
from auto_round.run.writers import OutputWriter

if TYPE_CHECKING:
    from auto_round.run.journal import Journal


# Largest relative change of a block's output by a transform: rounding of edited half-precision weights stays below.
_MAX_TRANSFORM_ERROR = 0.02
Layers = Mapping[str, QuantizedLayer]


@dataclass
class RunState:
    """A run while its units are quantized: what all units share, the hidden states between blocks, and the results,
    which are those of `Unit`.

    Attributes:
        dtype: of the matrix products.
        importance: given importance by layer, instead of second moments of the calibration data.
        full: calibration samples in full precision; None when no data is needed, or once it is not finite.
        quantized: the same samples after the quantized blocks; None while one stream is enough.
        smoke: a few tokens after the quantized blocks, to verify the saved model; None without.
    """

    job: Job
    settings: Settings
    source: ModelSource
    outputs: Sequence[OutputWriter]
    quantizer: BlockQuantizer
    dtype: torch.dtype
    numerics: NumericsPolicy
    journal: Journal
    transforms: Sequence[BlockTransform] = ()
    importance: Mapping[str, torch.Tensor] | None = None
    full: Stream | None = None
    quantized: Stream | None = None
    smoke: Stream | None = None
    freed: HeapTrimmer = field(default_factory=HeapTrimmer)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    nearest: dict[str, str] = field(default_factory=dict)
    cache_scales: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.settings.device

    @property
    def inputs(self) -> Stream | None:
        """The samples that the next unit is quantized on."""
        return self.quantized or self.full

    def streams(self) -> dict[str, Stream]:
        """The streams that there are, by their names in the journal."""
        named = {"full": self.full, "quantized": self.quantized, "smoke_sample": self.smoke}
        return {name: stream for name, stream in named.items() if stream is not None}

    def add(self, unit: Unit) -> None:
        """Add the results of a finished unit."""
        self.records += unit.records
        self.cache_scales |= unit.scales
        self.sums |= unit.sums
        self.tokens |= unit.tokens
        self.unreached += unit.unreached
        self.nearest |= unit.nearest

    def restore_unit(self, index: int) -> Unit:
        """Add the results of a finished unit of an interrupted run."""
        unit = self.journal.restored[index]
        self.numerics.restore_from(unit.numerics)
        self.add(unit)
        return unit


class WholeBlock:
    """One block of a run that is in memory as a whole while it is quantized; `layers` are those installed in it."""

    def __init__(self, loader: BlockLoader, quantizer: BlockQuantizer, numerics: NumericsPolicy) -> None:
        self.loader, self.quantizer, self.numerics = loader, quantizer, numerics
        self.name, self.module = loader.block, loader.module
        self.layers: Layers = {}

    def quantize_block(self, task: BlockTask) -> BlockResult:
        return self.quantizer.quantize_block(task)

    def fall_back(self, tasks: Sequence[LayerTask], error: NumericsError) -> BlockResult:
        """What the policy for NaN and Inf makes of the block; raises `error` if it allows nothing."""
        return self.numerics.fall_back(self.name, tasks, error)

    def install(self, tasks: Sequence[LayerTask], result: BlockResult) -> list[LayerTask]:
        """Install dequantized weights and restore those of unquantized layers. Returns the tasks of quantized ones."""
        self.layers = layers = {layer.name: layer for layer in result.layers}
        for task in tasks:
            layer = layers.get(task.name)
            if layer is not None:
                self.numerics.count(task, layer)
            block_layers.install_weight(task, layer)
        return [task for task in tasks if task.name in layers]

    def running(self) -> AbstractContextManager[None]:
        """A context in which the block can be called."""
        return self.loader.running()


class RoundedExperts(WholeBlock):
    """A block whose experts do not fit into memory together. The codes of one expert depend on it alone, so they are
    computed again whenever they are needed: for the smoke sample's tokens and for each format that is written.
    `quantize_block` installs the weights of the other layers."""

    _dense: Callable[[str], Mapping[str, torch.Tensor]] | None = None

    def quantize_block(self, task: BlockTask) -> BlockResult:
        others = [layer for layer in task.layers if not layer.weight.is_meta]
        super().install(others, self.quantizer.quantize_block(replace(task, layers=others)))
        # Not a method: a cycle of references would keep the block's weights in memory.
        make = partial(_round_expert, self.loader, self.quantizer, task)
        layers = ExpertLayers([layer.name for layer in task.layers], self.layers, make)
        self.layers, self._dense = layers, layers.dense
        return BlockResult()

    def fall_back(self, tasks: Sequence[LayerTask], error: NumericsError) -> BlockResult:
        raise error

    def install(self, tasks: Sequence[LayerTask], result: BlockResult) -> list[LayerTask]:
        return list(tasks)

    def running(self) -> AbstractContextManager[None]:
        return self.loader.running(self._dense)


def _round_expert(loader: BlockLoader, quantizer: BlockQuantizer, task: BlockTask, expert: str) -> Layers:
    """Load one expert and quantize its layers."""
    loader.source.load(expert, loader.device)
    try:
        own = [block_layers.with_loaded_weights(layer) for layer in task.layers if expert_of(layer.name) == expert]
        block_layers.share_global_scales(own)
        result = quantizer.quantize_block(replace(task, layers=own))
    finally:
        loader.source.release(expert)
    return {layer.name: layer for layer in result.layers}


class ExpertLayers(Mapping[str, QuantizedLayer]):
    """Layers of a block by name: those of one expert are made by `make` on access, the others are `held` in memory."""

    def __init__(self, names: Sequence[str], held: Layers, make: Callable[[str], Layers]) -> None:
        self._names, self._held, self._make = names, held, make
        self._last: tuple[str, Layers] = ("", {})

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> QuantizedLayer:
        return self._held[name] if name in self._held else self._of(expert_of(name) or name)[name]

    def dense(self, expert: str) -> dict[str, torch.Tensor]:
        """Dequantized weights of one expert, float32 [out, in], by layer name."""
        return {name: layer.dequantize() for name, layer in self._of(expert).items()}

    def _of(self, expert: str) -> Layers:
        if self._last[0] != expert:
            self._last = ("", {})  # free the expert before
            self._last = expert, self._make(expert)
        return self._last[1]


# How a block is quantized, by how it is loaded.
_BLOCKS: dict[type[BlockLoader], type[WholeBlock]] = {BlockLoader: WholeBlock, ExpertStreamer: RoundedExperts}


def quantize_blocks(state: RunState, progress: Progress) -> None:
    """Quantize every block in order and write it to `state.outputs`; finished blocks are restored from the journal."""
    source, blocks, journal = state.source, state.source.blocks, state.journal
    finished = min(journal.finished, len(blocks))
    progress.start(len(blocks), finished)
    for index in range(finished):
        source.apply_edits(state.restore_unit(index).edits)
    if state.numerics.lost is not None:
        state.full = state.quantized = None
    elif state.numerics.diverged:
        state.quantized = None
    for kind, stream in state.streams().items():
        if 0 < journal.finished <= len(blocks):
            stream.restore_from(kind, finished, journal)
        stream.before_offload = lambda: journal.wait_until_written("full", "quantized", "smoke_sample")
    for index, name in list(enumerate(blocks))[finished:]:
        unit, layers, weights = _quantize_block(index, name, state)
        state.add(unit)
        for kind, stream in state.streams().items():
            journal.submit_streams(stream.saved(kind, index + 1))
        write_unit(source, name, layers, unit.scales, state.outputs)
        journal.add(name, unit, weights)
        source.release(name)
        progress.block(name, unit.records[0].loss_before, unit.records[0].loss_after)
        del layers  # free them before the next block is loaded
        state.freed.trim_if_grown()


def _quantize_block(index: int, name: str, state: RunState) -> tuple[Unit, Layers, int]:
    """Quantize one block, and run the samples through it: (its results, its layers, checksum of its weights)."""
    started = time.monotonic()
    source, numerics, journal, unit = state.source, state.numerics, state.journal, Unit()
    loader = block_loader(source, name, state.device, state.dtype, state.job.memory_plan.streams_experts)
    block = _BLOCKS[type(loader)](loader, state.quantizer, numerics)
    module = loader.load()
    weights = journal.checksum(source, name)
    planned = [plan for layer, plan in state.job.quantized().items() if layer.startswith(f"{name}.")]
    for transform in state.transforms:
        _transform_block(transform, index, block, planned, state, unit)
    tasks = [block_layers.layer_task(source, plan) for plan in planned]
    # The journal's thread reads hidden states, which are changed in place: "full" from here on, the others after the
    # block is quantized.
    journal.wait_until_written("full")
    with block_layers.in_dtype(module, source.dtype, state.dtype):
        try:
            result = _quantize_layers(index, block, tasks, state, unit)
        except NumericsError as error:
            result = block.fall_back(tasks, error)
            if state.full is not None and first_non_finite(state.full.hidden) is not None:
                numerics.lost = name
        tasks = block.install(tasks, result)
        journal.wait_until_written("quantized", "smoke_sample")
        steps = {task.module: task.activation for task in tasks if task.activation is not None}
        with quantized_inputs(steps), block.running():
            for stream in (state.quantized, state.smoke):
                if stream is not None:
                    stream.after(index, module, state.device, state.dtype, in_place=True)
    if numerics.lost is not None:
        state.full = state.quantized = None
    if state.quantized is not None and numerics.diverges(name, first_non_finite(state.quantized.hidden)):
        state.quantized = None
    seconds = time.monotonic() - started
    unit.records = [BlockRecord(name, result.loss_before, result.loss_after, result.steps, seconds)]
    unit.numerics = numerics.state()
    return unit, block.layers, weights


def _transform_block(
    transform: BlockTransform, index: int, block: WholeBlock, planned: Sequence[LayerPlan], state: RunState, unit: Unit
) -> None:
    """Apply a transform's edits of a block to the source, and check that its output on a calibration sample remains."""
    source, full, name, module = state.source, state.full, block.name, block.module
    schemes = {plan.name.removeprefix(f"{name}."): plan.scheme for plan in planned}
    reference = None
    with block_layers.in_dtype(module, source.dtype, state.dtype), block.running():
        moments: Mapping[str, torch.Tensor] = {}
        if full is not None:
            with SecondMomentObserver().observing(module, schemes if transform.needs_data else []) as sums:
                full.spare = full.after(index, module, state.device, state.dtype, (sums,))
            reference = full.spare[:1].clone()
            moments = {layer: total / max(sums.tokens[layer], 1) for layer, total in sums.items()}
        edits = transform.edits(BlockView(name, module, schemes, moments))
    edits = {f"{name}.{inner}": edit for inner, edit in edits.items()}
    source.apply_edits(edits)
    unit.edits = {**unit.edits, **edits}
    if full is None or reference is None:
        return
    with torch.no_grad(), block_layers.in_dtype(module, source.dtype, state.dtype), block.running():
        output = full.runner(index, module)(full.hidden[:1].to(state.device, state.dtype), [0])
    error = float((output.cpu().float() - reference.float()).norm() / reference.float().norm())
    if not error < _MAX_TRANSFORM_ERROR:
        raise NumericsError(
            f"{type(transform).__name__} changes what {name} computes: its output differs by {error:.1%} of itself "
            "(a transform may only rewrite a block in an equivalent form)"
        )


def _quantize_layers(
    index: int, block: WholeBlock, tasks: list[LayerTask], state: RunState, unit: Unit
) -> BlockResult:  # fmt: skip
    """Run the block in full precision if there is calibration data, then quantize its layers."""
    name, full, lost = block.name, state.full, state.numerics.lost
    if full is None and lost is not None:
        return state.numerics.without_data(name, tasks, f"no finite calibration data since block {lost}")
    extremes, inputs = MinMaxObserver(), None
    if full is not None:
        inputs = full.hidden
        extremes = _observe(index, block, tasks, full, state, unit)
    block_layers.share_global_scales([layer for layer in tasks if not layer.weight.is_meta])
    for layer in tasks:
        if state.importance is not None:
            given = state.importance.get(layer.name)
            layer.importance = None if given is None else given.to(state.device)
        inner = layer.name.removeprefix(f"{name}.")
        layer.activation = block_layers.activation_of(layer.scheme, inner, extremes, state.source.dtype)
    if not tasks:
        return BlockResult()
    run = _no_data if state.inputs is None else state.inputs.runner(index, block.module)
    task = BlockTask(name, block.module, tasks, run, state.dtype, state.settings.seed + index)
    for layer in tasks:  # free copies in the compute dtype: quantizers start from the source's own weights
        cast = weight_2d(layer.module)
        if cast.dtype != layer.weight.dtype:
            layer.module.weight = torch.nn.Parameter(cast.new_empty(0), requires_grad=False)
    del layer, cast  # references to weights
    state.freed.trim_if_grown()
    if full is not None and state.quantizer.needs_targets:
        _set_samples(task, full, state.quantized, inputs)
    del inputs  # the task holds them, and may move them off the device
    return block.quantize_block(task)


def _observe(
    index: int, block: WholeBlock, tasks: list[LayerTask], full: Stream, state: RunState, unit: Unit
) -> MinMaxObserver:
    """Run the block in full precision, and give its tasks what they need to know of their inputs. Returns the ranges of
    inputs with static scales, by layer name inside the block."""
    name, module, gptq, cache = block.name, block.module, state.settings.gptq, state.job.cache
    inner = {task.name: task.name.removeprefix(f"{name}.") for task in tasks}
    saves = state.settings.save_imatrix is not None
    hessians = gptq is not None or (state.quantizer.needs_importance and state.importance is None)
    wanted = list(inner.values()) if hessians or saves else []
    paired = [inner[task.name] for task in tasks if hessians and state.quantizer.needs_hessian(task)]
    calibrated = {inner[task.name]: task.scheme for task in tasks if task.scheme.calibrated}
    with (
        block.running(),
        SecondMomentObserver().observing(module, wanted) as moments,
        InputHessian(passes=-(-full.hidden.shape[0] // full.batch)).observing(module, paired) as input_hessians,
        MinMaxObserver().observing(module, calibrated) as extremes,
        observe_kv_cache(find_attention(module) if cache.scheme else [], cache.queries) as cached,
    ):
        # The block's inputs are needed again only if it is tuned on them.
        in_place = state.quantized is not None or not state.quantizer.needs_targets
        observers = (moments, input_hessians, extremes, cached)
        targets = full.after(index, module, state.device, state.dtype, observers, in_place)
    full.advance_to(targets)
    if (sample := first_non_finite(targets)) is not None:
        raise NumericsError(
            f"block {name} gives NaN or Inf in full precision on calibration sample {sample}; "
            "check the model and the data, set model_dtype to float32, or continue with on_nan=rtn or keep"
        )
    state.journal.submit_streams({"full": targets})
    unit.scales = cache.scales(name, cached)
    moments.check()
    unit.unreached = [f"{name}.{layer}" for layer in wanted if not moments.tokens[layer]]
    for task in tasks:
        layer = inner[task.name]
        task.importance = moments.get(layer)
        task.input_hessians = input_hessians.of(layer, 1 if gptq is None else MIN_TOKENS)
        if gptq is not None and layer in paired and task.input_hessians is None:
            count = input_hessians.tokens(layer)
            why = "it has the inputs of another layer in some calls only"
            why = f"{count} calibration tokens reached it" if count < MIN_TOKENS else why
            unit.nearest = {**unit.nearest, task.name: f"nearest codes instead of GPTQ: {why}"}
    if saves:
        unit.sums = {f"{name}.{layer}": total.cpu() for layer, total in moments.items()}
        unit.tokens = {f"{name}.{layer}": count for layer, count in moments.tokens.items()}
    block_layers.share_input_ranges(extremes, calibrated)
    return extremes


def _set_samples(task: BlockTask, full: Stream, quantized: Stream | None, inputs: Any) -> None:
    task.inputs, task.targets = inputs if quantized is None else quantized.hidden, full.hidden
    mask = full.captured.loss_mask
    task.loss_mask = None if bool(mask.all()) else mask

    def offload(task: BlockTask) -> bool:
        moved = full.offload()
        if moved:
            task.targets = full.hidden
            task.inputs = quantized.hidden if quantized is not None else inputs.cpu()
        return moved

    task.offload = offload  # takes the task as argument: a reference to it would keep the block's weights in memory


def _no_data(hidden: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
    raise LookupError("this quantizer has no calibration data to run")


def write_unit(
    source: ModelSource, block: str | None, layers: Layers, scales: Mapping[str, torch.Tensor],
    outputs: Sequence[OutputWriter],
) -> None:  # fmt: skip
    """Write the layers, other tensors and static scales of a block, or of all outside the blocks (None), where a tied
    alias is written too if the tensor it is tied to was quantized."""
    replaced = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    outside, tied = block is None, source.tied()
    inside = tuple(f"{name}." for name in (source.blocks if block is None else [block]))
    names = [name for name in source.tensor_names() if name.startswith(inside) != outside and name not in replaced]
    rest = [name for name in names if name not in tied or (outside and tied[name] in replaced)]
    for output in outputs:
        for layer in layers.values():
            output.layer(layer)
        output.tensors(rest, source)
        output.scales(scales)
        if outside:
            output.spare()
