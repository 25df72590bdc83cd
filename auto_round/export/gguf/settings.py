"""What a model's configuration says, read the same way whichever Transformers version wrote it.

Rotary settings: Transformers 5 has `rope_parameters`, possibly one set for each kind of attention; before, there were
`rope_theta`, `rope_scaling`, `partial_rotary_factor` and `rope_local_base_freq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.errors import ModelError, UnsupportedError

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Settings:
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


def settings_of(config: Any) -> Settings:
    """Settings of a Transformers configuration object, or of the values of a config.json.

    Of a model with several parts, those of its text part.
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    text = values.get("text_config")
    return Settings({**values, **text} if isinstance(text, Mapping) else values)
