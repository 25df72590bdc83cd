"""What a run consists of: units of work, each a layer to round or a tensor to copy, and where their results go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from auto_round import envs
from auto_round.algorithms.quantization.layer_codes import small_float
from auto_round.compressors.dense_experts import FusedTarget
from auto_round.compressors.job import Job, LayerPlan
from auto_round.compressors.model_free.slices import row_step
from auto_round.compressors.planning import expert_joiner, separate_tensors
from auto_round.errors import ModelError
from auto_round.export.formats import OutputFormat, TensorSpecs
from auto_round.modeling.fused import fused_groups
from auto_round.modeling.skeleton_source import SkeletonSource

_SMALL = 4 << 20
_COPY = 32 << 20


@dataclass(frozen=True)
class Unit:
    """One thing to do.

    Attributes:
        name: of the layer or tensor (the first, where there are several).
        layers: layers to round, together because they share a scale; empty for a copy.
        copies: tensors that are copied, by their names in the model; several where they are parts of one in the file.
        outputs: names in the file of what it writes to.
        files: which files have to be there.
        memory: bytes that it holds at most, about.
    """

    name: str
    layers: tuple[str, ...]
    copies: tuple[str, ...]
    outputs: tuple[str, ...]
    files: tuple[Path, ...]
    memory: int


@dataclass(frozen=True)
class Work:
    """All units in order, with the shapes and dtypes of the file's tensors and how parts find their place in them."""

    units: tuple[Unit, ...]
    tensors: TensorSpecs
    targets: Mapping[str, FusedTarget]


def plan_work(job: Job, source: SkeletonSource, fmt: OutputFormat) -> Work:
    """The units of a job, in the model's order."""
    separate = separate_tensors(fmt, dict(job.layers), source)
    targets = expert_joiner(fmt, dict(job.layers), source).targets
    tensors: TensorSpecs = {}
    for name, (shape, dtype) in separate.items():
        target = targets.get(name)
        if target is None:
            tensors[name] = (shape, dtype)
        else:
            tensors[target.name] = (target.shape, dtype)
    final = lambda name: targets[name].name if name in targets else name
    quantized = job.quantized()
    units: list[Unit] = []
    for group in _layer_groups(quantized, fmt, source.dtype, targets):
        outputs: dict[str, None] = {}
        reads: list[str] = []
        for layer in group:
            outputs |= dict.fromkeys(map(final, layer_outputs(fmt, quantized[layer], source.dtype)))
            reads += [f"{layer}.weight"] + ([f"{layer}.bias"] if quantized[layer].bias_dtype is not None else [])
        memory = sum(_layer_memory(quantized[layer], source, fmt) for layer in group)
        units.append(Unit(group[0], group, (), tuple(outputs), _files(source, reads), memory))
    made = {name for layer in quantized for name in layer_outputs(fmt, quantized[layer], source.dtype)}
    copies: dict[str, list[str]] = defaultdict(list)
    for name in separate:
        if name not in made:
            copies[final(name)].append(name)
    for output, names in copies.items():
        size = sum(_bytes(source.tensor_meta(n)) for n in names[:2])
        memory = _copy_memory(source, names, size)
        units.append(Unit(names[0], (), tuple(names), (output,), _files(source, names), memory))
    order = {name: i for i, name in enumerate(source.tensor_names())}
    place = lambda unit: min(order.get(n, 0) for n in (*unit.copies, *(f"{layer}.weight" for layer in unit.layers)))
    return Work(tuple(sorted(units, key=place)), tensors, targets)


def layer_outputs(fmt: OutputFormat, plan: LayerPlan, dtype: torch.dtype) -> TensorSpecs:
    """What a format makes of one layer."""
    return fmt.tensor_specs(
        plan.name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype, model_dtype=dtype,
        transposed=plan.transposed,
    )  # fmt: skip


def _layer_groups(
    quantized: Mapping[str, LayerPlan], fmt: OutputFormat, dtype: torch.dtype, targets: Mapping[str, FusedTarget]
) -> list[tuple[str, ...]]:
    """Layers one by one, but those together that runtimes join under one global scale, and those that share one row of
    a stacked tensor (gate and up of an expert that is written dense)."""
    shared = []
    for name, plan in quantized.items():
        family = small_float(plan.scheme)
        if family is not None and family.has_global_scale:
            shared.append(name)
    groups = fused_groups(shared, across_experts=False) if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE else []
    rows: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, plan in quantized.items() if targets else ():
        for output in layer_outputs(fmt, plan, dtype):
            target = targets.get(output)
            if target is not None and target.piece is not None and target.piece.part != "all":
                rows[target.name, target.piece.expert].append(name)
    joined = {
        name: group for group in (*(tuple(dict.fromkeys(row)) for row in rows.values()), *groups) for name in group
    }
    return list(dict.fromkeys(joined.get(name, (name,)) for name in quantized))


def _files(source: SkeletonSource, names: Iterable[str]) -> tuple[Path, ...]:
    stored = getattr(source.files, "stored", source.files)
    found = {stored.tensors[key].file for name in names for key in source.inputs(name)}
    return tuple(sorted(found))


def _bytes(meta: tuple[tuple[int, ...], torch.dtype]) -> int:
    count = meta[1].itemsize
    for size in meta[0]:
        count *= size
    return count


def _layer_memory(plan: LayerPlan, source: SkeletonSource, fmt: OutputFormat) -> int:
    """The weight, as stored too where it is dequantized or cast, its codes and what is packed of them."""
    weights = plan.out_features * plan.in_features
    step = row_step(plan, fmt, source.dtype) if plain_copy(source, f"{plan.name}.weight") else None
    if step is not None:
        rounded = step * plan.in_features * (source.dtype.itemsize + 2)
        return rounded + sum(_bytes(spec) for spec in layer_outputs(fmt, plan, source.dtype).values()) + _SMALL
    packed = sum(_bytes(spec) for spec in layer_outputs(fmt, plan, source.dtype).values())
    stored = sum(_stored_bytes(source, key) for key in source.inputs(f"{plan.name}.weight"))
    same = stored == weights * source.dtype.itemsize
    return weights * (source.dtype.itemsize + 1) + (0 if same else min(stored, 2 * weights)) + packed + _SMALL


def _stored_bytes(source: SkeletonSource, key: str) -> int:
    stored = getattr(source.files, "stored", source.files).tensors[key]
    return int(stored.end - stored.start)


def _copy_memory(source: SkeletonSource, names: Sequence[str], size: int) -> int:
    return _COPY if len(names) == 1 and plain_copy(source, names[0]) else 2 * size + _SMALL


def plain_copy(source: SkeletonSource, name: str) -> bool:
    """Whether a tensor's bytes are those of the file."""
    plan = source._plans.get(source.tied().get(name, name))
    if plan is None:
        raise ModelError(f"tensor {name!r} is missing from the files in {source.folder}")
    key = plan.origin.keys[0][0]
    weights = getattr(source.files, "weights", {})
    return plan.piece is None and key not in weights and source.files.tensors[key].dtype == source.tensor_meta(name)[1]
