"""Apply Transformers' conversion mapping of a model to names, in both directions.

A checkpoint and the modules that read it may name the same tensor differently, split or join matrices, and store the
experts of a block one by one or stacked. Transformers publishes these differences per model class and type
(`transformers.conversion_mapping`), and applies them on every load. Nothing about a family is repeated here: the
mapping is read at run time, from the Transformers that will load the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

_EXPERT_LEAF = re.compile(r"\.experts\.\*\.(?P<leaf>\w+)\.weight$")


class ExpertLayerNames(NamedTuple):
    """Names of the matrices of one expert."""

    gate: str
    up: str
    down: str


DEFAULT_EXPERT_NAMES = ExpertLayerNames("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Conversions:
    """The conversion mapping of one model. Built by `conversions_of`.

    Attributes:
        renamings, converters: Transformers' `WeightRenaming` and `WeightConverter` entries, in order. Some keep state
            while they rename, so every pass over a file needs new ones.
        prefix: the base model's attribute name (`model`, `transformer`), which files saved without a head lack.
    """

    renamings: tuple[Any, ...] = ()
    converters: tuple[Any, ...] = ()
    prefix: str | None = None

    @classmethod
    def of(cls, entries: Iterable[Any], prefix: str | None = None) -> Conversions:
        """The mapping with Transformers' `entries` of both kinds, in order."""
        kinds: tuple[list[Any], list[Any]] = [], []
        for entry in entries:
            kinds[hasattr(entry, "operations")].append(entry)
        return cls(tuple(kinds[0]), tuple(kinds[1]), prefix)

    def loaded(self, key: str, known: Mapping[str, Any]) -> tuple[str, str | None, Any]:
        """The model's name of the checkpoint tensor `key`, and the source pattern and the converter, if any.

        Args:
            key: the checkpoint's name.
            known: names of the model's tensors; the prefix of the base model is added or dropped to match one of them,
                and a conversion to an unknown name is not applied, as in Transformers.
        """
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, list(self.renamings), list(self.converters), self.prefix, known)
        if name not in known:
            plain, _ = rename_source_key(key, [], [], self.prefix, known)
            if plain in known:
                return plain, None, None
        if pattern is None:
            return name, None, None
        return name, pattern, next(c for c in self.converters if pattern in c.source_patterns)

    def renamed(self, key: str) -> str:
        """`key` after the renamings, without converters."""
        for renaming in self.renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def converter_of(self, name: str) -> Any:
        """The converter of a tensor of this name (after the renamings), or None."""
        for converter in self.converters:
            if converter.rename_source_key(name)[1] is not None:
                return converter
        return None

    def expert_names(self) -> ExpertLayerNames | None:
        """Checkpoint names of the matrices of experts that are stored one by one; None if they are stacked.

        A family without a gate gets the default name for it, which no tensor has.
        """
        found: dict[str, str] = {}
        for converter in self.converters:
            leaves = [match["leaf"] for p in converter.source_patterns if (match := _EXPERT_LEAF.search(p))]
            target = re.split(r"[.\\]", converter.target_patterns[0])[-1]
            if len(leaves) == 2 and target == "gate_up_proj":
                found["gate"], found["up"] = leaves
            elif len(leaves) == 1 and target in ("up_proj", "down_proj"):
                found[target.removesuffix("_proj")] = leaves[0]
        if not {"up", "down"} <= set(found):
            return None
        return ExpertLayerNames(found.get("gate", DEFAULT_EXPERT_NAMES.gate), found["up"], found["down"])

    def inverse(self) -> Conversions:
        """The mapping from the model's names to the checkpoint's: converters first, then renamings, in reverse order.

        A conversion without an inverse in Transformers is left out.
        """
        reversed_entries: list[Any] = []
        for entry in reversed((*self.renamings, *self.converters)):
            # Transformers has no common way to say so: operations without an inverse raise any of these.
            with suppress(AttributeError, NotImplementedError, ValueError):
                reversed_entries.append(entry.reverse_transform())
        return Conversions.of(reversed_entries, self.prefix)


def conversions_of(model: nn.Module, *, legacy: bool = True) -> Conversions:
    """The mapping that Transformers applies when it loads this model; empty for other models.

    Args:
        model: the mapping depends on its class, configuration and submodules.
        legacy: include names of very old checkpoints (`LayerNorm.gamma`), which are read and never written.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return Conversions()
    from transformers.conversion_mapping import get_model_conversion_mapping

    entries = get_model_conversion_mapping(model, add_legacy=legacy)
    return Conversions.of(entries, getattr(model, "base_model_prefix", "") or None)


def saving_conversions(model: nn.Module) -> Conversions:
    """The mapping by which Transformers would save this model: the inverse of how it was loaded, if recorded.

    A model built from a configuration has no prefix of a base model to restore.
    """
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is None:
        fresh = conversions_of(model, legacy=False)
        loaded = [e for e in (*fresh.renamings, *fresh.converters) if type(e).__name__ != "PrefixChange"]
    return Conversions.of(loaded).inverse()


@dataclass(eq=False)
class Origin:
    """Checkpoint tensors that are read together and give one or more model tensors.

    Attributes:
        name: the first model tensor that they give.
        keys: (checkpoint name, source pattern) in the order in which the converter needs them.
        converter: Transformers' WeightConverter, or None when the tensor is used as stored.
    """

    name: str
    keys: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    @property
    def stored(self) -> tuple[str, ...]:
        """The checkpoint names."""
        return tuple(key for key, _ in self.keys)


def run_converter(
    converter: Any, name: str, tensors: Iterable[tuple[str, str, torch.Tensor]], model: nn.Module
) -> dict[str, torch.Tensor]:
    """Run a converter and return the tensors that it makes, by name.

    Args:
        converter: a WeightConverter without tensors.
        name: the first tensor that it gives.
        tensors: (name, source pattern, tensor) of its inputs, in order.
        model: whose configuration the converter may read.

    Raises whatever a third-party operation raises on unusual shapes.
    """
    for key, pattern, tensor in tensors:
        converter.add_tensor(name, key, pattern, tensor)
    made = converter.convert(name, model=model, config=getattr(model, "config", None))
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
