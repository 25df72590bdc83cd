"""What a config.json from elsewhere may not do: name code to run, or sizes that no model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.errors import ModelError
from auto_round.modeling.config_values import LAYER_COUNTS, read_value, text_config

# Transformers takes a hub id in place of a name here, and fetches and runs the kernel of that repository.
_IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "use_kernels", "kernel_config",
)  # fmt: skip
_LARGEST = {
    "hidden_size": 1 << 20, "n_embd": 1 << 20, "d_model": 1 << 20, "intermediate_size": 1 << 24, "ffn_dim": 1 << 24,
    "vocab_size": 1 << 24, "num_attention_heads": 1 << 16, "n_head": 1 << 16, "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16, "num_experts": 1 << 16, "num_local_experts": 1 << 16, "n_routed_experts": 1 << 16,
    "max_position_embeddings": 1 << 28, "n_positions": 1 << 28,
}  # fmt: skip


def check_code(values: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError when a configuration makes Transformers run code that is not its own.

    `auto_map`, the model's own Python files, is left to Transformers, which refuses it by itself.
    """
    for key in _IMPLEMENTATIONS:
        value = values.get(key)
        foreign = value not in (None, False, {}) if key in ("use_kernels", "kernel_config") else _is_repository(value)
        if foreign:
            raise ModelError(
                f"{file} asks with {key}={value!r} for code from a repository, which is not run unless you trust it: "
                "take the key out, or pass trust_remote_code=True (--trust_remote_code)"
            )
    for value in values.values():
        if isinstance(value, Mapping):
            check_code(value, file)


def _is_repository(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_repository(part) for part in value.values())
    return isinstance(value, str) and ("/" in value or ":" in value)


def check_sizes(file: Path, config: Any, tensors: int) -> None:
    """Raise ModelError for a size in the configuration that no model has, so that nothing of it is built.

    Args:
        file: of the configuration, for messages.
        config: as an object; its text part is looked at.
        tensors: in the checkpoint, of which every layer has some.
    """
    text = text_config(config)
    for key, most in {**_LARGEST, **dict.fromkeys(LAYER_COUNTS, tensors)}.items():
        value = read_value(text, key)
        each = value if isinstance(value, (list, tuple)) else [value]  # some families give a size for each layer
        unlimited = -1 if key == "max_position_embeddings" else None  # XLNet's way to say that there is no limit
        if any(not _is_size(number, most) for number in each if number is not None and number != unlimited):
            allowed = f"the {tensors} tensors of the files allow" if key in LAYER_COUNTS else "a model can have"
            raise ModelError(f"{file} says {key}={value!r}, and at most {most} are what {allowed}; fetch it again")


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
