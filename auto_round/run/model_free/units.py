"""Split a model-free run into units of work (layers to round, tensors to copy), and lay out the files they write."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from auto_round import envs
from auto_round.errors import ConfigError
from auto_round.files import ALIGNMENT, DTYPE_NAMES, safetensors_header
from auto_round.formats.base import OutputFormat, TensorSpecs
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.layer_rules import fused_groups
from auto_round.run.file_layout import FileLayout, plan_files, separate_tensors
from auto_round.run.plan import Job, LayerPlan

LARGE = 1 << 23
"""Smallest number of weights of a layer that is sliced."""
SLICE = 1 << 22
"""Approximate number of weights in a slice."""
_ROWS = 32  # rows that fill whole words in every packing along the rows
_SMALL = 4 << 20  # bytes added to estimates of memory
_COPY = 32 << 20  # bytes that copying a tensor takes


@dataclass(frozen=True)
class Unit:
    """A unit of work: everything that becomes one or more tensors of the files.

    Attributes:
        layers: layers to round; those of one group share a global scale.
        dense: model names of tensors that are not rounded.
        outputs: stored names of the tensors that it writes; no other unit writes to them.
        inputs, files: checkpoint tensors that it reads, and their files.
        memory: estimated peak bytes.
        key: the checkpoint tensor that is copied, instead of layers and dense tensors.
    """

    layers: tuple[tuple[str, ...], ...]
    dense: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    files: tuple[Path, ...]
    memory: int
    key: str | None = None


def plan_work(job: Job, source: CheckpointSource, fmt: OutputFormat) -> tuple[list[Unit], FileLayout]:
    """The units of a job in the model's order, and the layout of the files."""
    layout, quantized = plan_files(fmt, job.layers, source), job.quantized()
    scaled = [name for name, plan in quantized.items() if plan.codec.has_global_scale]
    fused = fused_groups(scaled, across_experts=False) if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE else []
    group_of = {name: (name,) for name in quantized} | {name: tuple(group) for group in fused for name in group}
    stored: dict[str, list[str]] = {}  # by layer or dense tensor
    made: set[str] = set()
    for name in dict.fromkeys(name for first in quantized for name in group_of[first]):
        specs = layer_outputs(fmt, quantized[name], source.dtype)
        stored[name] = [out for n in specs if n != f"{name}.bias" for out in layout.stored_names(n)]
        made |= specs.keys() - {f"{name}.bias"}
    for name in separate_tensors(fmt, job.layers, source):
        if name not in layout.copies and name not in made:
            stored[name] = list(layout.stored_names(name))
    order = {name: i for i, name in enumerate(source.tensor_names())}
    placed: list[tuple[int, Unit]] = []
    for members in _joined({name: [*keys, group_of.get(name, name)] for name, keys in stored.items()}):
        groups = tuple(dict.fromkeys(group_of[name] for name in members if name in quantized))
        dense = tuple(name for name in members if name not in quantized)
        outputs = tuple(dict.fromkeys(out for name in members for out in stored[name]))
        read = [*(f"{layer}.weight" for group in groups for layer in group), *dense]
        memory = max(
            *(sum(_layer_memory(quantized[layer], source, fmt) for layer in group) for group in groups),
            *(2 * tensor_bytes(source.tensor_meta(name)) + _SMALL for name in dense), 0,
        )  # fmt: skip
        if len(groups) + len(dense) > 1:  # the stored tensors are assembled in memory
            memory += sum(tensor_bytes(layout.tensors[name]) for name in outputs)
        inputs = dict.fromkeys(key for name in read for key in source.inputs(name))
        unit = Unit(groups, dense, outputs, tuple(inputs), _files(source, inputs), memory)
        placed.append((min(order.get(name, 0) for name in read), unit))
    first: dict[str, int] = {}
    for name, keys in layout.copies.items():
        for key in keys:
            first.setdefault(key, order.get(name, 0))
    for key, position in (first | dict.fromkeys(layout.spare, len(order))).items():
        spec, inputs_of = source.stored_meta(key), source.files.inputs(key)
        memory = _COPY if is_stored(source, key, spec[1]) else 2 * tensor_bytes(spec) + _SMALL
        placed.append((position, Unit((), (), (key,), inputs_of, _files(source, inputs_of), memory, key)))
    return [unit for _, unit in sorted(placed, key=lambda pair: pair[0])], layout


def _joined(keys_of: Mapping[str, Iterable[Hashable]]) -> list[list[str]]:
    """Names in groups: those that have a key in common, also by way of others, are together."""
    found: dict[Hashable, tuple[set[Hashable], list[str]]] = {}
    for name, own in keys_of.items():
        keys, members = set(own), [name]
        for other in {id(found[key]): found[key] for key in own if key in found}.values():
            keys |= other[0]
            members = [*other[1], *members]
        found |= dict.fromkeys(keys, (keys, members))
    return [members for _, members in {id(group): group for group in found.values()}.values()]


def _files(source: CheckpointSource, keys: Iterable[str]) -> tuple[Path, ...]:
    return tuple(sorted({source.files.stored.tensors[key].file for key in keys}))


def layer_outputs(fmt: OutputFormat, plan: LayerPlan, dtype: torch.dtype) -> TensorSpecs:
    """Tensor specs of a packed layer."""
    return fmt.tensor_specs(
        plan.name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype, model_dtype=dtype,
        transposed=plan.transposed,
    )  # fmt: skip


def row_slices(plan: LayerPlan, fmt: OutputFormat, source: CheckpointSource) -> tuple[int, dict[str, int]] | None:
    """How a layer is rounded by slices: (rows of a slice, axis by which the slices of each packed tensor are joined).

    None when it is rounded as a whole: it is small or not stored unchanged, its rows share a scale, or the format packs
    something that does not belong to single rows.
    """
    size, dtype = plan.scheme.group_size, source.dtype
    if plan.out_features * plan.in_features < LARGE or plan.transposed or not plan.codec.rows_independent:
        return None
    unit = max(_ROWS, size[0]) if isinstance(size, tuple) else _ROWS
    step = max(unit, SLICE // plan.in_features // unit * unit)
    if unit % _ROWS or step >= plan.out_features or plan.out_features % _ROWS:
        return None
    stored = source.tensor_plan(f"{plan.name}.weight")
    if stored is None or stored.key is None or not is_stored(source, stored.key, dtype):
        return None
    whole, part = layer_outputs(fmt, plan, dtype), layer_outputs(fmt, replace(plan, out_features=step), dtype)
    axes = {}
    for name, (shape, _) in whole.items():
        differ = [i for i, (a, b) in enumerate(zip(shape, part[name][0], strict=True)) if a != b]
        if len(differ) != 1:
            return None
        axes[name] = differ[0]
    return step, axes


def is_stored(source: CheckpointSource, key: str, dtype: torch.dtype) -> bool:
    """Whether a checkpoint tensor is stored in `dtype`, so that it is neither dequantized nor cast."""
    return source.files.inputs(key) == (key,) and source.files.tensors[key].dtype == dtype


def tensor_bytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of a tensor of that shape and dtype."""
    return math.prod(spec[0]) * spec[1].itemsize


def _layer_memory(plan: LayerPlan, source: CheckpointSource, fmt: OutputFormat) -> int:
    """Peak bytes of rounding a layer: its weight (also as stored, if it is dequantized or cast), codes, and packed
    tensors."""
    itemsize, slices = source.dtype.itemsize, row_slices(plan, fmt, source)
    packed = sum(tensor_bytes(spec) for spec in layer_outputs(fmt, plan, source.dtype).values()) + _SMALL
    if slices is not None:
        return slices[0] * plan.in_features * (itemsize + 2) + packed
    weights, tensors = plan.out_features * plan.in_features, source.files.stored.tensors
    stored = sum(tensors[key].end - tensors[key].start for key in source.inputs(f"{plan.name}.weight"))
    return weights * (itemsize + 1) + (0 if stored == weights * itemsize else min(stored, 2 * weights)) + packed


@dataclass(frozen=True)
class Shard:
    """Plan of one output file: its name, the bytes before the tensors, the offset of each tensor, the size of the whole
    file, and indices of the units that write to it."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    units: tuple[int, ...]


def plan_shards(units: Sequence[Unit], tensors: TensorSpecs, files: Sequence[Path], max_size: int) -> list[Shard]:
    """One output file for each of the input `files` in order, split at `max_size` bytes.

    A unit belongs to the last of the files that it reads, so that input files can be fetched and deleted in order.
    """
    rank = {file: i for i, file in enumerate(files)}
    members: dict[int, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        members[max((rank[file] for file in unit.files), default=0)].append(i)
    parts: list[list[int]] = []
    for index in sorted(members):
        parts.append([])
        size = 0
        for i in members[index]:
            own = sum(tensor_bytes(tensors[name]) for name in units[i].outputs)
            if size and size + own > max_size:
                parts.append([])
                size = 0
            parts[-1].append(i)
            size += own
    shards: list[Shard] = []
    for i, part in enumerate(parts):
        names = [name for number in part for name in units[number].outputs]
        for name in names:
            if tensors[name][1] not in DTYPE_NAMES:
                raise ConfigError(f"tensor {name!r} has dtype {tensors[name][1]}, which safetensors files cannot hold")
        # Readers view the bytes in place, so every tensor must start aligned to its dtype: odd sizes come last.
        odd = [name for name in names if tensor_bytes(tensors[name]) % ALIGNMENT]
        odd.sort(key=lambda name: -tensors[name][1].itemsize)
        even = [name for name in names if tensor_bytes(tensors[name]) % ALIGNMENT == 0]
        header, offsets, size = safetensors_header([(n, *tensors[n]) for n in (*even, *odd)], {"format": "pt"})
        name = "model.safetensors" if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        shards.append(Shard(name, header, offsets, size, tuple(part)))
    return shards
