"""Quantize the model block by block: load, run calibration data, quantize, write the results, release."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.base import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.gptq import MIN_TOKENS, GPTQConfig
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.algorithms.transforms.base import BlockTransform, BlockView
from auto_round.calibration.capture import CapturedInputs
from auto_round.calibration.disk_store import DiskTensor
from auto_round.calibration.kv_cache_observer import observe_kv_cache
from auto_round.calibration.observers import InputHessian, MinMaxObserver, SecondMomentObserver
from auto_round.codecs.activation import ActivationQuantizer, quantized_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.edits import TensorEdit
from auto_round.errors import NumericsError
from auto_round.modeling.blocks import weight_2d
from auto_round.modeling.partial_loading import ExpertStreamer
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import HeapTrimmer
from auto_round.report.progress import Progress
from auto_round.report.run_report import BlockRecord
from auto_round.run.block_layers import (
    activation_of,
    free_cast_copies,
    in_dtype,
    install_dequantized,
    is_calibrated,
    restore_weight,
    share_global_scales,
    share_input_ranges,
)
from auto_round.run.expert_layers import LayersPerExpert, StoredLayers
from auto_round.run.experts import (
    ExpertBuffers,
    LazyExpertQuantizer,
    PerExpertTuner,
    expert_streamer,
    layer_names,
    streaming_experts,
)
from auto_round.run.fingerprint import block_checksum
from auto_round.run.numerics import NumericsPolicy, RtnFallback
from auto_round.run.plan import CachePlan, Job, LayerPlan
from auto_round.run.streams import Stream, check_activations, first_non_finite
from auto_round.run.unit_state import Unit
from auto_round.run.writers import OutputWriter

if TYPE_CHECKING:
    from auto_round.run.resume import RunJournal


_MAX_TRANSFORM_ERROR = 0.02
"""Largest relative change of a block's output by a transform: rounding of edited half-precision weights stays below."""


@dataclass
class RunState:
    """State of a run while its blocks are quantized: inputs of every block, and the results collected so far.

    Attributes:
        quantizer: quantizes the layers of a block.
        outputs: writers that receive the results.
        device, dtype: of the matrix products.
        calibration: captured samples; None when no data is needed.
        smoke_sample: a few tokens that pass through the quantized blocks to verify the saved model; None without.
        batch: samples in one forward pass.
        quantized_input: tune each block on the output of the quantized blocks before it.
        cache: attention modules that get static scales; None for none.
        importance: given importance by layer, instead of second moments of the calibration data.
        gather: collect `sums` even if the algorithm does not need them.
        journal: finished units, and where further ones are recorded; None for a run that cannot be resumed.
        rtn_fallback: settings of round-to-nearest when calibration data is not finite.
        numerics: the policy for NaN and Inf, and what it did.
        buffers: for blocks whose experts are tuned one at a time; None otherwise.
        transforms: rewrite each block in an equivalent form before it is quantized.
        edits: result: edits of the transforms by tensor name.
        gptq: error feedback for all layers with codes; None for layers in ggml types only.
        sums, tokens: result: sums of squares of the inputs by layer, and over how many tokens.
        records: result: one record per block.
        unreached: result: quantized layers that no calibration token reached (experts).
        nearest: result: layers that got the nearest codes instead of error feedback, with the reasons.
        cache_scales: result: static scales of attention by tensor name, scalars or [heads].
        activations: result: input quantizer by layer.
        smoke_hidden: the smoke sample after the last block.
        last_inputs: the calibration stream after the last block, the input of the layers outside the blocks.
        last_full: the same in full precision; the same object when there is one stream.
        freed: returns the memory of finished blocks to the system.
    """

    quantizer: BlockQuantizer
    outputs: Sequence[OutputWriter]
    device: torch.device
    dtype: torch.dtype
    seed: int
    calibration: CapturedInputs | None = None
    smoke_sample: CapturedInputs | None = None
    batch: int = 8
    quantized_input: bool = True
    cache: CachePlan | None = None
    importance: Mapping[str, torch.Tensor] | None = None
    gather: bool = False
    journal: RunJournal | None = None
    rtn_fallback: RtnFallback = RtnFallback(torch.float16, torch.float32)
    numerics: NumericsPolicy = field(default_factory=NumericsPolicy)
    buffers: ExpertBuffers | None = None
    transforms: Sequence[BlockTransform] = ()
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    gptq: GPTQConfig | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    nearest: dict[str, str] = field(default_factory=dict)
    cache_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    smoke_hidden: torch.Tensor | DiskTensor | None = None
    last_inputs: Stream | None = None
    last_full: Stream | None = None
    freed: HeapTrimmer = field(default_factory=HeapTrimmer)


def quantize_blocks(job: Job, source: ModelSource, state: RunState, progress: Progress) -> None:
    """Quantize every block in order and write it to `state.outputs`; finished blocks are restored from the journal.

    Raises:
        NumericsError: NaN or Inf in weights, activations, scales or loss that `state.numerics` does not handle.
    """
    numerics = state.numerics
    full, smoke_sample = (
        None if captured is None else Stream.of(captured, state.batch, state.device, state.dtype)
        for captured in (state.calibration, state.smoke_sample)
    )
    second = full is not None and state.quantizer.needs_targets and state.quantized_input
    quantized = full.clone() if full is not None and second else None
    finished = min(state.journal.finished, len(source.blocks)) if state.journal is not None else 0
    progress.start(len(source.blocks), finished)
    for index in range(finished):
        source.apply_edits(restore_unit(state, index).edits)
    streams = {"full": full, "quantized": quantized, "smoke_sample": smoke_sample}
    for stream in streams.values():
        if stream is not None:
            stream.before_offload = lambda: _wait_until_written(state, *streams)
    if finished:
        _restore(state, streams, len(source.blocks))
        full = full if numerics.lost is None else None
        quantized = quantized if numerics.lost is None and not numerics.diverged else None
    for index, name in list(enumerate(source.blocks))[finished:]:
        started = time.monotonic()
        experts = expert_streamer(job, source, name, state.device, state.dtype)
        block = source.load(name, state.device) if experts is None else experts.load_non_experts()
        weights = block_checksum(source, name) if state.journal is not None else 0
        planned = [plan for layer, plan in job.quantized().items() if layer.startswith(f"{name}.")]
        for transform in state.transforms:
            _transform_block(transform, index, name, block, planned, source, state, full, experts)
        tasks = [layer_task(source, plan) for plan in planned]
        # The journal's thread reads hidden states, which are changed in place: "full" from here on, the others after
        # the block is quantized.
        _wait_until_written(state, "full")
        if state.buffers is not None:
            state.buffers.codes.clear()
        with in_dtype(block, source.dtype, state.dtype):
            try:
                result = _quantize_block(index, name, block, tasks, state, full, quantized, source.dtype, experts)
            except NumericsError as error:
                if experts is not None:
                    raise
                result = numerics.fall_back(name, tasks, error, state.outputs, state.rtn_fallback)
                if full is not None and first_non_finite(full.hidden) is not None:
                    numerics.lost = name
            tasks = _install_all(tasks, result, numerics)
            steps = {task.module: task.activation for task in tasks if task.activation is not None}
            state.activations |= {task.name: task.activation for task in tasks if task.activation is not None}
            _wait_until_written(state, "quantized", "smoke_sample")
            with quantized_inputs(steps), streaming_experts(experts, result):
                if quantized is not None:
                    quantized.after(index, block, state.device, state.dtype, in_place=True)
                if smoke_sample is not None:
                    smoke_sample.after(index, block, state.device, state.dtype, in_place=True)
        if numerics.lost is not None:
            full = quantized = None
        quantized = _drop_if_not_finite(name, quantized, numerics)
        if not source.lazy:
            _install_all(tasks, result, numerics)
        record = BlockRecord(name, result.loss_before, result.loss_after, result.steps, time.monotonic() - started)
        state.records.append(record)
        unit = _unit(name, state)
        if state.journal is not None:
            for kind, stream in streams.items():
                if stream is not None:
                    state.journal.submit_streams(stream.saved(kind, index + 1))
        write_unit(source, name, result.layers, unit.scales, state.outputs)
        if state.journal is not None:
            state.journal.add(name, unit, weights)
        source.release(name)
        progress.block(name, result.loss_before, result.loss_after)
        del block, tasks, steps, result, unit  # free this block's weights before the next block is loaded
        state.freed.trim_if_grown()
    state.smoke_hidden = smoke_sample.hidden if smoke_sample is not None else None
    state.last_inputs, state.last_full = quantized or full, full


def _wait_until_written(state: RunState, *kinds: str) -> None:
    if state.journal is not None:
        state.journal.wait_until_written(*kinds)


def restore_unit(state: RunState, index: int) -> Unit:
    """Add the results of a finished unit of an interrupted run to `state`."""
    assert state.journal is not None
    unit = state.journal.unit(index)
    state.numerics.restore_from(unit.numerics, state.outputs)
    state.records += unit.records
    state.cache_scales |= unit.scales
    state.sums |= unit.sums
    state.tokens |= unit.tokens
    state.unreached += unit.unreached
    state.nearest |= unit.nearest
    return unit


def _restore(state: RunState, streams: Mapping[str, Stream | None], blocks: int) -> None:
    """Restore the streams after the last finished block."""
    assert state.journal is not None
    for kind, stream in streams.items():
        if stream is not None and state.journal.finished <= blocks:
            if isinstance(stream.hidden, DiskTensor):
                state.journal.journal.stream_into(kind, stream.hidden)
            else:
                stream.hidden = state.journal.journal.stream(kind).to(stream.hidden.device)
            stream.restore_from(kind, state.journal.finished, state.journal.journal.stream)


def _unit(name: str, state: RunState) -> Unit:
    """The results of block `name`, the last finished one, as a unit of the journal."""
    inside = f"{name}."
    sums = {key: value for key, value in state.sums.items() if key.startswith(inside)} if state.gather else {}
    return Unit(
        records=state.records[-1:],
        scales={key: scale for key, scale in state.cache_scales.items() if key.startswith(inside)},
        sums=sums,
        tokens={key: state.tokens[key] for key in sums},
        unreached=[layer for layer in state.unreached if layer.startswith(inside)],
        nearest={layer: why for layer, why in state.nearest.items() if layer.startswith(inside)},
        numerics=state.numerics.state(),
        edits={key: edit for key, edit in state.edits.items() if key.startswith(inside)},
    )


def _transform_block(
    transform: BlockTransform, index: int, name: str, block: torch.nn.Module, planned: Sequence[LayerPlan],
    source: ModelSource, state: RunState, full: Stream | None, experts: ExpertStreamer | None,
) -> None:  # fmt: skip
    """Ask a transform for its edits of a block in full precision, and apply them to the source.

    Raises NumericsError when the block's output on a calibration sample differs afterwards.
    """
    schemes = {plan.name.removeprefix(f"{name}."): plan.scheme for plan in planned}
    reference = None
    with in_dtype(block, source.dtype, state.dtype), streaming_experts(experts):
        moments: Mapping[str, torch.Tensor] = {}
        if full is not None:
            with SecondMomentObserver().observing(block, schemes if transform.needs_data else []) as sums:
                full.spare = full.after(index, block, state.device, state.dtype, (sums,))
            reference = full.spare[:1].clone()
            moments = {layer: total / max(sums.tokens[layer], 1) for layer, total in sums.items()}
        edits = transform.edits(BlockView(name, block, schemes, moments))
    edits = {f"{name}.{inner}": edit for inner, edit in edits.items()}
    source.apply_edits(edits)
    state.edits |= edits
    if full is None or reference is None:
        return
    with torch.no_grad(), in_dtype(block, source.dtype, state.dtype), streaming_experts(experts):
        output = full.runner(index, block)(full.hidden[:1].to(state.device, state.dtype), [0])
    error = float((output.cpu().float() - reference.float()).norm() / reference.float().norm())
    if not error < _MAX_TRANSFORM_ERROR:
        raise NumericsError(
            f"{type(transform).__name__} changes what {name} computes: its output differs by {error:.1%} of itself "
            "(a transform may only rewrite a block in an equivalent form)"
        )


def _drop_if_not_finite(name: str, quantized: Stream | None, numerics: NumericsPolicy) -> Stream | None:
    """The stream through the quantized blocks, or None, with a warning, once it is not finite.

    Raises NumericsError when the policy is to fail.
    """
    sample = None if quantized is None else first_non_finite(quantized.hidden)
    if sample is None:
        return quantized
    incident = f"the blocks quantized up to {name} give NaN or Inf on calibration sample {sample}"
    if numerics.policy == "fail":
        raise NumericsError(f"{incident}, though not in full precision; use --disable_amp, more bits, or on_nan=rtn")
    numerics.log_incident(f"{incident}: the blocks after it are tuned on full-precision inputs")
    numerics.diverged = True
    return None


def _quantize_block(
    index: int, name: str, block: torch.nn.Module, tasks: list[LayerTask], state: RunState,
    full: Stream | None, quantized: Stream | None, model_dtype: torch.dtype, experts: ExpertStreamer | None,
) -> BlockResult:  # fmt: skip
    """Run the block in full precision if the algorithm needs it, then quantize its layers."""
    if full is None and state.numerics.lost is not None:
        reason = f"no finite calibration data since block {state.numerics.lost}"
        return state.numerics.without_data(name, tasks, reason, state.outputs, state.rtn_fallback)
    inputs = targets = None
    inner = {task.name: task.name.removeprefix(f"{name}.") for task in tasks}
    extremes = MinMaxObserver()
    quantizer = state.quantizer
    if full is not None:
        inputs = full.hidden
        weighs = state.quantizer.needs_importance and state.importance is None
        hessians = weighs or state.gptq is not None
        wanted = list(inner.values()) if hessians or state.gather else []
        recording: AbstractContextManager[None] = nullcontext()
        if experts is not None and state.buffers is not None:
            quantizer = _per_expert_tuner(state, experts, full, hessians)
            recording = quantizer.recording()
        paired = [inner[task.name] for task in tasks if hessians and quantizer.needs_hessian(task)]
        fixed = {inner[task.name]: task.scheme for task in tasks if is_calibrated(task.scheme)}
        cache = state.cache
        attentions = cache.attentions(block) if cache is not None else []
        with (
            streaming_experts(experts),
            recording,
            SecondMomentObserver().observing(block, wanted) as moments,
            InputHessian(passes=-(-full.hidden.shape[0] // full.batch)).observing(block, paired) as input_hessians,
            MinMaxObserver().observing(block, fixed) as extremes,
            observe_kv_cache(attentions, cache is not None and cache.queries) as cached,
        ):
            # The block's inputs are needed again only if it is tuned on them.
            in_place = quantized is not None or not state.quantizer.needs_targets
            targets = full.after(
                index, block, state.device, state.dtype, (moments, input_hessians, extremes, cached), in_place
            )
        full.advance_to(targets)
        check_activations(name, targets)
        if state.journal is not None:
            state.journal.submit_streams({"full": targets})
        if cache is not None:
            state.cache_scales |= cache.scales(name, cached)
        moments.check()
        state.unreached += [f"{name}.{layer}" for layer in wanted if not moments.tokens[layer]]
        for layer in tasks:
            layer.importance = moments.get(inner[layer.name])
            least = 1 if state.gptq is None else MIN_TOKENS
            layer.input_hessians = input_hessians.of(inner[layer.name], least)
            if state.gptq is not None and inner[layer.name] in paired and layer.input_hessians is None:
                count = input_hessians.tokens(inner[layer.name])
                why = "it has the inputs of another layer in some calls only"
                why = f"{count} calibration tokens reached it" if count < MIN_TOKENS else why
                state.nearest[layer.name] = f"nearest codes instead of GPTQ: {why}"
        state.sums |= {f"{name}.{layer}": total.cpu() for layer, total in moments.items()}
        state.tokens |= {f"{name}.{layer}": count for layer, count in moments.tokens.items()}
        share_input_ranges(extremes, fixed)
    if state.importance is not None:
        for layer in tasks:
            given = state.importance.get(layer.name)
            layer.importance = None if given is None else given.to(state.device)
    share_global_scales([layer for layer in tasks if not layer.weight.is_meta])
    for layer in tasks:
        layer.activation = activation_of(layer.scheme, inner[layer.name], extremes, model_dtype)
    if not tasks:
        return BlockResult()
    run = (quantized or full).runner(index, block) if full is not None else _no_data
    task = BlockTask(name, block, tasks, run, state.dtype, state.seed + index)
    free_cast_copies(tasks)
    state.freed.trim_if_grown()
    if full is not None and state.quantizer.needs_targets:
        _set_samples(task, full, quantized, inputs, targets)
    del inputs, targets  # the task holds them, and may move them off the device
    if experts is not None and state.buffers is None:
        quantizer = LazyExpertQuantizer(quantizer, experts)
    return quantizer.quantize_block(task)


def _per_expert_tuner(state: RunState, experts: ExpertStreamer, full: Stream, weighs: bool) -> PerExpertTuner:
    """The tuner of a block whose experts are read one at a time."""
    assert state.buffers is not None and isinstance(state.quantizer, SignRoundQuantizer)
    return PerExpertTuner(
        state.quantizer, state.buffers, experts, full.captured, full.hidden, full.batch, weighs,
        partial(_count, state.numerics), state.freed.trim_if_grown,
    )  # fmt: skip


def _set_samples(task: BlockTask, full: Stream, quantized: Stream | None, inputs: Any, targets: Any) -> None:
    """Set the task's inputs, targets and loss mask, and how to move them off the device."""
    task.inputs, task.targets = inputs if quantized is None else quantized.hidden, targets
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


def _install_all(tasks: Sequence[LayerTask], result: BlockResult, numerics: NumericsPolicy) -> list[LayerTask]:
    """Install dequantized weights and restore those of unquantized layers. Returns the tasks of quantized layers."""
    if isinstance(result.layers, StoredLayers):  # installed when the experts were tuned
        return list(tasks)
    layers = result.layers.held.values() if isinstance(result.layers, LayersPerExpert) else result.layers
    by_name = {layer.name: layer for layer in layers}
    for task in tasks:
        if task.name in by_name:
            _count(numerics, task, by_name[task.name])
            install_dequantized(task, by_name[task.name])
        elif not task.weight.is_meta:  # meta: an expert that is not in memory
            restore_weight(task)
    return [task for task in tasks if task.name in by_name or task.weight.is_meta]


def _count(numerics: NumericsPolicy, task: LayerTask, layer: QuantizedLayer) -> None:
    numerics.count(task, layer.codes.clamped_scales(task.weight))


def write_unit(
    source: ModelSource, block: str, layers: Sequence[QuantizedLayer], scales: Mapping[str, torch.Tensor],
    outputs: Sequence[OutputWriter],
) -> None:  # fmt: skip
    """Write a block: its quantized layers, its other tensors, its static scales."""
    replaced = {f"{layer}.{leaf}" for layer in layer_names(layers) for leaf in ("weight", "bias")}
    tied = source.tied()
    names = [name for name in source.tensor_names() if name.startswith(f"{block}.")]
    rest = [name for name in names if name not in replaced and name not in tied]
    for output in outputs:
        for layer in layers:
            output.layer(layer)
        output.tensors(rest, source)
        output.scales(scales)
