"""Data types of a GGUF model family: config values, tensor placements, metadata keys, rules, assumptions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from auto_round.errors import ConfigError, ModelError, UnsupportedError

_CASTS: Mapping[str, type] = {"uint32": int, "int32": int, "float32": float, "bool": bool, "string": str}


def _size(*names: str, default: Callable[[HfConfig], int] | None = None) -> property:
    """A property: the size, shared by all layers, under the first of `names` that has a value. Raises ModelError when
    none has one and there is no default, UnsupportedError when it varies by layer."""

    def size(self: HfConfig) -> int:
        value = self.need(*names) if default is None else self.get(*names, default=default(self))
        found = set(value) if isinstance(value, (list, tuple)) else {value}
        if len(found) != 1:
            raise UnsupportedError(
                f"config.json of model type {self.model_type!r} gives a size by layer ({value!r}), which is not "
                "supported for GGUF; use --format auto_round"
            )
        return int(found.pop())

    return property(size)


@dataclass(frozen=True)
class HfConfig:
    """The values of a configuration, of any version of Transformers. Values that are None count as absent."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any) -> HfConfig:
        """From a Transformers configuration or the values of a config.json; of a multimodal model, its text part."""
        values = dict(config) if isinstance(config, Mapping) else config.to_dict()
        text = values.get("text_config")
        return cls({**values, **text} if isinstance(text, Mapping) else values)

    def get(self, *names: str, default: Any = None) -> Any:
        return next((self.values[n] for n in names if self.values.get(n) is not None), default)

    def need(self, *names: str) -> Any:
        """As `get`. Raises ModelError when none of `names` has a value."""
        found = self.get(*names)
        if found is None:
            raise ModelError(f"config.json of model type {self.model_type!r} has none of {', '.join(names)}")
        return found

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type", ""))

    blocks = _size("num_hidden_layers", "n_layer", "n_layers")
    hidden = _size("hidden_size", "n_embd")
    heads = _size("num_attention_heads", "n_head")
    kv_heads = _size("num_key_value_heads", default=lambda s: s.heads)
    head_dim = _size("head_dim", default=lambda s: s.hidden // s.heads)
    experts = _size("num_local_experts", "num_experts", "n_routed_experts", default=lambda s: 0)

    @property
    def tied(self) -> bool:
        return bool(self.get("tie_word_embeddings"))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary settings of full attention, with `rope_type`, and `rope_theta` where it is known."""
        found = self.get("rope_parameters", "rope_scaling", default={})
        found = dict(found.get("full_attention") or found) if isinstance(found, Mapping) else {}
        found = {key: value for key, value in found.items() if value is not None and not isinstance(value, Mapping)}
        found["rope_type"] = str(found.get("rope_type") or found.get("type") or "default").lower()
        for key, *other in (
            ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rope_pct"),
            ("original_max_position_embeddings",),
        ):  # fmt: skip
            if key not in found and (value := self.get(key, *other)) is not None:
                found[key] = value
        return found

    @property
    def sliding_theta(self) -> float | None:
        """The separate rotary base of sliding-window attention, or None."""
        parameters = self.get("rope_parameters", default={})
        own = parameters.get("sliding_attention") if isinstance(parameters, Mapping) else None
        return own.get("rope_theta") if isinstance(own, Mapping) else self.get("rope_local_base_freq")


@dataclass(frozen=True)
class Placement:
    """A GGUF tensor, or a part of one, that is made from a source tensor or some of its rows."""

    tensor: str  # name in the file, such as "blk.0.attn_q.weight"
    rows: torch.Tensor | None = None  # int64 [n], the source's rows in the target's order; None for all in their order
    slot: int | None = None  # index in the target's leading dimension, where experts or heads are stacked
    at_row: int = 0  # first row in the target, where several sources are concatenated by rows
    # Changes the values or the shape first; without it, packed rows of the quantized source can be placed.
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None

    def cut(self, source: torch.Tensor) -> torch.Tensor:
        """The part of the target made from `source`; a view where possible."""
        found = source if self.edit is None else self.edit(source)
        return found if self.rows is None else found[self.rows.to(found.device)]


class Key(NamedTuple):
    """One key of the file; without a value it is not written."""

    name: str  # without the architecture, such as "block_count"
    kind: str  # such as "uint32"
    # Names in the configuration, of which the first with a value counts, or a function.
    source: str | tuple[str, ...] | Callable[[HfConfig], Any]

    def value(self, settings: HfConfig) -> Any:
        """The value as the Python type of `kind`, or None."""
        if callable(self.source):
            found = self.source(settings)
        else:
            found = settings.get(*((self.source,) if isinstance(self.source, str) else self.source))
        if found is None:
            return None
        cast = _CASTS[self.kind]
        return [cast(item) for item in found] if isinstance(found, (list, tuple)) else cast(found)


class Rule(NamedTuple):
    """Placements of source tensors whose full name matches `pattern`; others are only renamed."""

    pattern: str
    place: Callable[[HfConfig, re.Match[str]], list[Placement]]


class Assumption(NamedTuple):
    """An assumption of llama.cpp's architecture; models that violate it are rejected with the message `otherwise`."""

    holds: Callable[[HfConfig], bool]
    otherwise: str


@dataclass(frozen=True)
class Family:
    """How models of some types are converted."""

    arch: str  # llama.cpp's name of the architecture
    model_types: tuple[str, ...]  # values of `model_type` in the configuration
    keys: tuple[Key, ...]  # of the file; a later key of the same name replaces an earlier one
    # placements of special tensors, in order; all others are renamed by `gguf.TensorNameMap`
    rules: tuple[Rule, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement), applied before that map
    assumes: tuple[Assumption, ...] = ()
    # Computed tensors that are in no checkpoint: float32, by their names in the file.
    extras: Callable[[HfConfig], dict[str, torch.Tensor]] | None = None
    notes: tuple[tuple[Callable[[HfConfig], bool], str], ...] = ()  # (condition, text) for the user


FAMILIES: dict[str, Family] = {}  # by model type


def register_family(family: Family) -> Family:
    """Make models of a family writable as GGUF. Raises ConfigError when a model type belongs to another one."""
    for name in family.model_types:
        if FAMILIES.setdefault(name, family) != family:
            raise ConfigError(
                f"GGUF family {family.arch!r}: model type {name!r} belongs to family {FAMILIES[name].arch!r}"
            )
    return family
