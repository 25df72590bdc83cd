"""One unit of work: read what it needs, round or copy it, and hand out bytes with their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import round_to_nearest
from auto_round.compressors.digest import layer_digest
from auto_round.compressors.file_layout import FusedTarget
from auto_round.compressors.global_scales import share_global_scales
from auto_round.compressors.job import Job, LayerPlan
from auto_round.compressors.model_free.arena import Arena
from auto_round.compressors.model_free.slices import empty_packed, row_ranges, row_step, slice_axes
from auto_round.compressors.model_free.units import Unit, Work, is_stored, plain_copy
from auto_round.compressors.tensor_joiner import TensorJoiner
from auto_round.errors import ModelError
from auto_round.export.formats import OutputFormat
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.modeling.finite import check_finite
from auto_round.quantized_layer import QuantizedLayer

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes for the file: `data` goes to tensor `name`, `offset` bytes after its start."""

    name: str
    offset: int
    data: torch.Tensor


@dataclass(frozen=True)
class Rounder:
    """What every unit of a run has in common.

    Attributes:
        samples: layers of which a digest is taken, to compare them with what is read back.
        digests: filled in, by layer.
        arena: what tensors are read into.
    """

    job: Job
    source: CheckpointSource
    fmt: OutputFormat
    work: Work
    scale_dtype: torch.dtype
    device: torch.device
    samples: frozenset[str] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)
    arena: Arena = field(default_factory=Arena)

    def pieces(self, unit: Unit) -> Iterator[Piece]:
        """Everything that a unit writes.

        Raises:
            ModelError: a file cannot be read to its end.
            NumericsError: NaN or Inf in a weight, named.
        """
        self.arena.reset()
        if len(unit.layers) == 1 and self.step(self.job.layers[unit.layers[0]]) is not None:
            yield from self._sliced(self.job.layers[unit.layers[0]])
        elif any(output in self._made_by_conversion for output in unit.outputs):
            yield from self._reversed(unit)
        elif unit.layers:
            yield from self._rounded(unit)
        elif unit.key is None:
            yield from self._joined(unit)
        elif is_stored(self.source, unit.key):
            yield from self._streamed(unit.key)
        else:
            tensor = self.source.read_stored(unit.key)
            check_finite(unit.key, tensor)
            yield Piece(unit.key, 0, tensor)

    def read_ahead(self, unit: Unit, asked: set[str]) -> None:
        """Have the weights of a unit on their way that were not `asked` for before: a worker that waits for a disk
        does not round."""
        files = getattr(self.source.files, "stored", self.source.files)
        names = (*(f"{layer}.weight" for layer in unit.layers), *unit.copies)
        keys = [key for name in names for key in self.source.checkpoint_names(name)]
        for key in keys if unit.key is None else [unit.key]:
            if key not in asked and key in files:
                asked.add(key)
                files.will_need(key)

    @cached_property
    def _made_by_conversion(self) -> frozenset[str]:
        return frozenset(name for reversal in self.work.layout.reversals.values() for name in reversal.stored)

    def _reversed(self, unit: Unit) -> Iterator[Piece]:
        """Tensors that Transformers' conversion makes of dense ones, whole."""
        joiner = TensorJoiner(self.work.layout, self.source.model)
        members = {name for r in self.work.layout.reversals.values() if set(r.stored) <= {*unit.outputs}
                   for name in r.needed}  # fmt: skip
        dense: list[tuple[str, torch.Tensor]] = []
        for layer in self.layers(unit):
            dense += self.fmt.pack(replace(layer, bias=None), model_dtype=self.source.dtype).items()
        done = {name for name, _ in dense}
        for name in members:
            if name not in done and name in self.source.tensor_names():
                dense.append((name, self._checked(name)))
        for name, tensor in dense:
            for stored, made in joiner.add(name, tensor):
                yield Piece(stored, 0, made)

    def layers(self, unit: Unit) -> Iterator[QuantizedLayer]:
        """The layers of a unit, rounded."""
        tasks = [self._task(self.job.layers[name]) for name in unit.layers]
        share_global_scales(tasks)
        while tasks:
            yield self.round(tasks.pop(0))

    def round(self, task: LayerTask) -> QuantizedLayer:
        """One layer, as the format's readers take it."""
        return self.fmt.restate(round_to_nearest(task, False, self.scale_dtype))

    def _rounded(self, unit: Unit) -> Iterator[Piece]:
        rows: dict[tuple[str, int], torch.Tensor] = {}
        for layer in self.layers(unit):
            if layer.name in self.samples:
                self.digests[layer.name] = layer_digest(layer, self.fmt.name == "fake", self.source.dtype)
            packed = self.fmt.pack(replace(layer, bias=None), model_dtype=self.source.dtype)
            del layer
            for name in list(packed):
                target = self.work.targets.get(name)
                if target is None or target.piece is None or target.piece.part == "all":
                    yield self._placed(name, packed.pop(name))
                    continue
                part = packed.pop(name)
                place = target.name, target.piece.expert
                row = rows.setdefault(place, torch.empty(target.slot_shape, dtype=part.dtype))
                target.piece.paste(row, part)
        for (output, expert), row in rows.items():
            yield Piece(output, expert * row.nbytes, row)

    def step(self, plan: LayerPlan) -> int | None:
        """Rows that are rounded at a time, None for all of them."""
        if plan.name in self.samples or not plain_copy(self.source, f"{plan.name}.weight"):
            return None
        return row_step(plan, self.fmt, self.source.dtype)

    def _sliced(self, plan: LayerPlan) -> Iterator[Piece]:
        """A large layer, some rows at a time; only what is packed of it is ever whole."""
        source, step = self.source, self.step(plan)
        plan = replace(plan, bias_dtype=None)  # copied by a unit of its own
        assert step is not None
        axes = slice_axes(plan, self.fmt, source.dtype, step)
        assert axes is not None
        whole = empty_packed(plan, self.fmt, source.dtype)
        name = f"{plan.name}.weight"
        (key,) = source.checkpoint_names(name)
        files = getattr(source.files, "stored", source.files)
        module = source.model.get_submodule(plan.name)
        row = plan.in_features * source.dtype.itemsize
        at = dict.fromkeys(axes, 0)
        for start, end in row_ranges(plan.out_features, step):
            self.arena.reset()
            part = files.read_bytes(key, start * row, (end - start) * row).view(source.tensor_meta(name)[1])
            weight = part.view(end - start, plan.in_features)
            check_finite(name, weight)
            task = LayerTask(plan.name, module, weight.to(self.device), plan.scheme)
            for tensor, values in self.fmt.pack(self.round(task), model_dtype=source.dtype).items():
                size = values.shape[axes[tensor]]
                whole[tensor].narrow(axes[tensor], at[tensor], size).copy_(values)
                at[tensor] += size
        for tensor in list(whole):
            yield self._placed(tensor, whole.pop(tensor))

    def _task(self, plan: LayerPlan) -> LayerTask:
        weight = self._checked(f"{plan.name}.weight")
        weight = (weight.t() if plan.transposed else weight).to(self.device)
        module = self.source.model.get_submodule(plan.name)
        return LayerTask(plan.name, module, weight, plan.scheme, transposed=plan.transposed)

    def _checked(self, name: str) -> torch.Tensor:
        tensor = self.source.read(name)
        check_finite(name, tensor)
        return tensor

    def _placed(self, name: str, tensor: torch.Tensor) -> Piece:
        """A whole tensor, or one expert of a stacked one."""
        target = self.work.targets.get(name)
        wanted = self.work.tensors[name if target is None else target.name]
        if target is None or target.piece is None:
            if tuple(tensor.shape) != tuple(wanted[0]) or tensor.dtype != wanted[1]:
                raise ModelError(f"tensor {name!r} became {tensor.dtype} {list(tensor.shape)}, planned was {wanted}")
            return Piece(name if target is None else target.name, 0, tensor)
        row = torch.empty(target.slot_shape, dtype=tensor.dtype)
        target.piece.paste(row, tensor)
        return Piece(target.name, target.piece.expert * row.nbytes, row)

    def use_arena(self) -> None:
        """From now on tensors are read into memory that is valid for one unit only."""
        getattr(self.source.files, "stored", self.source.files).allocate = self.arena.take

    def _joined(self, unit: Unit) -> Iterator[Piece]:
        """A dense tensor that is cast, dequantized or made of the experts' own, expert by expert."""
        rows: dict[int, list[tuple[str, FusedTarget]]] = {}
        for name in unit.copies:
            target = self.work.targets.get(name)
            if target is None or target.piece is None:
                tensor = self.source.read_kept(name)
                check_finite(name, tensor)
                yield self._placed(name, tensor)
            else:
                rows.setdefault(target.piece.expert, []).append((name, target))
        for expert, parts in rows.items():
            self.arena.reset()
            row = torch.empty(parts[0][1].slot_shape, dtype=self.work.tensors[unit.outputs[0]][1])
            for name, target in parts:
                assert target.piece is not None
                target.piece.paste(row, self._checked(name))
            yield Piece(unit.outputs[0], expert * row.nbytes, row)

    def _streamed(self, key: str) -> Iterator[Piece]:
        """A tensor as it lies in the file, a few megabytes at a time."""
        files = getattr(self.source.files, "stored", self.source.files)
        stored = files.tensors[key]
        step = _CHUNK // stored.dtype.itemsize * stored.dtype.itemsize
        for start in range(0, stored.end - stored.start, step):
            self.arena.reset()
            part = files.read_bytes(key, start, min(step, stored.end - stored.start - start))
            files.will_need(key, start + step, 4 * step)
            check_finite(key, part.view(stored.dtype))
            yield Piece(key, start, part)
