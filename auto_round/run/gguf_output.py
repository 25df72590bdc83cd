"""Write quantized layers into one GGUF file, and verify that file against the plan and the tuned layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from auto_round.codecs.ggml.pack import pack_blocks, unpack_blocks
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.codecs.registry import clamp_to_float16
from auto_round.errors import NumericsError, VerifyError
from auto_round.formats.base import OutputFormat
from auto_round.gguf.family import Placement
from auto_round.gguf.file_types import FLOAT_TYPES
from auto_round.gguf.plan import GgufPlan
from auto_round.gguf.reader import GgufTensors
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource, check_finite
from auto_round.output.gguf_writer import GgufFile, TypedValue
from auto_round.output.staging import Staging
from auto_round.output.verify import dense_digest, layer_digest
from auto_round.output.writer import Records
from auto_round.run.gguf import gguf_file_name, weight_name
from auto_round.run.plan import Job
from auto_round.run.settings import Settings
from auto_round.run.writers import FileOutput, Mark


class GgufFileWriter(FileOutput):
    """Packs layers and writes them with the other tensors into one GGUF file, in any order.

    Attributes:
        dense: [source tensor, tensor, slot, first row, rows, digest] of every part that is not of a quantized layer, by
            its place in the file.
    """

    writer: GgufFile

    def __init__(
        self, fmt: OutputFormat, stage: Staging, file_name: str, plan: GgufPlan, source: ModelSource, optimized: bool,
        transposed: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        """`optimized`: search the scales of embeddings. `transposed`: source tensors stored as [in, out]."""
        super().__init__(fmt, stage, source)
        self.plan, self.path = plan, stage.path / file_name
        self._optimized, self._transposed = optimized, transposed
        self._written: set[str] = set()

    def _open(self, records: Records | None) -> GgufFile:
        values = {pair.key: TypedValue(pair.value, (pair.item_kind or pair.kind).name) for pair in self.plan.metadata}
        values.pop("general.architecture", None)  # `GgufFile` writes it
        return GgufFile(self.path, self.plan.conversion.arch, values, self.plan.tensors(), records)

    def _start(self) -> None:
        self.writer, self._written = self._open(None), set()
        for name, tensor in self.plan.conversion.extras().items():
            self._put(name, tensor, Placement(name))

    def _restore(self, records: Records, marks: Sequence[Mark]) -> None:
        self.writer = self._open(records)
        self._written = {weight_name(self.source, name) for name in self.expected}
        self._written |= {values[0] for values in self.dense.values()}

    def layer(self, layer: QuantizedLayer) -> None:
        name = weight_name(self.source, layer.name)
        places = self.plan.places[name]
        assert places
        self._written.add(name)
        self.expected[layer.name] = layer_digest(layer, False, torch.float32)
        data = pack_blocks(layer.codes_as(GgmlBlocks))
        for place in places:
            self._write(place, data if place.rows is None else data[place.rows])
        if layer.bias is not None:
            self._add(f"{layer.name}.bias", layer.bias)

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        for name in names:
            if name not in self._written:
                tensor = source.read(name)
                if source.checks_finite:
                    check_finite(name, tensor)
                self._add(name, tensor)

    def spare(self) -> None:
        """Write nothing: a GGUF file holds only tensors that its architecture reads."""

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        raise NumericsError(
            f"{reason}; on_nan=keep: the header of a GGUF file fixes the type of every tensor, so layers such as "
            f"{names[0]} cannot be left unquantized any more: name them in ignore_layers, or use on_nan=rtn"
        )

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        assert not made  # refused by the planner

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self._written.add(name)
        if name in self._transposed:
            tensor = tensor.t()
        for place in self.plan.places[name]:
            self._put(name, tensor, place)

    def _put(self, name: str, tensor: torch.Tensor, place: Placement) -> None:
        """Write the part of a tensor that belongs to this placement, in the placement's type."""
        tensor = place.cut(tensor)
        kind = self.plan.types[place.tensor]
        if kind not in ("F32", "BF16"):  # F16, or types with float16 super-block scales
            clamped = clamp_to_float16(tensor)
            if clamped is not tensor:
                logger.warning("tensor %s holds weights beyond float16, which %s clamps", name, kind)
            tensor = clamped
        if kind in GGML_TYPES:
            rows = tensor.reshape(-1, tensor.shape[-1])
            # Embeddings are looked up, not multiplied: a full search would take most of a small model's time.
            packed = pack_blocks(search_blocks(rows, kind, quick=True) if self._optimized else plain_blocks(rows, kind))
            data = packed.view(*tensor.shape[:-1], packed.shape[-1])
        else:
            data = tensor.to(FLOAT_TYPES[kind]).contiguous()
        self._write(place, data)
        key = f"{place.tensor} {place.slot} {place.at_row}"
        self.dense[key] = [name, place.tensor, place.slot, place.at_row, data.shape[0], dense_digest(data)]

    def _write(self, place: Placement, data: torch.Tensor) -> None:
        self.writer.write(place.tensor, data, first_row=place.at_row, slot=place.slot)


def make_gguf_writer(
    job: Job, fmt: OutputFormat, stage: Staging, source: ModelSource, settings: Settings
) -> GgufFileWriter:
    """The writer of a job's GGUF file."""
    assert job.gguf is not None
    transposed = frozenset(f"{name}.weight" for name, plan in job.layers.items() if plan.transposed)
    name = gguf_file_name(job.model, job.gguf)
    return GgufFileWriter(fmt, stage, name, job.gguf, source, settings.optimized_start, transposed)


def verify_file(output: GgufFileWriter, job: Job, source: ModelSource) -> dict[str, Any]:
    """Read a finished file with the `gguf` package and compare metadata, tensor infos, and the content of every tensor.

    Returns plain values for the report.

    Raises:
        VerifyError: something differs from the plan or from the quantized layers.
    """
    plan, file = output.plan, GgufTensors(output.path)
    _check_values(plan, file)
    _check_infos(plan, file)
    for name, digest in output.expected.items():
        layer = job.layers[name]
        assert layer.ggml is not None
        kind = GGML_TYPES[layer.ggml]
        places = plan.places[weight_name(source, name)]
        data = torch.empty(layer.out_features, kind.row_bytes(layer.in_features), dtype=torch.uint8)
        for place in places:
            order = torch.arange(layer.out_features) if place.rows is None else place.rows
            data[order] = _stored(file, place.tensor, place.slot, place.at_row, len(order))
        read = QuantizedLayer(name, layer.scheme, unpack_blocks(data, kind, layer.in_features))
        if layer_digest(read, False, torch.float32) != digest:
            raise VerifyError(
                f"{output.path}: {places[0].tensor} does not hold what was tuned for layer {name}; do not use this "
                "file, and report this"
            )
    for name, tensor, slot, at_row, rows, digest in output.dense.values():
        if dense_digest(_stored(file, tensor, slot, at_row, rows)) != digest:
            raise VerifyError(f"{output.path}: tensor {tensor} is not what was made of {name}; do not use this file")
    return {"passed": True, "tensors": len(plan.shapes), "layers": len(output.expected), "loss_reopened": None}


def _check_values(plan: GgufPlan, file: GgufTensors) -> None:
    """Compare the metadata of the model and its tokenizer."""
    for pair in plan.metadata:
        kind = (pair.item_kind or pair.kind).name
        items = list(pair.value) if isinstance(pair.value, (list, tuple)) else [pair.value]
        found = file.values.get(pair.key)
        stored = found if isinstance(found, list) else [found]
        if [_as_stored(item, kind) for item in items] != stored:
            raise VerifyError(f"{file.path}: key {pair.key!r} is not as planned; do not use this file")


def _as_stored(value: Any, kind: str) -> Any:
    """A value as a reader of the file sees it."""
    if kind == "FLOAT32":
        return float(torch.tensor(value, dtype=torch.float32))
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _check_infos(plan: GgufPlan, file: GgufTensors) -> None:
    planned = {name: (shape, plan.types[name]) for name, shape in plan.shapes.items()}
    stored = {name: (info.shape, info.kind) for name, info in file.tensors.items()}
    if planned != stored:
        wrong = sorted(n for n in planned.keys() | stored.keys() if planned.get(n) != stored.get(n))
        first = wrong[0]
        raise VerifyError(
            f"{file.path}: {len(wrong)} tensors are not as planned, such as {first}: {stored.get(first)} in the file, "
            f"{planned.get(first)} in the plan"
        )


def _stored(file: GgufTensors, tensor: str, slot: int | None, at_row: int, rows: int) -> torch.Tensor:
    """Rows of a tensor in the file."""
    return file.stored(tensor, slot)[at_row : at_row + rows]
