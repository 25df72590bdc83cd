"""Split a model-free run into units of work: a layer to round (large ones by row slices) or a tensor to copy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from auto_round import envs
from auto_round.algorithms.encode_layer import is_integer, minifloat_spec
from auto_round.errors import ModelError
from auto_round.formats.base import OutputFormat, TensorSpecs
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.layer_rules import fused_groups
from auto_round.run.file_layout import FileLayout, FusedTarget, plan_files, separate_tensors
from auto_round.run.plan import Job, LayerPlan
from auto_round.schemes import QuantizationScheme

LARGE = 1 << 23
"""Weights from which on a layer is sliced."""
SLICE = 1 << 22
"""Weights of one slice, about."""
_ROWS = 32  # what all packings along the rows fill whole words with


def row_step(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> int | None:
    """Rows of a slice, None where the layer is rounded whole: it is small, its rows share a scale, or the format packs
    something that is not a row's."""
    if plan.out_features * plan.in_features < LARGE or plan.transposed or not _by_rows(plan.scheme):
        return None
    size = plan.scheme.group_size
    unit = max(_ROWS, size[0]) if isinstance(size, tuple) else _ROWS
    step = max(unit, SLICE // plan.in_features // unit * unit)
    if unit % _ROWS or step >= plan.out_features or plan.out_features % _ROWS:
        return None
    return step if slice_axes(plan, fmt, dtype, step) is not None else None


def _by_rows(scheme: QuantizationScheme) -> bool:
    """Whether every row (or block of rows) is rounded by itself."""
    if scheme.group_size == 0:
        return False
    family = minifloat_spec(scheme)
    return is_integer(scheme) if family is None else not family.has_global_scale


def slice_axes(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype, step: int) -> dict[str, int] | None:
    """By tensor of the packed layer, the dimension in which slices of rows follow each other; None where there is no
    such dimension."""
    whole, part = _specs(plan, fmt, dtype), _specs(replace(plan, out_features=step), fmt, dtype)
    axes = {}
    for name, (shape, _) in whole.items():
        differ = [i for i, (a, b) in enumerate(zip(shape, part[name][0], strict=True)) if a != b]
        if len(differ) != 1:
            return None
        axes[name] = differ[0]
    return axes


def _specs(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return fmt.tensor_specs(
        plan.name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype, model_dtype=dtype,
        transposed=plan.transposed,
    )  # fmt: skip


def row_ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the slices."""
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def empty_packed(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Room for the packed layer."""
    return {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in _specs(plan, fmt, dtype).items()}


# What a run consists of: units of work, each a layer to round or a tensor to copy, and where their results go.

_SMALL = 4 << 20
_COPY = 32 << 20


@dataclass(frozen=True)
class Unit:
    """One thing to do.

    Attributes:
        name: of the layer or tensor (the first, where there are several).
        layers: layers to round, together because they share a scale or a tensor of the file; empty for a copy.
        copies: dense tensors that are written otherwise than they are stored, by their names in the model; several
            where they are parts of one in the file.
        outputs: names in the file of what it writes to.
        files: which files have to be there.
        memory: bytes that it holds at most, about.
        key: the checkpoint tensor that is copied, or None.
    """

    name: str
    layers: tuple[str, ...]
    copies: tuple[str, ...]
    outputs: tuple[str, ...]
    files: tuple[Path, ...]
    memory: int
    key: str | None = None


@dataclass(frozen=True)
class WorkPlan:
    """All units in order, and how the files are laid out."""

    units: tuple[Unit, ...]
    layout: FileLayout

    @property
    def tensors(self) -> TensorSpecs:
        """Shapes and dtypes of the files' tensors."""
        return self.layout.tensors

    @property
    def targets(self) -> Mapping[str, FusedTarget]:
        """How parts find their place in them."""
        return self.layout.targets


def plan_work(job: Job, source: CheckpointSource, fmt: OutputFormat) -> WorkPlan:
    """The units of a job, in the model's order."""
    layout = plan_files(fmt, job.layers, source)
    quantized = job.quantized()
    units = _rounded_units(quantized, layout, source, fmt)
    made = {name for layer in quantized for name in layer_outputs(fmt, quantized[layer], source.dtype)}
    copies: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in separate_tensors(fmt, job.layers, source):
        bias = name.removesuffix(".bias") in quantized
        if name not in layout.copies and (name not in made or bias):
            copies[layout.stored_names(name)].append(name)
    done = {output for unit in units for output in unit.outputs}
    for outputs, names in copies.items():
        if done.isdisjoint(outputs):  # else a unit that rounds its siblings writes it
            size = sum(_bytes(source.tensor_meta(n)) for n in names[:2])
            units.append(Unit(names[0], (), tuple(names), outputs, _files(source, names), 2 * size + _SMALL))
    order = {name: i for i, name in enumerate(source.tensor_names())}
    at = lambda unit: min(order.get(n, 0) for n in (*unit.copies, *(f"{layer}.weight" for layer in unit.layers)))
    placed = [(at(unit), unit) for unit in units]
    first: dict[str, int] = {}
    for name, keys in layout.copies.items():
        for key in keys:
            first.setdefault(key, order.get(name, 0))
    first |= dict.fromkeys(layout.spare, len(order))
    placed += [(place, _copy_unit(key, source)) for key, place in first.items()]
    return WorkPlan(tuple(unit for _, unit in sorted(placed, key=lambda pair: pair[0])), layout)


def _rounded_units(
    quantized: Mapping[str, LayerPlan], layout: FileLayout, source: CheckpointSource, fmt: OutputFormat
) -> list[Unit]:
    units = []
    for group in _layer_groups(quantized, fmt, source.dtype, layout):
        outputs: dict[str, None] = {}
        for layer in group:
            for name in layer_outputs(fmt, quantized[layer], source.dtype):
                if not name.endswith(".bias") or name.removesuffix(".bias") != layer:
                    outputs |= dict.fromkeys(layout.stored_names(name))
        memory = sum(_layer_memory(quantized[layer], source, fmt) for layer in group)
        reads = [f"{layer}.weight" for layer in group]
        units.append(Unit(group[0], group, (), tuple(outputs), _files(source, reads), memory))
    return units


def _copy_unit(key: str, source: CheckpointSource) -> Unit:
    shape, dtype = source.stored_meta(key)
    memory = _COPY if is_stored(source, key) else 2 * _bytes((shape, dtype)) + _SMALL
    stored = getattr(source.files, "stored", source.files)
    files = tuple(sorted({stored.tensors[name].file for name in source.stored_inputs(key)}))
    return Unit(key, (), (), (key,), files, memory, key)


def layer_outputs(fmt: OutputFormat, plan: LayerPlan, dtype: torch.dtype) -> TensorSpecs:
    """What a format makes of one layer."""
    return fmt.tensor_specs(
        plan.name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype, model_dtype=dtype,
        transposed=plan.transposed,
    )  # fmt: skip


def _layer_groups(
    quantized: Mapping[str, LayerPlan], fmt: OutputFormat, dtype: torch.dtype, layout: FileLayout
) -> list[tuple[str, ...]]:
    """Layers one by one, but those together that runtimes join under one global scale, those that share one row of a
    stacked tensor (gate and up of an expert that is written dense), and those of which a conversion makes tensors."""
    shared = []
    for name, plan in quantized.items():
        family = minifloat_spec(plan.scheme)
        if family is not None and family.has_global_scale:
            shared.append(name)
    groups = fused_groups(shared, across_experts=False) if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE else []
    rows: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, plan in quantized.items() if layout.targets or layout.reversals else ():
        for output in layer_outputs(fmt, plan, dtype):
            target = layout.targets.get(output)
            reversal = layout.reversals.get(output if target is None else target.name)
            if reversal is not None:
                rows[reversal.origin.name, -1].append(name)
            elif target is not None and target.piece is not None and target.piece.part != "all":
                rows[target.name, target.piece.expert].append(name)
    joined = {
        name: group for group in (*(tuple(dict.fromkeys(row)) for row in rows.values()), *groups) for name in group
    }
    return list(dict.fromkeys(joined.get(name, (name,)) for name in quantized))


def _files(source: CheckpointSource, names: Iterable[str]) -> tuple[Path, ...]:
    stored = getattr(source.files, "stored", source.files)
    found = {stored.tensors[key].file for name in names for key in source.inputs(name)}
    return tuple(sorted(found))


def _bytes(meta: tuple[tuple[int, ...], torch.dtype]) -> int:
    count = meta[1].itemsize
    for size in meta[0]:
        count *= size
    return count


def _layer_memory(plan: LayerPlan, source: CheckpointSource, fmt: OutputFormat) -> int:
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


def _stored_bytes(source: CheckpointSource, key: str) -> int:
    stored = getattr(source.files, "stored", source.files).tensors[key]
    return int(stored.end - stored.start)


def plain_copy(source: CheckpointSource, name: str) -> bool:
    """Whether a model tensor's bytes are those of the file."""
    plan = source.tensor_plan(name)
    if plan is None:
        raise ModelError(f"tensor {name!r} is missing from the files in {source.folder}")
    if plan.key is None or source.files.tensors[plan.key].dtype != source.tensor_meta(name)[1]:
        return False
    return plan.key not in getattr(source.files, "weights", {})


def is_stored(source: CheckpointSource, key: str) -> bool:
    """Whether a checkpoint tensor is written byte for byte: not dequantized, and in the dtype that it has."""
    if key in getattr(source.files, "weights", {}):
        return False
    return source.files.tensors[key].dtype == source.stored_meta(key)[1]
