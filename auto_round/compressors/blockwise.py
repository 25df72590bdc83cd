"""The walk: one block at a time is read, quantized, handed to the sinks and forgotten."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.quantization.block_task import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.calibration.cache_extremes import cache_extremes
from auto_round.calibration.extremes import InputExtremes, input_extremes
from auto_round.calibration.inputs import CapturedInputs
from auto_round.calibration.products import input_products
from auto_round.calibration.spill import SpilledTensor
from auto_round.calibration.statistics import input_second_moments
from auto_round.compressors.activations import activation_of, is_calibrated, join_extremes
from auto_round.compressors.block_dtype import in_dtype
from auto_round.compressors.cache import CachePlan
from auto_round.compressors.global_scales import share_global_scales
from auto_round.compressors.install import drop_copies, install, put_back
from auto_round.compressors.job import Job, LayerPlan
from auto_round.compressors.layers_by_expert import LayersByExpert, StoredLayers
from auto_round.compressors.non_finite import FallBack, Numbers
from auto_round.compressors.resume.fingerprint import block_checksum
from auto_round.compressors.resume.unit_state import Unit
from auto_round.compressors.scale_limits import clamped_scales
from auto_round.compressors.sinks import Sink
from auto_round.compressors.streamed_experts import LaterExperts, experts_run, layer_names, one_expert
from auto_round.compressors.streams import Stream, check_activations, first_non_finite
from auto_round.compressors.tuned_experts import ExpertByExpert, ExpertRooms
from auto_round.data_type.activation import ActivationQuantizer, quantized_inputs
from auto_round.errors import NumericsError
from auto_round.modeling.blocks import weight_2d
from auto_round.modeling.one_expert import OneExpert
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer
from auto_round.report.memory import FreedMemory
from auto_round.report.progress import Progress
from auto_round.report.run_report import BlockRecord

if TYPE_CHECKING:
    from auto_round.compressors.resume.run_journal import RunJournal


@dataclass
class Walk:
    """What a walk needs besides the model and the job, and what it leaves.

    Attributes:
        quantizer: decides the codes.
        sinks: take the results.
        device, dtype: of the matrix products.
        calibration: the samples; None for plain rounding.
        probe: a few tokens that go through the quantized blocks, to check the saved model with; None without a check.
        batch: samples in one forward pass.
        quantized_input: tune on the output of the quantized blocks before.
        cache: which attention modules get static scales; None for none.
        importance: by layer, in place of what the calibration data would say; None without.
        gather: the sums below are wanted even if the algorithm does not need them.
        journal: what is finished already, and where to note what will be; None for a run that is not gone on with.
        fall: what plain rounding has to know, where calibration is not finite.
        numbers: what is done about NaN and Inf; filled in: what came of it.
        rooms: of blocks whose experts are tuned one at a time; None where they are not.
        sums, tokens: filled in: sums of squares of the inputs by layer, and over how many tokens.
        records: filled in, one a block.
        unreached: quantized layers that no calibration token reached (experts).
        cache_scales: filled in: those scales by tensor name, scalars or [heads].
        activations: filled in: by layer, how its inputs are quantized.
        probe_hidden: the probe after the last block.
        last_inputs: the calibration stream after the last block, which the layers outside the blocks are fed.
        last_full: the same without quantization; the same object when there is one stream.
        freed: what blocks leave behind.
    """

    quantizer: BlockQuantizer
    sinks: Sequence[Sink]
    device: torch.device
    dtype: torch.dtype
    seed: int
    calibration: CapturedInputs | None = None
    probe: CapturedInputs | None = None
    batch: int = 8
    quantized_input: bool = True
    cache: CachePlan | None = None
    importance: Mapping[str, torch.Tensor] | None = None
    gather: bool = False
    journal: RunJournal | None = None
    fall: FallBack = FallBack(torch.float16, torch.float32)
    numbers: Numbers = field(default_factory=Numbers)
    rooms: ExpertRooms | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    cache_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    probe_hidden: torch.Tensor | SpilledTensor | None = None
    last_inputs: Stream | None = None
    last_full: Stream | None = None
    freed: FreedMemory = field(default_factory=FreedMemory)


def walk_blocks(job: Job, source: ModelSource, walk: Walk, progress: Progress) -> None:
    """Quantize every block in order.

    Raises:
        NumericsError: NaN or Inf in weights, activations, scales or loss, with the place, where `walk.numbers` is to
            fail of it or cannot do otherwise.
    """
    numbers = walk.numbers
    full = _stream(walk, walk.calibration)
    second = full is not None and walk.quantizer.needs_targets and walk.quantized_input
    quantized = full.clone() if full is not None and second else None
    probe = _stream(walk, walk.probe)
    finished = min(walk.journal.finished, len(source.blocks)) if walk.journal is not None else 0
    progress.start(len(source.blocks), finished)
    for index, name in enumerate(source.blocks[:finished]):
        _emit(job, source, name, take_unit(walk, index), walk.sinks)
    streams = {"full": full, "quantized": quantized, "probe": probe}
    for stream in streams.values():
        if stream is not None:
            stream.before_offload = lambda: _until_written(walk, *streams)
    if finished:
        _restore(walk, streams, len(source.blocks))
        full = full if numbers.lost is None else None
        quantized = quantized if numbers.lost is None and not numbers.diverged else None
    for index, name in list(enumerate(source.blocks))[finished:]:
        started = time.monotonic()
        experts = one_expert(job, source, name, walk.device, walk.dtype)
        block = source.load(name, walk.device) if experts is None else experts.load_others()
        weights = block_checksum(source, name) if walk.journal is not None else 0
        planned = [plan for layer, plan in job.quantized().items() if layer.startswith(f"{name}.")]
        tasks = [layer_task(source, plan) for plan in planned]
        # It writes hidden states, and those are changed in place: these from here on, the others behind the tuning.
        _until_written(walk, "unit", "full")
        if walk.rooms is not None:
            walk.rooms.codes.clear()
        with in_dtype(block, source.dtype, walk.dtype):
            try:
                result = _quantize_block(index, name, block, tasks, walk, full, quantized, source.dtype, experts)
            except NumericsError as error:
                if experts is not None:
                    raise
                result = numbers.fall_back(name, tasks, error, walk.sinks, walk.fall)
                if full is not None and first_non_finite(full.hidden) is not None:
                    numbers.lost = name
            tasks = _install_all(tasks, result, numbers)
            steps = {task.module: task.activation for task in tasks if task.activation is not None}
            walk.activations |= {task.name: task.activation for task in tasks if task.activation is not None}
            _until_written(walk, "quantized", "probe")
            with quantized_inputs(steps), experts_run(experts, result):
                if quantized is not None:
                    quantized.after(index, block, walk.device, walk.dtype, in_place=True)
                if probe is not None:
                    probe.after(index, block, walk.device, walk.dtype, in_place=True)
        if numbers.lost is not None:
            full = quantized = None
        quantized = _still_finite(name, quantized, numbers)
        if not source.lazy:
            _install_all(tasks, result, numbers)
        record = BlockRecord(name, result.loss_before, result.loss_after, result.steps, time.monotonic() - started)
        walk.records.append(record)
        unit = _unit(name, result.layers, walk)
        if walk.journal is not None:
            hidden = [s.kept(kind, index + 1) for kind, s in streams.items() if s is not None]
            walk.journal.add(name, unit, weights, {kind: kept for one in hidden for kind, kept in one.items()})
        _emit(job, source, name, unit, walk.sinks)
        source.release(name)
        progress.block(name, result.loss_before, result.loss_after)
        del block, tasks, steps, result, unit  # or this block's weights would be in memory together with the next one's
        walk.freed.give_back()
    walk.probe_hidden = probe.hidden if probe is not None else None
    walk.last_inputs, walk.last_full = quantized or full, full


def _until_written(walk: Walk, *kinds: str) -> None:
    if walk.journal is not None:
        walk.journal.until_written(*kinds)


def take_unit(walk: Walk, index: int) -> Unit:
    """A finished unit out of the journal, with all that it added to the walk."""
    assert walk.journal is not None
    unit = walk.journal.unit(index, walk.device, in_file=walk.rooms is not None)
    walk.numbers.go_on(unit.numbers, walk.sinks)
    walk.activations |= unit.activations
    walk.records += unit.records
    walk.cache_scales |= unit.scales
    walk.sums |= unit.sums
    walk.tokens |= unit.tokens
    walk.unreached += unit.unreached
    return unit


def _restore(walk: Walk, streams: Mapping[str, Stream | None], blocks: int) -> None:
    """The streams after the last finished unit; behind the blocks only the probe is needed."""
    assert walk.journal is not None
    for kind, stream in streams.items():
        if stream is not None and (kind == "probe" or walk.journal.finished <= blocks):
            if isinstance(stream.hidden, SpilledTensor):
                walk.journal.stream_into(kind, stream.hidden)
            else:
                stream.hidden = walk.journal.stream(kind).to(stream.hidden.device)
            stream.go_on(kind, walk.journal.finished, walk.journal.stream)


def _unit(name: str, layers: Sequence[QuantizedLayer], walk: Walk) -> Unit:
    """What the block of this name, the last that was done, added to the walk."""
    inside = f"{name}."
    sums = {key: value for key, value in walk.sums.items() if key.startswith(inside)} if walk.gather else {}
    return Unit(
        layers,
        {layer: step for layer, step in walk.activations.items() if layer.startswith(inside)},
        walk.records[-1:],
        {key: scale for key, scale in walk.cache_scales.items() if key.startswith(inside)},
        sums,
        {key: walk.tokens[key] for key in sums},
        [layer for layer in walk.unreached if layer.startswith(inside)],
        walk.numbers.state(),
    )


def _still_finite(name: str, quantized: Stream | None, numbers: Numbers) -> Stream | None:
    """The stream through the quantized blocks as long as it is finite: None goes on from full-precision inputs.

    Raises NumericsError where the policy is to fail.
    """
    sample = None if quantized is None else first_non_finite(quantized.hidden)
    if sample is None:
        return quantized
    said = f"the blocks quantized up to {name} give NaN or Inf on calibration sample {sample}"
    if numbers.policy == "fail":
        raise NumericsError(f"{said}, though not in full precision; use --disable_amp, more bits, or on_nan=rtn")
    numbers.note(f"{said}: the blocks after it are tuned on full-precision inputs")
    numbers.diverged = True
    return None


def _stream(walk: Walk, captured: CapturedInputs | None) -> Stream | None:
    if captured is None:
        return None
    return Stream.of(captured, walk.batch, walk.device, walk.dtype)


def _quantize_block(
    index: int, name: str, block: torch.nn.Module, tasks: list[LayerTask], walk: Walk,
    full: Stream | None, quantized: Stream | None, model_dtype: torch.dtype, experts: OneExpert | None,
) -> BlockResult:  # fmt: skip
    """Run the block in full precision where the algorithm wants it, then decide its layers."""
    if full is None and walk.numbers.lost is not None:
        reason = f"no finite calibration data since block {walk.numbers.lost}"
        return walk.numbers.without_data(name, tasks, reason, walk.sinks, walk.fall)
    inputs = targets = None
    inner = {task.name: task.name.removeprefix(f"{name}.") for task in tasks}
    extremes = InputExtremes()
    quantizer = walk.quantizer
    if full is not None:
        inputs = full.hidden
        weighs = walk.quantizer.needs_importance and walk.importance is None
        wanted = list(inner.values()) if weighs or walk.gather else []
        recording: AbstractContextManager[None] = nullcontext()
        if experts is not None and walk.rooms is not None:
            quantizer = _by_expert(walk, experts, full, weighs)
            recording = quantizer.recording()
        paired = [inner[task.name] for task in tasks if weighs and quantizer.needs_products(task)]
        fixed = {inner[task.name]: task.scheme for task in tasks if is_calibrated(task.scheme)}
        cache = walk.cache
        attentions = cache.attentions(block) if cache is not None else []
        with (
            experts_run(experts),
            recording,
            input_second_moments(block, wanted) as moments,
            input_products(block, paired, -(-full.hidden.shape[0] // full.batch)) as products,
            input_extremes(block, fixed) as extremes,
            cache_extremes(attentions, cache is not None and cache.queries) as cached,
        ):
            # What the block was fed is needed again only where it is tuned on that.
            in_place = quantized is not None or not walk.quantizer.needs_targets
            targets = full.after(index, block, walk.device, walk.dtype, (moments, products, extremes, cached), in_place)
        full.move_on(targets)
        check_activations(name, targets)
        if walk.journal is not None:
            walk.journal.keep("full", targets)
        if cache is not None:
            walk.cache_scales |= cache.scales(name, cached)
        moments.check()
        walk.unreached += [f"{name}.{layer}" for layer in wanted if not moments.tokens[layer]]
        for layer in tasks:
            layer.importance = moments.get(inner[layer.name])
            layer.products = products.of(inner[layer.name])
        walk.sums |= {f"{name}.{layer}": total.cpu() for layer, total in moments.items()}
        walk.tokens |= {f"{name}.{layer}": count for layer, count in moments.tokens.items()}
        join_extremes(extremes, fixed)
    if walk.importance is not None:
        for layer in tasks:
            given = walk.importance.get(layer.name)
            layer.importance = None if given is None else given.to(walk.device)
    share_global_scales([layer for layer in tasks if not layer.weight.is_meta])
    for layer in tasks:
        layer.activation = activation_of(layer.scheme, inner[layer.name], extremes, model_dtype)
    if not tasks:
        return BlockResult()
    run = (quantized or full).runner(index, block) if full is not None else _no_data
    task = BlockTask(name, block, tasks, run, walk.dtype, walk.seed + index)
    drop_copies(tasks)
    walk.freed.give_back()
    if full is not None and walk.quantizer.needs_targets:
        _give_samples(task, full, quantized, inputs, targets)
        mask = full.captured.loss_mask
        task.loss_mask = None if bool(mask.all()) else mask
    del inputs, targets  # the task has them, and may move them
    if experts is not None and walk.rooms is None:
        quantizer = LaterExperts(quantizer, experts)
    return quantizer.quantize_block(task)


def _by_expert(walk: Walk, experts: OneExpert, full: Stream, weighs: bool) -> ExpertByExpert:
    """How a block is tuned whose experts are read one at a time."""
    assert walk.rooms is not None and isinstance(walk.quantizer, SignRoundQuantizer)
    return ExpertByExpert(
        walk.quantizer, walk.rooms, experts, full.captured, full.hidden, full.batch, weighs,
        partial(_count, walk.numbers), walk.freed.give_back,
    )  # fmt: skip


def _give_samples(task: BlockTask, full: Stream, quantized: Stream | None, inputs: Any, targets: Any) -> None:
    """Hand over what the block is tuned on, and the way to get it off the device."""
    task.inputs, task.targets = inputs if quantized is None else quantized.hidden, targets

    def offload(task: BlockTask) -> bool:
        moved = full.offload()
        if moved:
            task.targets = full.hidden
            task.inputs = quantized.hidden if quantized is not None else inputs.cpu()
        return moved

    task.offload = offload  # it does not hold the task, which would keep the block's weights in memory


def _no_data(hidden: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
    raise LookupError("this quantizer has no calibration data to run")


def layer_task(source: ModelSource, plan: LayerPlan) -> LayerTask:
    """A loaded linear layer as a task. Weight and bias are the source's own tensors, in its dtype."""
    module = source.model.get_submodule(plan.name)
    bias = getattr(module, "bias", None)
    return LayerTask(
        plan.name, module, weight_2d(module).detach(), plan.scheme,
        bias=None if bias is None else bias.detach(), transposed=plan.transposed, ggml=plan.ggml,
    )  # fmt: skip


def _install_all(tasks: Sequence[LayerTask], result: BlockResult, numbers: Numbers) -> list[LayerTask]:
    """Put dequantized weights in place, and those of layers that stay back. Returns the tasks that were done."""
    if isinstance(result.layers, StoredLayers):  # done when the experts were
        return list(tasks)
    layers = result.layers.held.values() if isinstance(result.layers, LayersByExpert) else result.layers
    by_name = {layer.name: layer for layer in layers}
    for task in tasks:
        if task.name in by_name:
            _count(numbers, task, by_name[task.name])
            install(task, by_name[task.name])
        elif not task.weight.is_meta:  # of an expert that is not in memory
            put_back(task)
    return [task for task in tasks if task.name in by_name or task.weight.is_meta]


def _count(numbers: Numbers, task: LayerTask, layer: QuantizedLayer) -> None:
    numbers.count(task, clamped_scales(task, layer))


def _emit(job: Job, source: ModelSource, block: str, unit: Unit, sinks: Sequence[Sink]) -> None:
    names = [n for n in source.tensor_names() if n.startswith(f"{block}.")]
    replaced = {f"{layer}.{leaf}" for layer in layer_names(unit.layers) for leaf in ("weight", "bias")}
    tied = source.tied()
    rest = [n for n in names if n not in replaced and n not in tied]
    for sink in sinks:
        for layer in unit.layers:
            sink.layer(layer)
        sink.tensors(rest, source)
        sink.scales(unit.scales)
