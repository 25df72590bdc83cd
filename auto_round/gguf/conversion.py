"""Convert one Transformers model to GGUF: tensor names, shapes, row order and keys; and the plan of the whole file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import ConfigError, ModelError, UnsupportedError, nearest
from auto_round.gguf.families import FAMILIES
from auto_round.gguf.family import Family, HfConfig, Placement
from auto_round.gguf.file_types import FILE_TYPES, ModelDimensions, fallback_notes, tensor_bytes, tensor_types
from auto_round.gguf.metadata import KeyValue, general_metadata, gguf_package, key_value
from auto_round.gguf.vocab import vocabulary_for

Shapes = Mapping[str, tuple[int, ...]]
# Buffers in some checkpoints that llama.cpp does not use.
_SKIPPED = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.(masked_)?bias)$")
_BLOCK = re.compile(r"(?:layers|h)\.(\d+)\.")
_EXPERT = re.compile(
    r".*layers\.(?P<block>\d+)\.(mlp|block_sparse_moe)\.experts\.(?P<index>\d+)\."
    r"(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_FUSED = re.compile(
    r".*layers\.(?P<block>\d+)\.(mlp|block_sparse_moe)\."
    r"(experts\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?|(?P<way>input|output)_linear\.weight)"
)
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


@dataclass(frozen=True)
class Conversion:
    """How one model becomes a GGUF file. `sources`: shapes of its tensors by name (a Conv1D's weight as [out, in])."""

    family: Family
    settings: HfConfig
    sources: Shapes = field(default_factory=dict)

    @property
    def arch(self) -> str:
        return self.family.arch

    @cached_property
    def _names(self) -> Any:
        gguf = gguf_package()
        arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch), None)
        if arch is None:
            raise UnsupportedError(
                f"the installed gguf package does not know the architecture {self.arch!r}; install a newer one"
            )
        return gguf.get_tensor_name_map(arch, self.settings.blocks)

    def place(self, name: str) -> list[Placement]:
        """Placements of a source tensor; none for a skipped one. Raises UnsupportedError for an unknown one."""
        block = _BLOCK.search(name)
        prediction = block is not None and int(block[1]) >= self.settings.blocks  # of several tokens; not written
        if prediction or _SKIPPED.search(name) or (self.settings.tied and name in ("lm_head.weight", "output.weight")):
            return []
        if expert := _EXPERT.fullmatch(name):
            target = f"blk.{expert['block']}.ffn_{_PARTS[expert['part']]}_exps.weight"
            return [Placement(target, slot=int(expert["index"]))]
        fused = _FUSED.fullmatch(name)
        if fused and len(self.sources.get(name, (0, 0, 0))) == 3:
            front = f"blk.{fused['block']}.ffn_"
            if fused["part"] == "gate_up_proj" or fused["way"] == "input":  # [experts, 2 * inner, hidden]
                halves = (("gate", lambda w: w.chunk(2, 1)[0]), ("up", lambda w: w.chunk(2, 1)[1]))
                return [Placement(f"{front}{part}_exps.weight", edit=half) for part, half in halves]
            return [Placement(f"{front}{_PARTS.get(fused['part'], 'down')}_exps.weight")]
        for rule in self.family.rules:
            if found := re.fullmatch(rule.pattern, name):
                return rule.place(self.settings, found)
        renamed = name
        for pattern, replacement in self.family.renames:
            renamed = re.sub(pattern, replacement, renamed)
        target = self._names.get_name(renamed, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UnsupportedError(
                f"llama.cpp's architecture {self.arch!r} has no tensor for {name!r}; the model does not match its "
                "config.json, or is a variant that cannot be written as GGUF"
            )
        return [Placement(target)]

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors in the file. Raises ModelError when parts of one are missing or do not fit."""
        parts: dict[str, list[tuple[str, Placement, tuple[int, ...]]]] = {}
        for source, shape in self.sources.items():
            for placement in self.place(source):
                cut = tuple(placement.cut(torch.empty(shape, device="meta")).shape)
                parts.setdefault(placement.tensor, []).append((source, placement, cut))
        made: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in self.extras().items()}
        for target, found in parts.items():
            first, rows = found[0][2], 0
            slots = [placement.slot for _, placement, _ in found if placement.slot is not None]
            if sorted(slots) == list(range(len(found))) and all(shape == first for *_, shape in found):
                made[target] = (len(found), *first)
                continue
            for _, placement, shape in sorted(found, key=lambda part: part[1].at_row):
                if slots or placement.at_row != rows or shape[1:] != first[1:]:
                    names = ", ".join(source for source, _, _ in found[:3])
                    raise ModelError(
                        f"the parts of tensor {target!r} ({names}, ...) are incomplete, or differ in shape"
                    )
                rows += shape[0]
            made[target] = (rows, *first[1:])
        return made

    def extras(self) -> dict[str, torch.Tensor]:
        """Computed tensors that are in no checkpoint, float32, by their names in the file."""
        return self.family.extras(self.settings) if self.family.extras else {}

    def metadata(self) -> list[KeyValue]:
        """The keys of the model's architecture, such as "llama.block_count"."""
        made: dict[str, KeyValue] = {}
        for key in self.family.keys:
            # A later key replaces an earlier one, even without a value.
            name = f"{self.arch}.{key.name}"
            made.pop(name, None)
            if (value := key.value(self.settings)) is not None:
                made[name] = key_value(name, value, key.kind)
        return list(made.values())


def conversion_for(config: Any, sources: Shapes | None = None) -> Conversion:
    """The conversion of a model with this configuration, or the values of its config.json, and tensors of these shapes.
    Raises UnsupportedError when the family is unknown, llama.cpp would run a different model or has no tensor for a
    source, or the package gguf is missing, ModelError when a configuration value or tensors are missing."""
    settings = HfConfig.of(config)
    kind = settings.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"models of type {kind!r} cannot be written as GGUF{nearest(kind, FAMILIES)} Types that can: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    for assumption in FAMILIES[kind].assumes:
        if not assumption.holds(settings):
            raise UnsupportedError(f"this {kind} model cannot be written as GGUF: {assumption.otherwise}")
    if settings.blocks < 1 or settings.hidden < 1:
        raise ModelError(f"config.json of type {kind!r} has no layers or no width")
    gguf_package()
    conversion = Conversion(FAMILIES[kind], settings, dict(sources or {}))
    _ = conversion.tensors  # validates all placements
    return conversion


@dataclass(frozen=True)
class GgufPlan:
    """Tensors and metadata of one file."""

    file_type: str
    conversion: Conversion
    # of every source tensor, by its name in the run; none for a skipped one
    places: Mapping[str, tuple[Placement, ...]]
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by its name there, in the order of the file
    types: Mapping[str, str]  # likewise
    metadata: tuple[KeyValue, ...]  # of the model and its tokenizer
    notes: tuple[str, ...]  # differences from the file type's rules and from Transformers, for the user

    def type_of(self, source: str) -> str | None:
        """The type of the file's tensor that holds the source tensor, None for a skipped or unknown one."""
        places = self.places.get(source)
        return self.types[places[0].tensor] if places else None

    def with_types(self, wanted: Mapping[str, str]) -> GgufPlan:
        """The plan with other types for some sources. Raises ConfigError when parts of one tensor would differ."""
        found: dict[str, tuple[str, str]] = {}
        for source, kind in wanted.items():
            for place in self.places[source]:
                first = found.setdefault(place.tensor, (kind, source))
                if first[0] != kind:
                    raise ConfigError(
                        f"layers {first[1]} and {source} are parts of one GGUF tensor, {place.tensor}, and cannot be "
                        f"{first[0]} and {kind}; give both one type in layer_config"
                    )
        return replace(self, types={**self.types, **{name: kind for name, (kind, _) in found.items()}})

    def nbytes(self) -> int:
        """Bytes of the file: the header, and tensors aligned to 32 bytes."""
        tensors = sum(-(-tensor_bytes(self.types[n], shape) // 32) * 32 for n, shape in self.shapes.items())
        infos = sum(8 + len(n.encode()) + 4 + 8 * len(shape) + 4 + 8 for n, shape in self.shapes.items())
        arch = 8 + len("general.architecture") + 4 + 8 + len(self.conversion.arch)
        header = 24 + arch + sum(pair.nbytes() for pair in self.metadata) + infos
        return tensors + -(-header // 32) * 32


def plan_file(
    file_type: str, conversion: Conversion, with_importance: bool, tied: Iterable[str], tokenizer: Any, config: Any,
    folder: str | Path | None = None, name: str = "",
) -> GgufPlan:  # fmt: skip
    """Place every tensor of the model, choose its type, and make the file's metadata. `with_importance`: an importance
    matrix is used, on which a few of llama.cpp's choices depend; `tied`: names that share another tensor's storage;
    `folder`, `name`: of the model, as given by the user. Raises UnsupportedError when the architecture has no tensor
    for a source, or llama.cpp no such tokenizer, ModelError when there is no tokenizer, or it does not fit the
    embedding."""
    shapes, keys = conversion.tensors, conversion.metadata()
    sizes = {pair.key.partition(".")[2]: pair.value for pair in keys}
    heads = sizes["attention.head_count"]
    dimensions = ModelDimensions(
        sizes["block_count"], heads, sizes.get("attention.head_count_kv", heads), sizes.get("expert_count", 0)
    )
    types, fallbacks = tensor_types(file_type, conversion.arch, list(shapes.items()), dimensions, with_importance)
    if tokenizer is None:
        raise ModelError(
            "a GGUF file holds the tokenizer, and this model has none; give tokenizer=..., or add its files"
        )
    vocabulary = vocabulary_for(tokenizer, shapes["token_embd.weight"][0], config, folder)
    number = FILE_TYPES[file_type].number
    general = general_metadata(conversion.arch, shapes, number, folder=folder, name=name)
    notes = [text for holds, text in conversion.family.notes if holds(conversion.settings)]
    return GgufPlan(
        file_type, conversion,
        {**{source: tuple(conversion.place(source)) for source in conversion.sources}, **dict.fromkeys(tied, ())},
        shapes, types, (*general, *keys, *vocabulary.metadata),
        (*notes, *fallback_notes(types, fallbacks), *vocabulary.notes),
    )  # fmt: skip
