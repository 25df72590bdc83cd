"""Quantize the model block by block: load, run calibration data, quantize, write the results, release."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.base import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.gptq import MIN_TOKENS
from auto_round.algorithms.transforms.base import BlockTransform, BlockView
from auto_round.calibration.observers import InputHessian, MinMaxObserver, SecondMomentObserver, observe_kv_cache
from auto_round.codecs.activation import quantized_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import NumericsError
from auto_round.modeling.blocks import weight_2d
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import HeapTrimmer
from auto_round.report.progress import Progress
from auto_round.report.run_report import BlockRecord
from auto_round.run.block_layers import (
    activation_of,
    free_cast_copies,
    in_dtype,
    is_calibrated,
    share_global_scales,
    share_input_ranges,
)
from auto_round.run.experts import WholeBlock
from auto_round.run.journal_files import Unit
from auto_round.run.numerics import NumericsPolicy
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.settings import Settings
from auto_round.run.streams import Stream, check_activations, first_non_finite
from auto_round.run.writers import OutputWriter

if TYPE_CHECKING:
    from auto_round.run.journal import Journal


_MAX_TRANSFORM_ERROR = 0.02
"""Largest relative change of a block's output by a transform: rounding of edited half-precision weights stays below."""


@dataclass
class RunState:
    """A run while its units are quantized: what all units share, the hidden states between blocks, and the results.

    Attributes:
        job, settings, source: of the run.
        outputs: writers that receive the results.
        quantizer: quantizes the layers of a block.
        dtype: of the matrix products.
        numerics: the policy for NaN and Inf, and what it did.
        open_block: returns a block by name: how it is loaded and quantized.
        transforms: rewrite each block in an equivalent form before it is quantized.
        importance: given importance by layer, instead of second moments of the calibration data.
        journal: finished units, and where further ones are recorded.
        full: calibration samples in full precision; None when no data is needed, or once it is not finite.
        quantized: the same samples after the quantized blocks; None while one stream is enough.
        smoke: a few tokens after the quantized blocks, to verify the saved model; None without.
        freed: returns the memory of finished blocks to the system.
        sums, tokens: result: sums of squares of the inputs by layer, and over how many tokens; empty unless an
            importance file is saved.
        records: result: one record per block.
        unreached: result: quantized layers that no calibration token reached (experts).
        nearest: result: layers that got the nearest codes instead of error feedback, with the reasons.
        cache_scales: result: static scales of attention by tensor name, scalars or [heads].
    """

    job: Job
    settings: Settings
    source: ModelSource
    outputs: Sequence[OutputWriter]
    quantizer: BlockQuantizer
    dtype: torch.dtype
    numerics: NumericsPolicy
    open_block: Callable[[str], WholeBlock]
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
        """The device of the matrix products."""
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


def quantize_blocks(state: RunState, progress: Progress) -> None:
    """Quantize every block in order and write it to `state.outputs`; finished blocks are restored from the journal.

    Raises:
        NumericsError: NaN or Inf in weights, activations, scales or loss that `state.numerics` does not handle.
    """
    source, blocks = state.source, state.source.blocks
    finished = min(state.journal.finished, len(blocks))
    progress.start(len(blocks), finished)
    for index in range(finished):
        source.apply_edits(restore_unit(state, index).edits)
    if state.numerics.lost is not None:
        state.full = state.quantized = None
    elif state.numerics.diverged:
        state.quantized = None
    for kind, stream in state.streams().items():
        if 0 < state.journal.finished <= len(blocks):
            stream.restore_from(kind, finished, state.journal)
        stream.before_offload = lambda: state.journal.wait_until_written("full", "quantized", "smoke_sample")
    for index, name in list(enumerate(blocks))[finished:]:
        unit, layers, weights = _quantize_block(index, name, state)
        state.add(unit)
        for kind, stream in state.streams().items():
            state.journal.submit_streams(stream.saved(kind, index + 1))
        write_unit(source, name, layers, unit.scales, state.outputs)
        state.journal.add(name, unit, weights)
        source.release(name)
        progress.block(name, unit.records[0].loss_before, unit.records[0].loss_after)
        del layers  # free them before the next block is loaded
        state.freed.trim_if_grown()


def restore_unit(state: RunState, index: int) -> Unit:
    """Add the results of a finished unit of an interrupted run to `state`."""
    unit = state.journal.restored[index]
    state.numerics.restore_from(unit.numerics)
    state.add(unit)
    return unit


def _quantize_block(index: int, name: str, state: RunState) -> tuple[Unit, Mapping[str, QuantizedLayer], int]:
    """Quantize one block, and run the samples through it. Returns (its results, its layers, a checksum of its original
    weights)."""
    started = time.monotonic()
    source, numerics = state.source, state.numerics
    unit = Unit()
    block = state.open_block(name)
    module = block.loader.load()
    weights = state.journal.checksum(source, name)
    planned = [plan for layer, plan in state.job.quantized().items() if layer.startswith(f"{name}.")]
    for transform in state.transforms:
        _transform_block(transform, index, block, planned, state, unit)
    tasks = [layer_task(source, plan) for plan in planned]
    # The journal's thread reads hidden states, which are changed in place: "full" from here on, the others after the
    # block is quantized.
    state.journal.wait_until_written("full")
    with in_dtype(module, source.dtype, state.dtype):
        try:
            result = _quantize_layers(index, block, tasks, state, unit)
        except NumericsError as error:
            if not block.recovers:
                raise
            result = numerics.fall_back(name, tasks, error)
            if state.full is not None and first_non_finite(state.full.hidden) is not None:
                numerics.lost = name
        tasks = block.install(tasks, result)
        state.journal.wait_until_written("quantized", "smoke_sample")
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
    """Ask a transform for its edits of a block in full precision, and apply them to the source.

    Raises NumericsError when the block's output on a calibration sample differs afterwards.
    """
    source, full, name, module = state.source, state.full, block.loader.block, block.loader.module
    schemes = {plan.name.removeprefix(f"{name}."): plan.scheme for plan in planned}
    reference = None
    with in_dtype(module, source.dtype, state.dtype), block.running():
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
    with torch.no_grad(), in_dtype(module, source.dtype, state.dtype), block.running():
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
    name, module, full = block.loader.block, block.loader.module, state.full
    if full is None and state.numerics.lost is not None:
        reason = f"no finite calibration data since block {state.numerics.lost}"
        return state.numerics.without_data(name, tasks, reason)
    inner = {task.name: task.name.removeprefix(f"{name}.") for task in tasks}
    extremes, inputs = MinMaxObserver(), None
    if full is not None:
        inputs = full.hidden
        extremes = _observe(index, block, tasks, full, state, unit)
    if state.importance is not None:
        for layer in tasks:
            given = state.importance.get(layer.name)
            layer.importance = None if given is None else given.to(state.device)
    share_global_scales([layer for layer in tasks if not layer.weight.is_meta])
    for layer in tasks:
        layer.activation = activation_of(layer.scheme, inner[layer.name], extremes, state.source.dtype)
    if not tasks:
        return BlockResult()
    run = _no_data if state.inputs is None else state.inputs.runner(index, module)
    task = BlockTask(name, module, tasks, run, state.dtype, state.settings.seed + index)
    free_cast_copies(tasks)
    state.freed.trim_if_grown()
    if full is not None and state.quantizer.needs_targets:
        _set_samples(task, full, state.quantized, inputs)
    del inputs  # the task holds them, and may move them off the device
    return block.quantize_block(task)


def _observe(
    index: int, block: WholeBlock, tasks: list[LayerTask], full: Stream, state: RunState, unit: Unit
) -> MinMaxObserver:
    """Run the block in full precision, and give its tasks what they need to know of their inputs.

    Returns the ranges of the inputs with static scales, by layer name inside the block.
    """
    name, module, gptq = block.loader.block, block.loader.module, state.settings.gptq
    inner = {task.name: task.name.removeprefix(f"{name}.") for task in tasks}
    saves, cache = state.settings.save_imatrix is not None, state.job.cache
    hessians = gptq is not None or (state.quantizer.needs_importance and state.importance is None)
    wanted = list(inner.values()) if hessians or saves else []
    paired = [inner[task.name] for task in tasks if hessians and block.needs_hessian(task)]
    calibrated = {inner[task.name]: task.scheme for task in tasks if is_calibrated(task.scheme)}
    attentions = cache.attentions(module) if cache is not None else []
    with (
        block.running(),
        block.recording(full, hessians),
        SecondMomentObserver().observing(module, wanted) as moments,
        InputHessian(passes=-(-full.hidden.shape[0] // full.batch)).observing(module, paired) as input_hessians,
        MinMaxObserver().observing(module, calibrated) as extremes,
        observe_kv_cache(attentions, cache is not None and cache.queries) as cached,
    ):
        # The block's inputs are needed again only if it is tuned on them.
        in_place = state.quantized is not None or not state.quantizer.needs_targets
        observers = (moments, input_hessians, extremes, cached)
        targets = full.after(index, module, state.device, state.dtype, observers, in_place)
    full.advance_to(targets)
    check_activations(name, targets)
    state.journal.submit_streams({"full": targets})
    if cache is not None:
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
    share_input_ranges(extremes, calibrated)
    return extremes


def _set_samples(task: BlockTask, full: Stream, quantized: Stream | None, inputs: Any) -> None:
    """Set the task's inputs, targets and loss mask, and how to move them off the device."""
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


def layer_task(source: ModelSource, plan: LayerPlan) -> LayerTask:
    """The task of a loaded linear layer, with the source's own weight and bias."""
    module = source.model.get_submodule(plan.name)
    bias = getattr(module, "bias", None)
    return LayerTask(
        plan.name, module, weight_2d(module).detach(), plan.scheme,
        bias=None if bias is None else bias.detach(), transposed=plan.transposed, ggml=plan.ggml,
    )  # fmt: skip


def write_unit(
    source: ModelSource, block: str, layers: Mapping[str, QuantizedLayer], scales: Mapping[str, torch.Tensor],
    outputs: Sequence[OutputWriter],
) -> None:  # fmt: skip
    """Write a block: its quantized layers, its other tensors, its static scales."""
    replaced = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    tied = source.tied()
    names = [name for name in source.tensor_names() if name.startswith(f"{block}.")]
    rest = [name for name in names if name not in replaced and name not in tied]
    for output in outputs:
        for layer in layers.values():
            output.layer(layer)
        output.tensors(rest, source)
        output.scales(scales)
