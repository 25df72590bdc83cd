"""GGUF files of a run: the ggml type of each layer, importance matrices (imatrix), and the file's writer and check."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.imatrix import read_imatrix, write_imatrix
from auto_round.codecs.ggml.pack import pack_blocks, unpack_blocks
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, ggml_scheme
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.codecs.registry import clamp_to_float16
from auto_round.errors import ConfigError, DataError, NumericsError
from auto_round.formats.base import OutputFormat
from auto_round.formats.no_config import GgufFormat
from auto_round.gguf.conversion import GgufPlan, conversion_for, plan_file
from auto_round.gguf.family import Placement
from auto_round.gguf.file_types import FLOAT_TYPES, TYPE_OF_BITS, fallback_type
from auto_round.gguf.metadata import size_label
from auto_round.gguf.reader import GgufTensors
from auto_round.layer_config import matching_layers, scheme_from_entry
from auto_round.logger import logger
from auto_round.modeling.blocks import is_conv1d, linear_names
from auto_round.modeling.source import ModelSource, check_finite
from auto_round.output.gguf_writer import GgufFile
from auto_round.output.staging import Staging
from auto_round.output.verify import compare_tensors, compare_values, dense_digest, layer_digest, mismatch_error
from auto_round.output.writer import Records
from auto_round.run.plan import Job, LayerPlan, LayerRules, embedding_names, with_types
from auto_round.run.settings import Settings
from auto_round.run.writers import FileOutput, Mark, OutputContext
from auto_round.schemes import QuantizationScheme

_REARRANGED = "its tensor is rearranged in the file: quantized when it is written"
_TYPE_OF_DTYPE = {dtype: kind for kind, dtype in FLOAT_TYPES.items()}


def scheme_of_type(kind: str, default: QuantizationScheme) -> QuantizationScheme:
    """The scheme of a tensor of type `kind`; 16 bits for F32, F16 and BF16."""
    return ggml_scheme(kind) if kind in GGML_TYPES else default.with_overrides({"bits": 16, "act_bits": 16})


def weight_name(source: ModelSource, layer: str) -> str:
    """The stored tensor of a layer's weight: the embedding's for a tied head."""
    name = f"{layer}.weight"
    return source.tied().get(name, name)


def _type_of_bits(layer: str, bits: int) -> str:
    if bits not in TYPE_OF_BITS:
        known = ", ".join(map(str, TYPE_OF_BITS))
        raise ConfigError(f"layer {layer}: no GGUF type has {bits} bits; use one of {known}")
    return TYPE_OF_BITS[bits]


class GgufRules(LayerRules):
    """What a GGUF file decides: every layer, the head too, gets a type of ggml. `file`: its plan, after `settled` with
    the types of all layers."""

    file: GgufPlan

    def __init__(self, settings: Settings, source: ModelSource, fmt: GgufFormat, tokenizer: Any) -> None:
        super().__init__(settings, source)
        self.format, self.quant_lm_head = fmt, True
        tied = source.tied()
        shapes = {name: tuple(source.tensor_meta(name)[0]) for name in source.tensor_names() if name not in tied}
        for name, module in source.model.named_modules():
            if is_conv1d(module):
                shapes[f"{name}.weight"] = shapes[f"{name}.weight"][::-1]
        self.file = plan_file(
            fmt.file_type, conversion_for(source.config, shapes), settings.weighs, tied, tokenizer, source.config,
            source.folder, source.name_or_path,
        )  # fmt: skip
        types, patterns = self._embedding_types(linear_names(source.model))
        self.file = self.file.with_types({name: kind for name, kind in types.items() if self.file.places[name]})
        self.layer_config = {name: entry for name, entry in settings.layer_config.items() if name not in patterns}
        self._embeddings = embedding_names(source) if patterns else ()

    def _embedding_types(self, layers: Sequence[str]) -> tuple[dict[str, str], set[str]]:
        """The types that the layer configuration gives embeddings, by stored tensor, and the patterns that match them:
        those that match none of the linear `layers`."""
        wanted: dict[str, str] = {}
        used: set[str] = set()
        for pattern, entry in self.layer_config.items():
            found = [] if matching_layers(pattern, layers) else matching_layers(pattern, embedding_names(self.source))
            for name in found:
                used.add(pattern)
                stored = weight_name(self.source, name)
                scheme = scheme_from_entry(pattern, entry, self.settings.scheme)
                kind = codec_of(scheme).ggml_type
                shape, dtype = self.source.tensor_meta(stored)
                if not scheme.quantizes_weights:
                    wanted[stored] = _TYPE_OF_DTYPE.get(dtype, "F32")
                else:
                    name_of_type = _type_of_bits(name, scheme.bits) if kind is None else kind.name
                    wanted[stored] = fallback_type(name_of_type, shape[-1])
        return wanted, used

    def defaults(self, names: Sequence[str]) -> dict[str, QuantizationScheme]:
        kinds = {name: self.file.type_of(weight_name(self.source, name)) or "F16" for name in names}
        return {name: scheme_of_type(kind, self.settings.scheme) for name, kind in kinds.items()}

    def fitted(
        self, schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int]
    ) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Replace schemes that give only `bits` by the type of that width, and types whose blocks do not divide a
        layer's rows by llama.cpp's fallback types."""
        result, notes, own = dict(schemes), list(self.file.notes), self.defaults(list(schemes))
        for name, scheme in schemes.items():
            kind = codec_of(scheme).ggml_type
            if kind is not None:
                fitting = fallback_type(kind.name, widths[name])
                if fitting != kind.name:
                    result[name] = scheme_of_type(fitting, scheme)
                    notes.append(f"{name} is {fitting} instead of {kind.name}: rows of {widths[name]} do not divide")
            elif scheme.quantizes_weights and scheme == own[name].with_overrides({"bits": scheme.bits}):
                result[name] = scheme_of_type(fallback_type(_type_of_bits(name, scheme.bits), widths[name]), scheme)
        return result, notes

    def unquantized_reason(self, name: str) -> str | None:
        places = self.file.places[weight_name(self.source, name)]
        return _REARRANGED if any(place.edit is not None for place in places) else None

    def settled(self, layers: Mapping[str, LayerPlan]) -> tuple[dict[str, LayerPlan], list[str]]:
        """The plans with the ggml type of each layer, which the plan of the file gets too. The notes name embeddings
        that get the type of the head that shares their tensor."""
        layers, asked = with_types(layers), self.file
        wanted: dict[str, str] = {}
        for name, layer in layers.items():
            stored = weight_name(self.source, name)
            if not asked.places[stored] or layer.reason == _REARRANGED:
                continue
            kind = layer.ggml
            if kind is None:  # unquantized: the float type of the file type's rules, else the source's dtype
                ruled = asked.type_of(stored)
                own = _TYPE_OF_DTYPE.get(self.source.tensor_meta(stored)[1], "F32")
                kind = ruled if ruled is not None and ruled in FLOAT_TYPES else own
            wanted[stored] = kind
        self.file = asked.with_types(wanted)
        notes = []
        for name in self._embeddings:
            before, now = (plan.type_of(weight_name(self.source, name)) for plan in (asked, self.file))
            if before != now:
                notes.append(
                    f"{name} is {now}, not {before}: the head shares its tensor, and layer_config gives the head that "
                    "type"
                )
        return layers, notes

    def embedding_types(self) -> dict[str, tuple[QuantizationScheme, str | None]]:
        found: dict[str, tuple[QuantizationScheme, str | None]] = {}
        for name in embedding_names(self.source):
            if kind := self.file.type_of(f"{name}.weight"):
                scheme = scheme_of_type(kind, self.settings.scheme)
                found[name] = scheme, kind if scheme.quantizes_weights else None
        return found

    def check_damaged(self, damaged: Mapping[str, str]) -> None:
        for name, bad in damaged.items():
            kind = self.file.type_of(name)
            if kind not in (None, "F32", "F16", "BF16"):
                raise NumericsError(
                    f"tensor {name!r} holds {bad}, and this GGUF file stores it as {kind}; repair the model, or use a "
                    "file type that keeps it in F16"
                )

    def nbytes(self, fmt: OutputFormat) -> int | None:
        return self.file.nbytes() if fmt is self.format else None

    def identity(self) -> dict[str, str]:
        digest = hashlib.sha256(repr(self.file.metadata).encode()).hexdigest()[:16]
        return {"GGUF file": gguf_file_name(self.source.name_or_path, self.file), "GGUF metadata": digest}


def gguf_file_name(model: str, plan: GgufPlan) -> str:
    """Name of the file of a model."""
    base_name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model.rstrip("/\\")).name or "model")
    return f"{base_name}-{size_label(plan.shapes)}-{plan.file_type.upper()}.gguf"


def given_importance(path: str, job: Job, source: ModelSource) -> dict[str, torch.Tensor]:
    """Read an importance file (imatrix) of llama.cpp: float32 [in] by layer name, for the layers that it names. Raises
    DataError when the file is damaged, or of another model."""
    plan, file = job.gguf, read_imatrix(path)
    assert plan is not None  # the planner refuses importance files without a GGUF format
    found: dict[str, torch.Tensor] = {}
    for layer in job.quantized():
        for place in plan.places[weight_name(source, layer)]:
            values = file.of(place.tensor, plan.shapes[place.tensor])
            if values is not None:
                found[layer] = values if place.slot is None else values[place.slot]
    if not found:
        raise DataError(f"{path} has no importance for any layer of this model; it was made for another one")
    return found


def save_importance(
    path: str, job: Job, source: ModelSource, sums: Mapping[str, torch.Tensor], tokens: Mapping[str, int],
    chunk_size: int,
) -> None:  # fmt: skip
    """Write an importance file from sums of squares of the inputs [in] and numbers of tokens by layer name."""
    plan = job.gguf
    assert plan is not None
    stacked: dict[str, dict[int, str]] = {}
    for layer in sums:
        for place in plan.places[weight_name(source, layer)]:
            stacked.setdefault(place.tensor, {})[place.slot or 0] = layer
    all_sums = {name: torch.stack([sums[layers[i]].cpu() for i in sorted(layers)]) for name, layers in stacked.items()}
    counts = {name: torch.tensor([tokens[layers[i]] for i in sorted(layers)]) for name, layers in stacked.items()}
    write_imatrix(path, all_sums, counts, chunk_size)
    logger.info("saved the importance of %d tensors to %s", len(all_sums), path)


class GgufFileWriter(FileOutput):
    """Packs layers and writes them with the other tensors into one GGUF file, in any order. `dense`: [source tensor,
    tensor, slot, first row, rows, digest] of every part that is not of a quantized layer, by its place in the file."""

    writer: GgufFile

    def __init__(self, job: Job, fmt: OutputFormat, stage: Staging, source: ModelSource, shard: int | str) -> None:
        super().__init__(job, fmt, stage, source, shard)
        assert job.gguf is not None
        self.plan, self.path = job.gguf, stage.path / gguf_file_name(job.model, job.gguf)
        self._transposed = {f"{name}.weight" for name, plan in job.layers.items() if plan.transposed}
        self._written: set[str] = set()

    def _open(self, records: Records | None = None) -> GgufFile:
        plan = self.plan
        tensors = [(name, shape, plan.types[name]) for name, shape in plan.shapes.items()]
        return GgufFile(self.path, plan.conversion.arch, plan.metadata, tensors, records)

    def _start(self) -> None:
        self.writer, self._written = self._open(), set()
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
            rows = data if place.rows is None else data[place.rows]
            self.writer.write(place.tensor, rows, first_row=place.at_row, slot=place.slot)
        if layer.bias is not None:
            self._add(f"{layer.name}.bias", layer.bias)

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        for name in names:
            if name not in self._written:
                tensor = source.read(name)
                if source.checks_finite:
                    check_finite(name, tensor)
                self._add(name, tensor)

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
            searches = self.job.used.optimized_start
            packed = pack_blocks(search_blocks(rows, kind, quick=True) if searches else plain_blocks(rows, kind))
            data = packed.view(*tensor.shape[:-1], packed.shape[-1])
        else:
            data = tensor.to(FLOAT_TYPES[kind]).contiguous()
        self.writer.write(place.tensor, data, first_row=place.at_row, slot=place.slot)
        key = f"{place.tensor} {place.slot} {place.at_row}"
        self.dense[key] = [name, place.tensor, place.slot, place.at_row, data.shape[0], dense_digest(data)]

    def verify(self, made: OutputContext) -> dict[str, Any]:
        """Compare metadata, tensor infos, and the content of every tensor."""
        plan, file = self.plan, GgufTensors(self.path)
        planned, stored = {}, {}
        for pair in plan.metadata:
            kind, found = (pair.item_kind or pair.kind).name, file.values.get(pair.key)
            items = pair.value if isinstance(pair.value, (list, tuple)) else [pair.value]
            planned[pair.key] = [_as_stored(item, kind) for item in items]
            stored[pair.key] = found if isinstance(found, list) else [found]
        compare_values(self.path, planned, stored)
        infos = {name: (info.shape, info.kind) for name, info in file.tensors.items()}
        compare_tensors(self.path, {name: (shape, plan.types[name]) for name, shape in plan.shapes.items()}, infos)
        for name, digest in self.expected.items():
            layer = made.job.layers[name]
            assert layer.ggml is not None
            blocks = GGML_TYPES[layer.ggml]
            data = torch.empty(layer.out_features, blocks.row_bytes(layer.in_features), dtype=torch.uint8)
            for place in plan.places[weight_name(self.source, name)]:
                order = torch.arange(layer.out_features) if place.rows is None else place.rows
                data[order] = file.stored(place.tensor, place.slot)[place.at_row : place.at_row + len(order)]
            read = QuantizedLayer(name, layer.scheme, unpack_blocks(data, blocks, layer.in_features))
            if layer_digest(read, False, torch.float32) != digest:
                raise mismatch_error(self.path, f"layer {name}")
        for _, tensor, slot, at_row, rows, digest in self.dense.values():
            if dense_digest(file.stored(tensor, slot)[at_row : at_row + rows]) != digest:
                raise mismatch_error(self.path, f"tensor {tensor}")
        return {"passed": True, "tensors": len(plan.shapes), "layers": len(self.expected), "loss_reopened": None}


def _as_stored(value: Any, kind: str) -> Any:
    """A metadata value as a reader of the file sees it."""
    if kind == "FLOAT32":
        return float(torch.tensor(value, dtype=torch.float32))
    return value.decode("utf-8") if isinstance(value, bytes) else value
