"""GGUF settings of a run: the ggml type of each layer, and reading and writing importance matrices (imatrix)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.imatrix import read_imatrix, write_imatrix
from auto_round.codecs.ggml.types import GGML_TYPES, ggml_scheme, ggml_type_of
from auto_round.errors import ConfigError, DataError, NumericsError
from auto_round.formats.base import OutputFormat
from auto_round.formats.no_config import GgufFormat
from auto_round.gguf.conversion import conversion_for
from auto_round.gguf.file_types import FLOAT_TYPES, TYPE_OF_BITS, fallback_type
from auto_round.gguf.plan import GgufPlan, plan_file
from auto_round.layer_config import matching_layers, scheme_from_entry
from auto_round.logger import logger
from auto_round.modeling.blocks import is_conv1d, linear_names
from auto_round.modeling.source import ModelSource
from auto_round.run.plan import Job, LayerPlan, LayerRules, embedding_names, with_types
from auto_round.run.settings import Settings
from auto_round.schemes import QuantizationScheme

_REARRANGED = "its tensor is rearranged in the file: quantized when it is written"
_TYPE_OF_DTYPE = {dtype: kind for kind, dtype in FLOAT_TYPES.items()}


def gguf_format(formats: Sequence[OutputFormat]) -> GgufFormat | None:
    """The GGUF format among the formats of a run, or None; a run has at most one."""
    return next((fmt for fmt in formats if isinstance(fmt, GgufFormat)), None)


def plan_gguf_file(fmt: GgufFormat, source: ModelSource, tokenizer: Any, with_importance: bool) -> GgufPlan:
    """Plan the GGUF file by the rules of its file type, without the layer configuration.

    Raises:
        UnsupportedError: a family, tensor or tokenizer that the conversion does not know.
    """
    tied = source.tied()
    shapes = {name: tuple(source.tensor_meta(name)[0]) for name in source.tensor_names() if name not in tied}
    for name, module in source.model.named_modules():
        if is_conv1d(module):
            shapes[f"{name}.weight"] = shapes[f"{name}.weight"][::-1]
    conversion = conversion_for(source.config, shapes)
    return plan_file(
        fmt.file_type, conversion, with_importance, tied, tokenizer, source.config, source.folder, source.name_or_path
    )


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
    """What a GGUF file decides: every layer, the head too, gets a type of ggml.

    Attributes:
        file: plan of the file. Its types are those of the file type's rules with the layer configuration's for
            embeddings; after `settled` those of all layers.
    """

    file: GgufPlan

    def __init__(self, settings: Settings, source: ModelSource, fmt: GgufFormat, tokenizer: Any) -> None:
        """Raises what `plan_gguf_file` raises, and ConfigError for an embedding with bits that no type has."""
        super().__init__(settings, source)
        self.format, self.quant_lm_head = fmt, True
        self.file = plan_gguf_file(fmt, source, tokenizer, settings.weighs)
        types, patterns = self._embedding_types(linear_names(source.model))
        self.file = self.file.with_types({name: kind for name, kind in types.items() if self.file.places[name]})
        self.layer_config = {name: entry for name, entry in settings.layer_config.items() if name not in patterns}
        self._embeddings = embedding_names(source) if patterns else ()

    def _embedding_types(self, layers: Sequence[str]) -> tuple[dict[str, str], set[str]]:
        """The types that the layer configuration gives embeddings, by stored tensor, and the patterns that match them.

        An entry gives `bits` or one of ggml's types. A pattern that also matches one of the linear `layers` does not
        apply to embeddings.
        """
        wanted: dict[str, str] = {}
        used: set[str] = set()
        for pattern, entry in self.layer_config.items():
            found = [] if matching_layers(pattern, layers) else matching_layers(pattern, embedding_names(self.source))
            for name in found:
                used.add(pattern)
                stored = weight_name(self.source, name)
                scheme = scheme_from_entry(pattern, entry, self.settings.scheme)
                kind = ggml_type_of(scheme)
                shape, dtype = self.source.tensor_meta(stored)
                if not scheme.quantizes_weights:
                    wanted[stored] = _TYPE_OF_DTYPE.get(dtype, "F32")
                else:
                    name_of_type = _type_of_bits(name, scheme.bits) if kind is None else kind.name
                    wanted[stored] = fallback_type(name_of_type, shape[-1])
        return wanted, used

    def defaults(self, names: Sequence[str]) -> dict[str, QuantizationScheme]:
        """The scheme of every layer by the file type's rules."""
        kinds = {name: self.file.type_of(weight_name(self.source, name)) or "F16" for name in names}
        return {name: scheme_of_type(kind, self.settings.scheme) for name, kind in kinds.items()}

    def fitted(
        self, schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int]
    ) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Replace schemes that give only `bits` by the type of that width, and types whose blocks do not divide a
        layer's rows by llama.cpp's fallback types. Raises ConfigError when no type has that many bits."""
        result, notes, own = dict(schemes), list(self.file.notes), self.defaults(list(schemes))
        for name, scheme in schemes.items():
            kind = ggml_type_of(scheme) if scheme.quantizes_weights else None
            if kind is not None:
                fitting = fallback_type(kind.name, widths[name])
                if fitting != kind.name:
                    result[name] = scheme_of_type(fitting, scheme)
                    notes.append(f"{name} is {fitting} instead of {kind.name}: rows of {widths[name]} do not divide")
            elif scheme.quantizes_weights and scheme == own[name].with_overrides({"bits": scheme.bits}):
                result[name] = scheme_of_type(fallback_type(_type_of_bits(name, scheme.bits), widths[name]), scheme)
        return result, notes

    def unquantized_reason(self, name: str) -> str | None:
        """Why the rows of a layer cannot be stored in the tuned layout, or None."""
        places = self.file.places[weight_name(self.source, name)]
        return _REARRANGED if any(place.edit is not None for place in places) else None

    def settled(self, layers: Mapping[str, LayerPlan]) -> tuple[dict[str, LayerPlan], list[str]]:
        """The plans with the ggml type of each layer, which the plan of the file gets too.

        The notes name embeddings that get the type of the head that shares their tensor. Raises ConfigError when two
        parts of one tensor have different types.
        """
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
    return f"{base_name}-{plan.size_label}-{plan.file_type.upper()}.gguf"


def given_importance(path: str, job: Job, source: ModelSource) -> dict[str, torch.Tensor]:
    """Read an importance file (imatrix) of llama.cpp: float32 [in] by layer name, for the layers that it names.

    Raises:
        DataError: the file is damaged, of another model, or names none of the layers.
    """
    plan = _plan(job)
    file = read_imatrix(path)
    found: dict[str, torch.Tensor] = {}
    for layer in job.quantized():
        for place in plan.places[weight_name(source, layer)]:
            values = file.of(place.tensor, plan.shapes[place.tensor])
            if values is not None:
                found[layer] = values if place.slot is None else values[place.slot]
    if not found:
        raise DataError(f"{path} has no importance for any layer of this model; it was made for another one")
    return found


def log_missing_importance(path: str, job: Job, found: Mapping[str, torch.Tensor]) -> None:
    """Log the number of the job's layers that an importance file does not name."""
    missing = [name for name in job.quantized() if name not in found]
    if missing:
        message = "%s has no importance for %d layers, such as %s: all of their inputs get the same weight"
        logger.info(message, path, len(missing), missing[0])


def save_importance(
    path: str, job: Job, source: ModelSource, sums: Mapping[str, torch.Tensor], tokens: Mapping[str, int],
    chunk_size: int,
) -> None:  # fmt: skip
    """Write an importance file from sums of squares of the inputs [in] and numbers of tokens by layer name."""
    plan = _plan(job)
    stacked: dict[str, dict[int, str]] = {}
    for layer in sums:
        for place in plan.places[weight_name(source, layer)]:
            stacked.setdefault(place.tensor, {})[place.slot or 0] = layer
    all_sums = {name: torch.stack([sums[layers[i]].cpu() for i in sorted(layers)]) for name, layers in stacked.items()}
    counts = {name: torch.tensor([tokens[layers[i]] for i in sorted(layers)]) for name, layers in stacked.items()}
    write_imatrix(path, all_sums, counts, chunk_size)
    logger.info("saved the importance of %d tensors to %s", len(all_sums), path)


def _plan(job: Job) -> GgufPlan:
    assert job.gguf is not None  # the planner refuses importance files without a GGUF format
    return job.gguf
