"""Process one model-free unit: read, round or copy it, yield tensors for the file; verify sampled layers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from auto_round.modeling.files.safetensors import TensorFiles, empty_mmap
from auto_round.modeling.source import check_finite
from auto_round.output.verify import dense_digest, layer_digest
from auto_round.run.block_layers import share_global_scales
from auto_round.run.file_layout import FileLayout, TensorAssembler, read_model_tensors
from auto_round.run.model_free.units import Unit, is_stored, layer_outputs, row_slices
from auto_round.run.model_free.workers import Chunk
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.results import module_from_tensors
from auto_round.run.settings import Settings

_CHUNK_BYTES = 16 << 20
_MAX_REUSED_BYTES = 256 << 20
_MAX_SAMPLE_WEIGHTS = 1 << 26

Named = Iterator[tuple[str, torch.Tensor]]


class _ReadBuffer(threading.local):
    """Memory of each thread that is read into again and again: new pages cost more than reading.

    After `lend` the next read gets it, and may use it until the next `lend`.
    """

    def __init__(self) -> None:
        self._memory, self._lent = torch.empty(0, dtype=torch.uint8), False

    def lend(self) -> None:
        self._lent = True

    def allocate(self, size: int) -> torch.Tensor:
        if not self._lent or size > _MAX_REUSED_BYTES:
            return empty_mmap((size,), torch.uint8)
        self._lent = False
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


class UnitProcessor:
    """Reads, rounds or copies the tensors of units; may be used by several threads.

    Attributes:
        samples: layers to verify: those of the smallest group of each kind (scheme, bias, transposed). Very large
            layers are not among them, since a sampled layer is not sliced.
        digests: result: `layer_digest` by sampled layer.
    """

    def __init__(
        self, job: Job, source: CheckpointSource, fmt: OutputFormat, units: Sequence[Unit], layout: FileLayout,
        settings: Settings,
    ) -> None:  # fmt: skip
        self.job, self.source, self.fmt, self.layout, self.settings = job, source, fmt, layout, settings
        self.digests: dict[str, str] = {}
        self._buffer = _ReadBuffer()
        source.files.stored.allocate = self._buffer.allocate
        kinds: dict[object, tuple[int, tuple[str, ...]]] = {}
        converted = {name for reversal in layout.reversals.values() for name in reversal.stored}
        for unit in units if settings.verify else ():
            if not converted.isdisjoint(unit.outputs):  # its layers cannot be read back
                continue
            for group in unit.layers:
                plans = [job.layers[name] for name in group]
                size = max(plan.out_features * plan.in_features for plan in plans)
                kind = (len(group), *((plan.scheme, plan.bias_dtype is not None, plan.transposed) for plan in plans))
                if size <= _MAX_SAMPLE_WEIGHTS:
                    kinds[kind] = min(kinds.get(kind, (size, group)), (size, group), key=lambda found: found[0])
        self.samples = frozenset(name for _, group in kinds.values() for name in group)

    def chunks(self, unit: Unit) -> Iterator[Chunk]:
        """Compute everything that a unit writes. Raises NumericsError for NaN or Inf in a weight."""
        if unit.key is not None:
            yield from self._copied(unit.key)
            return
        assembler = TensorAssembler(self.layout, self.source.model)
        for name, tensor in chain(self._packed(unit), self._dense(unit.dense)):
            for stored, whole in assembler.add(name, tensor):
                shape, dtype = self.layout.tensors[stored]
                if tuple(whole.shape) != tuple(shape) or whole.dtype != dtype:
                    raise ModelError(
                        f"tensor {name!r} became {whole.dtype} {list(whole.shape)}, planned was {dtype} {list(shape)}"
                    )
                yield stored, 0, whole

    def _copied(self, key: str) -> Iterator[Chunk]:
        """A checkpoint tensor; one that is not cast comes a few megabytes at a time."""
        if not is_stored(self.source, key, self.source.stored_meta(key)[1]):
            tensor = self.source.read_stored(key)
            check_finite(key, tensor)
            yield key, 0, tensor
            return
        files = self.source.files.stored
        stored = files.tensors[key]
        step = _CHUNK_BYTES // stored.dtype.itemsize * stored.dtype.itemsize
        for start in range(0, stored.end - stored.start, step):
            self._buffer.lend()
            part = files.read_bytes(key, start, min(step, stored.end - stored.start - start))
            files.prefetch(key, start + step, 4 * step)
            check_finite(key, part.view(stored.dtype))
            yield key, start, part

    def _dense(self, names: Iterable[str]) -> Named:
        for name in names:
            tensor = self.source.read_unquantized(name)
            check_finite(name, tensor)
            yield name, tensor

    def _packed(self, unit: Unit) -> Named:
        """The packed tensors of a unit's layers without their biases, which other units copy."""
        for group in unit.layers:
            plan = self.job.layers[group[0]]
            slices = None if plan.name in self.samples else row_slices(plan, self.fmt, self.source)
            if slices is not None and len(group) == 1:
                yield from self._packed_in_slices(plan, *slices)
                continue
            tasks = []
            self._buffer.lend()
            for plan in (self.job.layers[name] for name in group):
                weight = self.source.read(f"{plan.name}.weight")
                check_finite(f"{plan.name}.weight", weight)
                tasks.append(self._task(plan, weight.t() if plan.transposed else weight))
            share_global_scales(tasks)
            while tasks:
                layer = self._round(tasks.pop(0))
                if layer.name in self.samples:
                    self.digests[layer.name] = layer_digest(layer, self.fmt.casts_to_model_dtype, self.source.dtype)
                packed = self.fmt.pack(replace(layer, bias=None), model_dtype=self.source.dtype)
                del layer
                for name in list(packed):
                    yield name, packed.pop(name)

    def _packed_in_slices(self, plan: LayerPlan, step: int, axes: Mapping[str, int]) -> Named:
        """Round a large layer by slices of rows; only its packed tensors are in memory as a whole."""
        source, name = self.source, f"{plan.name}.weight"
        specs = layer_outputs(self.fmt, replace(plan, bias_dtype=None), source.dtype)
        whole = {tensor: torch.empty(shape, dtype=dtype) for tensor, (shape, dtype) in specs.items()}
        at = dict.fromkeys(whole, 0)
        (key,) = source.checkpoint_names(name)
        row = plan.in_features * source.dtype.itemsize
        for start in range(0, plan.out_features, step):
            count = min(step, plan.out_features - start)
            self._buffer.lend()
            part = source.files.stored.read_bytes(key, start * row, count * row)
            weight = part.view(source.tensor_meta(name)[1]).view(count, plan.in_features)
            check_finite(name, weight)
            layer = self._round(self._task(plan, weight))
            for tensor, values in self.fmt.pack(layer, model_dtype=source.dtype).items():
                size = values.shape[axes[tensor]]
                whole[tensor].narrow(axes[tensor], at[tensor], size).copy_(values)
                at[tensor] += size
        for tensor in list(whole):
            yield tensor, whole.pop(tensor)

    def _task(self, plan: LayerPlan, weight: torch.Tensor) -> LayerTask:
        module, weight = self.source.model.get_submodule(plan.name), weight.to(self.settings.device)
        return LayerTask(plan.name, module, weight, plan.scheme, transposed=plan.transposed)

    def _round(self, task: LayerTask) -> QuantizedLayer:
        """Round one layer to nearest, normalized for the format."""
        return self.fmt.normalize_for_format(quantize_layer(task, False, self.settings.scale_dtype))

    def check_samples(self, folder: Path, digests: Mapping[str, str]) -> int:
        """Read the sampled layers back as a runtime would, and return their number. Raises VerifyError when one is not
        that of `digests`."""
        files = TensorFiles.open(folder)
        for name in sorted(self.samples):
            if self._read_back(folder, files, self.job.layers[name]) != digests.get(name):
                layer = f"{folder}: layer {name}"
                raise VerifyError(f"{layer} does not hold what was rounded; do not use it, and report this")
        return len(self.samples)

    def _read_back(self, folder: Path, files: TensorFiles, plan: LayerPlan) -> str:
        """`layer_digest` of a layer in the files."""
        name, fmt, layout = plan.name, self.fmt, self.layout
        specs = layer_outputs(fmt, plan, self.source.dtype)
        if fmt.casts_to_model_dtype:
            tensor = read_model_tensors(files, [f"{name}.weight"], layout)[f"{name}.weight"]
            target = layout.targets.get(f"{name}.weight")
            tensor = tensor if target is None or target.piece is None else target.piece.cut(tensor)
            return dense_digest(tensor.t() if plan.transposed else tensor)
        tensors = read_model_tensors(files, specs, layout)
        if not fmt.loadable_here:
            layer = fmt.unpack_layer(name, plan.scheme, tensors, plan.in_features, plan.out_features)
            return layer_digest(layer, False, torch.float32)
        config = read_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])
        stored_name = self.job.stored_names.get(name, name)
        described = config.layer(stored_name, any(name.startswith(f"{block}.") for block in self.job.blocks))
        if described is None:
            raise VerifyError(f"{folder}: config.json gives no scheme for layer {stored_name}; report this")
        leaves = {tensor.removeprefix(f"{name}."): value for tensor, value in tensors.items()}
        module = module_from_tensors(name, described, plan.out_features, plan.in_features, plan.bias_dtype, leaves)
        return layer_digest(module.layer(name), False, torch.float32)
