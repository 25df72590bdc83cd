"""Process one model-free unit: read, round or copy it, yield chunks for the file; verify sampled layers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ModelError, VerifyError
from auto_round.formats.base import OutputFormat
from auto_round.inference.config import read_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.source import check_finite
from auto_round.output.verify import dense_digest, layer_digest
from auto_round.run.block_layers import share_global_scales
from auto_round.run.file_layout import TensorAssembler, read_model_tensors
from auto_round.run.model_free.units import (
    RowSlices,
    Unit,
    WorkPlan,
    is_stored,
    layer_outputs,
    plain_copy,
    row_slices,
)
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.results import module_from_tensors

_MIN_POOLED_BYTES = 1 << 16
_MAX_POOLED_BYTES = 256 << 20
_CHUNK_BYTES = 16 << 20
_MAX_SAMPLE_WEIGHTS = 1 << 26


class BufferPool(threading.local):
    """Reusable read buffers, separate for each thread. A buffer is valid until the thread's next `reset`."""

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._next = 0

    def reset(self) -> None:
        """Make all buffers available again, and free very large ones."""
        self._next = 0
        self._slots = [slot for slot in self._slots if slot.numel() <= _MAX_POOLED_BYTES]

    def take(self, size: int) -> torch.Tensor:
        """An uninitialised buffer, uint8 [size]."""
        if size < _MIN_POOLED_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        if self._next == len(self._slots):
            self._slots.append(torch.empty(0, dtype=torch.uint8))
        if self._slots[self._next].numel() < size:
            self._slots[self._next] = torch.empty(size, dtype=torch.uint8)
        self._next += 1
        return self._slots[self._next - 1][:size]


@dataclass(frozen=True)
class Chunk:
    """Bytes to write: `data` of tensor `name`, `offset` bytes after its start."""

    name: str
    offset: int
    data: torch.Tensor


@dataclass(frozen=True)
class UnitProcessor:
    """Reads, rounds or copies the tensors of a unit.

    Attributes:
        samples: layers whose digests are recorded, for verification.
        digests: result: `layer_digest` by sampled layer.
        buffer_pool: buffers that tensors are read into.
    """

    job: Job
    source: CheckpointSource
    fmt: OutputFormat
    work: WorkPlan
    scale_dtype: torch.dtype
    device: torch.device
    samples: frozenset[str] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)
    buffer_pool: BufferPool = field(default_factory=BufferPool)

    def chunks(self, unit: Unit) -> Iterator[Chunk]:
        """Compute everything that a unit writes.

        Raises:
            ModelError: a file is truncated.
            NumericsError: NaN or Inf in a weight.
        """
        self.buffer_pool.reset()
        if unit.key is None:
            if self._made_by_conversion.isdisjoint(unit.outputs):
                yield from self._placed(chain(self._packed(unit), self._dense(unit.copies)))
            else:
                yield from self._reversed(unit)
        elif is_stored(self.source, unit.key):
            yield from self._streamed(unit.key)
        else:
            tensor = self.source.read_stored(unit.key)
            check_finite(unit.key, tensor)
            yield Chunk(unit.key, 0, tensor)

    def read_ahead(self, unit: Unit, asked: set[str]) -> None:
        """Start reading the weights of a unit that were not `asked` for before, so that workers do not wait for the
        disk."""
        files = self.source.files.stored
        names = (*(f"{layer}.weight" for layer in unit.layers), *unit.copies)
        keys = [key for name in names for key in self.source.checkpoint_names(name)]
        for key in keys if unit.key is None else [unit.key]:
            if key not in asked and key in files:
                asked.add(key)
                files.prefetch(key)

    @cached_property
    def _made_by_conversion(self) -> frozenset[str]:
        return frozenset(name for reversal in self.work.layout.reversals.values() for name in reversal.stored)

    def _reversed(self, unit: Unit) -> Iterator[Chunk]:
        """Checkpoint tensors that a reversed conversion computes from dense ones."""
        dense = dict(self._packed(unit))
        for reversal in self.work.layout.reversals.values():
            for name in reversal.needed if set(reversal.stored) <= set(unit.outputs) else ():
                if name not in dense and name in self.source.tensor_names():
                    dense[name] = self._checked(name)
        assembler = TensorAssembler(self.work.layout, self.source.model)
        for name, tensor in dense.items():
            for stored, made in assembler.add(name, tensor):
                yield Chunk(stored, 0, made)

    def _placed(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Chunk]:
        """Chunks of tensors by model name: whole ones, or rows of stacked experts, whose gate and up may be halves."""
        halves: dict[tuple[str, int], torch.Tensor] = {}
        for name, tensor in tensors:
            target = self.work.targets.get(name)
            stored = name if target is None else target.name
            shape, dtype = self.work.tensors[stored]
            if target is None or target.piece is None:
                if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                    raise ModelError(
                        f"tensor {name!r} became {tensor.dtype} {list(tensor.shape)}, planned was {dtype} {list(shape)}"
                    )
                yield Chunk(stored, 0, tensor)
                continue
            key = stored, target.piece.expert
            half = halves.pop(key, None)
            row = torch.empty(target.slot_shape, dtype=dtype) if half is None else half
            target.piece.paste(row, tensor)
            if half is None and target.piece.part != "all":
                halves[key] = row
            else:
                yield Chunk(stored, target.piece.expert * row.nbytes, row)
        assert not halves  # `plan_work` puts both halves into one unit

    def _packed(self, unit: Unit) -> Iterator[tuple[str, torch.Tensor]]:
        """The packed tensors of a unit's layers without their biases, which other units copy."""
        if len(unit.layers) == 1 and (slices := self._slices(self.job.layers[unit.layers[0]])) is not None:
            yield from self._packed_in_slices(self.job.layers[unit.layers[0]], slices)
            return
        tasks = []
        for layer_name in unit.layers:
            plan = self.job.layers[layer_name]
            weight = self._checked(f"{layer_name}.weight")
            weight = (weight.t() if plan.transposed else weight).to(self.device)
            module = self.source.model.get_submodule(layer_name)
            tasks.append(LayerTask(layer_name, module, weight, plan.scheme, transposed=plan.transposed))
        share_global_scales(tasks)
        while tasks:
            layer = self._round(tasks.pop(0))
            if layer.name in self.samples:
                self.digests[layer.name] = layer_digest(layer, self.fmt.name == "fake", self.source.dtype)
            packed = self.fmt.pack(replace(layer, bias=None), model_dtype=self.source.dtype)
            del layer
            for name in list(packed):
                yield name, packed.pop(name)

    def _round(self, task: LayerTask) -> QuantizedLayer:
        """Round one layer to nearest, normalized for the format."""
        return self.fmt.normalize_for_format(quantize_layer(task, False, self.scale_dtype))

    def _slices(self, plan: LayerPlan) -> RowSlices | None:
        if plan.name in self.samples or not plain_copy(self.source, f"{plan.name}.weight"):
            return None
        return row_slices(plan, self.fmt, self.source.dtype)

    def _packed_in_slices(self, plan: LayerPlan, slices: RowSlices) -> Iterator[tuple[str, torch.Tensor]]:
        """Round a large layer by slices of rows; only its packed tensors are in memory as a whole."""
        source = self.source
        specs = layer_outputs(self.fmt, replace(plan, bias_dtype=None), source.dtype)
        whole = {tensor: torch.empty(shape, dtype=dtype) for tensor, (shape, dtype) in specs.items()}
        name = f"{plan.name}.weight"
        (key,) = source.checkpoint_names(name)
        module = source.model.get_submodule(plan.name)
        row = plan.in_features * source.dtype.itemsize
        at = dict.fromkeys(whole, 0)
        for start in range(0, plan.out_features, slices.step):
            end = min(plan.out_features, start + slices.step)
            self.buffer_pool.reset()
            part = source.files.stored.read_bytes(key, start * row, (end - start) * row)
            weight = part.view(source.tensor_meta(name)[1]).view(end - start, plan.in_features)
            check_finite(name, weight)
            task = LayerTask(plan.name, module, weight.to(self.device), plan.scheme)
            for tensor, values in self.fmt.pack(self._round(task), model_dtype=source.dtype).items():
                axis = slices.axes[tensor]
                size = values.shape[axis]
                whole[tensor].narrow(axis, at[tensor], size).copy_(values)
                at[tensor] += size
        for tensor in list(whole):
            yield tensor, whole.pop(tensor)

    def _dense(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that are cast, dequantized or stacked from experts, one at a time."""
        for name in names:
            self.buffer_pool.reset()
            target = self.work.targets.get(name)
            if target is not None and target.piece is not None:
                yield name, self._checked(name)
            else:
                tensor = self.source.read_unquantized(name)
                check_finite(name, tensor)
                yield name, tensor

    def _checked(self, name: str) -> torch.Tensor:
        tensor = self.source.read(name)
        check_finite(name, tensor)
        return tensor

    def use_buffer_pool(self) -> None:
        """Read tensors into pooled buffers, which are valid for one unit."""
        self.source.files.stored.allocate = self.buffer_pool.take

    def _streamed(self, key: str) -> Iterator[Chunk]:
        """Copy a stored tensor unchanged, a few megabytes at a time."""
        files = self.source.files.stored
        stored = files.tensors[key]
        step = _CHUNK_BYTES // stored.dtype.itemsize * stored.dtype.itemsize
        for start in range(0, stored.end - stored.start, step):
            self.buffer_pool.reset()
            part = files.read_bytes(key, start, min(step, stored.end - stored.start - start))
            files.prefetch(key, start + step, 4 * step)
            check_finite(key, part.view(stored.dtype))
            yield Chunk(key, start, part)


def sample_layers(processor: UnitProcessor) -> frozenset[str]:
    """Choose layers to verify: those of the smallest unit of each kind (scheme, bias, transposed). Very large layers
    are excluded, since sampled layers are not sliced."""
    kinds: dict[object, Unit] = {}
    for unit in processor.work.units:
        if not processor._made_by_conversion.isdisjoint(unit.outputs):  # their layers cannot be read back
            continue
        for name in unit.layers:
            plan = processor.job.layers[name]
            if plan.out_features * plan.in_features > _MAX_SAMPLE_WEIGHTS:
                continue
            kind = (plan.scheme, plan.bias_dtype is not None, plan.transposed, len(unit.layers))
            if kind not in kinds or unit.memory < kinds[kind].memory:
                kinds[kind] = unit
    return frozenset(name for unit in kinds.values() for name in unit.layers)


def check_layers(folder: Path, processor: UnitProcessor, digests: Mapping[str, str]) -> int:
    """Read the sampled layers back as a runtime would, compare them with `digests`, and return their number.

    Raises:
        VerifyError: a layer differs, or has no digest.
    """
    files = TensorFiles.open(folder)
    for name in sorted(processor.samples):
        if _read_back(folder, files, processor, processor.job.layers[name]) != digests.get(name):
            raise VerifyError(f"{folder}: layer {name} does not hold what was rounded; do not use it, and report this")
    return len(processor.samples)


def _read_back(folder: Path, files: TensorFiles, processor: UnitProcessor, plan: LayerPlan) -> str:
    fmt, dtype, layout = processor.fmt, processor.source.dtype, processor.work.layout
    specs = layer_outputs(fmt, plan, dtype)
    if fmt.name == "fake":
        (weight,) = (name for name in specs if name.endswith(".weight"))
        tensor = read_model_tensors(files, [weight], layout)[weight]
        target = layout.targets.get(weight)
        if target is not None and target.piece is not None:
            tensor = target.piece.cut(tensor)
        return dense_digest(tensor.t() if plan.transposed else tensor)
    tensors = read_model_tensors(files, specs, layout)
    if not fmt.loadable_here:
        layer = fmt.unpack_layer(plan.name, plan.scheme, tensors, plan.in_features, plan.out_features)
        return layer_digest(layer, False, torch.float32)
    stored_name = processor.job.stored_names.get(plan.name, plan.name)
    return layer_digest(_opened(folder, processor.job, stored_name, plan, tensors), False, torch.float32)


def _opened(
    folder: Path, job: Job, stored_name: str, plan: LayerPlan, tensors: Mapping[str, torch.Tensor]
) -> QuantizedLayer:
    """The layer of our loader's module, built according to config.json."""
    config = read_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    in_block = any(plan.name.startswith(f"{block}.") for block in job.blocks)
    described = config.layer(stored_name, in_block)
    if described is None:
        raise VerifyError(f"{folder}: config.json gives no scheme for {stored_name}, which is quantized; report this")
    by_leaf = {name.removeprefix(f"{plan.name}."): tensor for name, tensor in tensors.items()}
    module = module_from_tensors(plan.name, described, plan.out_features, plan.in_features, plan.bias_dtype, by_leaf)
    return module.layer(plan.name)
