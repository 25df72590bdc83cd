"""Convert one Transformers model to GGUF: tensor names, shapes, row order and the keys of its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from auto_round.errors import ModelError, UnsupportedError
from auto_round.gguf.families import find_family
from auto_round.gguf.family import Family, HfConfig, Placement
from auto_round.gguf.metadata import KeyValue, gguf_package, key_value

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
    """How one model becomes a GGUF file. Made by `conversion_for`.

    Attributes:
        family: rules of its model family.
        settings: the model's configuration.
        sources: shapes of the source tensors by name (a Conv1D's weight as [out, in]).
    """

    family: Family
    settings: HfConfig
    sources: Shapes = field(default_factory=dict)

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.family.arch

    @property
    def notes(self) -> list[str]:
        """Differences in llama.cpp, for the user."""
        return [text for holds, text in self.family.notes if holds(self.settings)]

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
        """Placements of the source tensor `name` (a Conv1D's weight as [out, in]); none for a skipped one.

        Raises UnsupportedError for a tensor that the family does not have.
        """
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
        """Shapes (PyTorch's order) of all tensors in the file: `extras`, then the sources' order.

        Raises:
            UnsupportedError: the architecture has no tensor for a source.
            ModelError: parts of a tensor are missing, or have different shapes.
        """
        parts: dict[str, list[tuple[str, Placement, tuple[int, ...]]]] = {}
        for source, shape in self.sources.items():
            for placement in self.place(source):
                cut = tuple(placement.cut(torch.empty(shape, device="meta")).shape)
                parts.setdefault(placement.tensor, []).append((source, placement, cut))
        extras = {name: tuple(tensor.shape) for name, tensor in self.extras().items()}
        return extras | {target: _merged_shape(target, found) for target, found in parts.items()}

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


def _merged_shape(target: str, parts: list[tuple[str, Placement, tuple[int, ...]]]) -> tuple[int, ...]:
    """Shape of a tensor merged from `parts` (source, placement, shape). Raises ModelError when they do not fill it."""
    first = parts[0][2]
    slots = [placement.slot for _, placement, _ in parts if placement.slot is not None]
    if sorted(slots) == list(range(len(parts))) and all(shape == first for *_, shape in parts):
        return (len(parts), *first)
    rows = 0
    for _, placement, shape in sorted(parts, key=lambda part: part[1].at_row):
        if slots or placement.at_row != rows or shape[1:] != first[1:]:
            names = ", ".join(source for source, _, _ in parts[:3])
            raise ModelError(f"the parts of tensor {target!r} ({names}, ...) are incomplete, or differ in shape")
        rows += shape[0]
    return (rows, *first[1:])


def conversion_for(config: Any, sources: Shapes | None = None) -> Conversion:
    """The conversion of a model to GGUF.

    Args:
        config: its Transformers configuration, or the values of its config.json.
        sources: shapes of its tensors by name; needed for the shapes in the file.

    Raises:
        UnsupportedError: the family is unknown, llama.cpp would run a different model, the architecture has no tensor
            for a source, or the package gguf is missing.
        ModelError: a configuration value or tensors are missing.
    """
    settings = HfConfig.of(config)
    family = find_family(settings)
    gguf_package()
    conversion = Conversion(family, settings, dict(sources or {}))
    _ = conversion.tensors  # validates all placements
    return conversion
