"""Split a model-free run into units of work: a layer to round (large ones by row slices) or a tensor to copy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from auto_round import envs
from auto_round.errors import ModelError
from auto_round.formats.base import OutputFormat, TensorSpecs
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.layer_rules import fused_groups
from auto_round.run.file_layout import FileLayout, FusedTarget, plan_files, separate_tensors
from auto_round.run.plan import Job, LayerPlan

LARGE = 1 << 23
"""Smallest number of weights of a layer that is sliced."""
SLICE = 1 << 22
"""Approximate number of weights in a slice."""
_ROWS = 32  # rows that fill whole words in every packing along the rows
_SMALL = 4 << 20  # bytes added to estimates of memory
_COPY = 32 << 20  # bytes that copying a tensor takes


class RowSlices(NamedTuple):
    """How a layer is rounded by slices: `step` rows at a time; packed tensors are joined along `axes`, by name."""

    step: int
    axes: dict[str, int]


def row_slices(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> RowSlices | None:
    """The slices of a layer; None when it is rounded as a whole: it is small, its rows share a scale, or the format
    packs something that does not belong to single rows."""
    size = plan.scheme.group_size
    if plan.out_features * plan.in_features < LARGE or plan.transposed or not plan.codec.rows_independent:
        return None
    unit = max(_ROWS, size[0]) if isinstance(size, tuple) else _ROWS
    step = max(unit, SLICE // plan.in_features // unit * unit)
    if unit % _ROWS or step >= plan.out_features or plan.out_features % _ROWS:
        return None
    whole, part = layer_outputs(fmt, plan, dtype), layer_outputs(fmt, replace(plan, out_features=step), dtype)
    axes = {}
    for name, (shape, _) in whole.items():
        differ = [i for i, (a, b) in enumerate(zip(shape, part[name][0], strict=True)) if a != b]
        if len(differ) != 1:
            return None
        axes[name] = differ[0]
    return RowSlices(step, axes)


@dataclass(frozen=True)
class Unit:
    """A unit of work: layers to round, or a tensor to copy.

    Attributes:
        name: of the first layer or tensor.
        layers: layers that are rounded together because they share a scale or a stored tensor; empty for a copy.
        copies: model names of dense tensors that are not stored unchanged; several if they are parts of one stored
            tensor.
        outputs: stored names of the tensors that it writes to.
        files: input files that it reads.
        memory: estimated peak bytes.
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
    """All units in order, and the layout of the files."""

    units: tuple[Unit, ...]
    layout: FileLayout

    @property
    def tensors(self) -> TensorSpecs:
        """Shapes and dtypes of the stored tensors."""
        return self.layout.tensors

    @property
    def targets(self) -> Mapping[str, FusedTarget]:
        """Stored tensor of each part, by model name."""
        return self.layout.targets


def plan_work(job: Job, source: CheckpointSource, fmt: OutputFormat) -> WorkPlan:
    """The units of a job, in the model's order."""
    layout = plan_files(fmt, job.layers, source)
    quantized = job.quantized()
    units: list[Unit] = []
    rounded_in: dict[tuple[str, int], int] = {}  # by row of stacked experts, the unit that rounds a part of it
    for group in _layer_groups(quantized, fmt, source.dtype, layout):
        biases = {f"{layer}.bias" for layer in group}  # units of their own copy them
        names = [n for layer in group for n in layer_outputs(fmt, quantized[layer], source.dtype) if n not in biases]
        outputs = dict.fromkeys(stored for name in names for stored in layout.stored_names(name))
        memory = sum(_layer_memory(quantized[layer], source, fmt) for layer in group)
        files = _files(source, [f"{layer}.weight" for layer in group])
        rounded_in |= {row: len(units) for name in names if (row := _expert_row(layout, name)) is not None}
        units.append(Unit(group[0], group, (), tuple(outputs), files, memory))
    made = {name for layer in quantized for name in layer_outputs(fmt, quantized[layer], source.dtype)}
    converted = {stored for reversal in layout.reversals.values() for stored in reversal.stored}
    done = {output for unit in units for output in unit.outputs}
    copies: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in separate_tensors(fmt, job.layers, source):
        bias = name.removesuffix(".bias") in quantized
        outputs_of = layout.stored_names(name)
        if name in layout.copies or (name in made and not bias) or done & converted & {*outputs_of}:
            continue  # the unit that rounds the other inputs of a conversion reads it
        row = _expert_row(layout, name)
        index = None if row is None else rounded_in.get(row)
        if index is None:
            copies[outputs_of].append(name)
        else:  # the other half of the row is rounded
            unit = units[index]
            files = tuple(sorted({*unit.files, *_files(source, [name])}))
            memory = unit.memory + 2 * tensor_bytes(source.tensor_meta(name))
            units[index] = replace(unit, copies=(*unit.copies, name), files=files, memory=memory)
    for outputs_of, names in copies.items():
        size = sum(tensor_bytes(source.tensor_meta(n)) for n in names[:2])
        units.append(Unit(names[0], (), tuple(names), outputs_of, _files(source, names), 2 * size + _SMALL))
    order = {name: i for i, name in enumerate(source.tensor_names())}
    at = lambda unit: min(order.get(n, 0) for n in (*unit.copies, *(f"{layer}.weight" for layer in unit.layers)))
    placed = [(at(unit), unit) for unit in units]
    first: dict[str, int] = {}
    for name, keys in layout.copies.items():
        for key in keys:
            first.setdefault(key, order.get(name, 0))
    first |= dict.fromkeys(layout.spare, len(order))
    for key, position in first.items():
        memory = _COPY if is_stored(source, key) else 2 * tensor_bytes(source.stored_meta(key)) + _SMALL
        files = tuple(sorted({source.files.stored.tensors[name].file for name in source.files.inputs(key)}))
        placed.append((position, Unit(key, (), (), (key,), files, memory, key)))
    return WorkPlan(tuple(unit for _, unit in sorted(placed, key=lambda pair: pair[0])), layout)


def _expert_row(layout: FileLayout, name: str) -> tuple[str, int] | None:
    """(stored tensor, expert) that a part of a stacked tensor belongs to; None for other tensors."""
    target = layout.targets.get(name)
    return None if target is None or target.piece is None else (target.name, target.piece.expert)


def layer_outputs(fmt: OutputFormat, plan: LayerPlan, dtype: torch.dtype) -> TensorSpecs:
    """Tensor specs of a packed layer."""
    return fmt.tensor_specs(
        plan.name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype, model_dtype=dtype,
        transposed=plan.transposed,
    )  # fmt: skip


def _layer_groups(
    quantized: Mapping[str, LayerPlan], fmt: OutputFormat, dtype: torch.dtype, layout: FileLayout
) -> list[tuple[str, ...]]:
    """Group layers that must be rounded together: fused layers with one global scale, layers that share the rows of one
    expert in a stacked tensor (gate and up that are written dense), and layers of one reversed conversion. All others
    are groups of one."""
    shared = [name for name, plan in quantized.items() if plan.codec.has_global_scale]
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
    tensors = source.files.stored.tensors
    return tuple(sorted({tensors[key].file for name in names for key in source.inputs(name)}))


def tensor_bytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of a tensor of that shape and dtype."""
    return math.prod(spec[0]) * spec[1].itemsize


def _layer_memory(plan: LayerPlan, source: CheckpointSource, fmt: OutputFormat) -> int:
    """Peak bytes of rounding a layer: its weight (also as stored, if it is dequantized or cast), codes, and packed
    tensors."""
    weights = plan.out_features * plan.in_features
    slices = row_slices(plan, fmt, source.dtype) if plain_copy(source, f"{plan.name}.weight") else None
    packed = sum(tensor_bytes(spec) for spec in layer_outputs(fmt, plan, source.dtype).values())
    if slices is not None:
        return slices.step * plan.in_features * (source.dtype.itemsize + 2) + packed + _SMALL
    tensors = source.files.stored.tensors
    stored = sum(tensors[key].end - tensors[key].start for key in source.inputs(f"{plan.name}.weight"))
    same = stored == weights * source.dtype.itemsize
    return weights * (source.dtype.itemsize + 1) + (0 if same else min(stored, 2 * weights)) + packed + _SMALL


def plain_copy(source: CheckpointSource, name: str) -> bool:
    """Whether a model tensor is stored unchanged in one checkpoint tensor."""
    plan = source.tensor_plan(name)
    if plan is None:
        raise ModelError(f"tensor {name!r} is missing from the files in {source.folder}")
    if plan.key is None or source.files.tensors[plan.key].dtype != source.tensor_meta(name)[1]:
        return False
    return source.files.inputs(plan.key) == (plan.key,)


def is_stored(source: CheckpointSource, key: str) -> bool:
    """Whether a checkpoint tensor is copied byte for byte: neither dequantized nor cast."""
    return source.files.inputs(key) == (key,) and source.files.tensors[key].dtype == source.stored_meta(key)[1]
