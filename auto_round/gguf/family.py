"""Data types of a GGUF model family: config values, tensor placements, metadata keys, rules, assumptions.

`families/` holds one `Family` for each group of model types. The config is read the same way whichever
Transformers version wrote it. A `Placement` says which rows of a source tensor go to which GGUF tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from auto_round.errors import ModelError, UnsupportedError

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class HfConfig:
    """The values of a configuration. Values that are None count as absent."""

    values: Mapping[str, Any]

    def get(self, *names: str, default: Any = None) -> Any:
        """The value under the first of `names` that has one."""
        return next((self.values[n] for n in names if self.values.get(n) is not None), default)

    def need(self, *names: str) -> Any:
        """As `get`. Raises ModelError when none of `names` is there."""
        found = self.get(*names)
        if found is None:
            raise ModelError(f"config.json of model type {self.model_type!r} has none of {', '.join(names)}")
        return found

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type", ""))

    @property
    def blocks(self) -> int:
        return self._number(self.need("num_hidden_layers", "n_layer", "n_layers"))

    @property
    def hidden(self) -> int:
        return self._number(self.need("hidden_size", "n_embd"))

    @property
    def heads(self) -> int:
        return self._number(self.need("num_attention_heads", "n_head"))

    @property
    def kv_heads(self) -> int:
        return self._number(self.get("num_key_value_heads", default=self.heads))

    @property
    def head_dim(self) -> int:
        return self._number(self.get("head_dim", default=self.hidden // self.heads))

    @property
    def experts(self) -> int:
        """Number of routed experts; 0 in a dense model."""
        return self._number(self.get("num_local_experts", "num_experts", "n_routed_experts", default=0))

    def _number(self, value: Any) -> int:
        """A size that all layers share. Raises UnsupportedError where it varies by layer."""
        found = {value} if not isinstance(value, (list, tuple)) else set(value)
        if len(found) != 1:
            raise UnsupportedError(
                f"config.json of model type {self.model_type!r} gives a size by layer ({value!r}), which no GGUF file "
                "is written with; use --format auto_round"
            )
        return int(found.pop())

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.get("tie_word_embeddings", default=False))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary settings of full attention, with `rope_type`, and `rope_theta` where it is known."""
        return self._rope(_FULL)

    @property
    def sliding_theta(self) -> float | None:
        """The rotary base of sliding-window attention, where it has its own."""
        parameters = self.get("rope_parameters", default={})
        own = parameters.get(_SLIDING) if isinstance(parameters, Mapping) else None
        return own.get("rope_theta") if isinstance(own, Mapping) else self.get("rope_local_base_freq")

    def _rope(self, kind: str) -> dict[str, Any]:
        found = self.get("rope_parameters", "rope_scaling", default={})
        found = dict(found.get(kind) or found) if isinstance(found, Mapping) else {}
        found = {key: value for key, value in found.items() if value is not None and not isinstance(value, Mapping)}
        found["rope_type"] = str(found.get("rope_type") or found.get("type") or "default").lower()
        for key, others in (
            ("rope_theta", ("rope_theta", "rotary_emb_base")),
            ("partial_rotary_factor", ("partial_rotary_factor", "rope_pct")),
            ("original_max_position_embeddings", ("original_max_position_embeddings",)),
        ):
            if key not in found and (value := self.get(*others)) is not None:
                found[key] = value
        return found


def read_hf_config(config: Any) -> HfConfig:
    """Settings of a Transformers configuration object, or of the values of a config.json.

    Of a model with several parts, those of its text part.
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    text = values.get("text_config")
    return HfConfig({**values, **text} if isinstance(text, Mapping) else values)


# Where the rows of a source tensor go in a GGUF file.


@dataclass(frozen=True)
class Placement:
    """One place that a source tensor, or some of its rows, goes to.

    The steps are, in this order: `edit`, `rows`, then `slot` or `at_row`. Without `edit` a weight can be quantized as
    it is and its packed rows placed; with `edit` other numbers are quantized than the source holds.

    Attributes:
        tensor: name in the file, such as "blk.0.attn_q.weight".
        rows: int64 [n], the source's rows in the target's order; None for all of them as they are.
        slot: index in the target's leading dimension, where experts or heads are stacked.
        at_row: where the rows start in the target, when several sources are joined by rows.
        edit: changes the values or the layout of a dense tensor.
    """

    tensor: str
    rows: torch.Tensor | None = None
    slot: int | None = None
    at_row: int = 0
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None

    def cut(self, source: torch.Tensor) -> torch.Tensor:
        """The part of the target that comes from `source`: after `edit` and `rows`; a view where possible."""
        found = source if self.edit is None else self.edit(source)
        return found if self.rows is None else found[self.rows.to(found.device)]

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `cut` for a source of this shape, without any data."""
        if self.edit is not None:
            source = tuple(self.edit(torch.empty(source, device="meta")).shape)
        return source if self.rows is None else (int(self.rows.numel()), *source[1:])

    def of_transposed(self) -> Placement:
        """The same place for a source that is given as [in, out], as Conv1D modules store their weights."""
        edit = self.edit
        return replace(self, edit=_transposed if edit is None else lambda weight: edit(_transposed(weight)))


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.t()


# What converting a family of models takes, as data: its keys, its special tensors, and what llama.cpp assumes.

Source = str | tuple[str, ...] | Callable[[HfConfig], Any]
PlacementFunction = Callable[[HfConfig, re.Match[str]], list[Placement]]


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        name: without the architecture, such as "block_count".
        kind: its type, such as "uint32".
        source: what it is read from: names in the configuration, the first that has a value, or a function. A key
            without a value is not written.
    """

    name: str
    kind: str
    source: Source

    def value(self, settings: HfConfig) -> Any:
        """The value, of the Python type that goes with `kind`, or None."""
        if callable(self.source):
            found = self.source(settings)
        else:
            found = settings.get(*((self.source,) if isinstance(self.source, str) else self.source))
        if found is None:
            return None
        cast = {"uint32": int, "int32": int, "float32": float, "bool": bool, "string": str}[self.kind]
        return [cast(item) for item in found] if isinstance(found, (list, tuple)) else cast(found)


@dataclass(frozen=True)
class Rule:
    """Source tensors that do not simply get another name: those whose whole name matches `pattern`."""

    pattern: str
    place: PlacementFunction


@dataclass(frozen=True)
class Assumption:
    """Something that llama.cpp takes for granted; models for which it does not hold are refused.

    Attributes:
        holds: whether it does.
        otherwise: what is the case if not, and why that cannot be written; may contain {names} from the configuration.
    """

    holds: Callable[[HfConfig], bool]
    otherwise: str


@dataclass(frozen=True)
class Family:
    """How models of some types are converted.

    Attributes:
        arch: llama.cpp's name of the architecture.
        model_types: `model_type` in the configuration.
        keys: what the file says about the model; a later key of the same name replaces an earlier one.
        rules: special tensors, in order; all others are renamed by `gguf.TensorNameMap`.
        renames: (regular expression, replacement), applied before that map is asked.
        assumes: what must hold.
        extras: tensors that are in no checkpoint: float32, by their names in the file.
        notes: (condition, text): what the user should know.
    """

    arch: str
    model_types: tuple[str, ...]
    keys: tuple[Key, ...]
    rules: tuple[Rule, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    assumes: tuple[Assumption, ...] = ()
    extras: Callable[[HfConfig], dict[str, torch.Tensor]] | None = None
    notes: tuple[tuple[Callable[[HfConfig], bool], str], ...] = ()
