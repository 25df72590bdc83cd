"""Reads values from model configurations, also those that give one value for each layer.

A size may be a number, a list with one entry a layer, or live in configurations of their own for each layer, in which
case Transformers refuses to read it from the whole model's. Everything that needs a size reads it through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model; itself where there are no parts."""
    get = getattr(config, "get_text_config", None)
    if not callable(get):
        return config
    try:
        return get()
    except ValueError:  # several parts describe text: an encoder and a decoder
        return config


def read_value(config: Any, name: str, default: Any = None) -> Any:
    """One value; a list with one entry a layer where it varies by layer; `default` where there is none or it is None.

    Args:
        config: a Transformers configuration, `RawConfig`, or None.
        name: of the attribute.
        default: what to give where nothing is known.
    """
    try:
        value = getattr(config, name, None)
    except Exception:  # Transformers refuses by an error of its own what only single layers can answer
        layers = _layer_configs(config)
        found = [_plain(layer, name) for layer in layers]
        value = found if any(entry is not None for entry in found) else None
    return default if value is None else value


def layer_value(config: Any, name: str, layer: int | None, default: Any = None) -> Any:
    """The value for one layer, where it varies by layer; the first layer's when `layer` is None or beyond the list."""
    value = read_value(config, name, default)
    if isinstance(value, (list, tuple)) and value:
        return value[layer] if layer is not None and 0 <= layer < len(value) else value[0]
    return value


def largest(config: Any, *names: str, default: int = 0) -> int:
    """The largest size under the first of `names` that has one; over all layers where it varies by layer.

    Args:
        config: of the whole model or of its text part; the text part is read first.
        names: spellings of one value, such as "hidden_size", "n_embd".
        default: where no name has a positive integer.
    """
    return max(sizes(config, *names), default=default)


def smallest(config: Any, *names: str) -> int | None:
    """As `largest`, the smallest; None where no name has a positive integer."""
    return min(sizes(config, *names), default=None)


def sizes(config: Any, *names: str) -> list[int]:
    """Every positive integer under the first of `names` that has one."""
    text = text_config(config)
    for part in (text, config) if text is not config else (config,):
        for name in names:
            found = [number for number in integers(read_value(part, name)) if number > 0]
            if found:
                return found
    return []


def integers(value: Any) -> list[int]:
    """The integers in a value: itself, or those in a list or mapping of values by layer."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [number for entry in value for number in integers(entry)]
    return []


def _layer_configs(config: Any) -> list[Any]:
    """The configurations of single layers, where a configuration has them."""
    try:
        layers = config.per_layer_config
        return list(layers.values() if isinstance(layers, Mapping) else layers)
    except Exception:  # computed by the family's own class, on values that may be damaged
        return []


def _plain(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except Exception:  # as in `read_value`: a layer without the value says so by an error of its own
        return None
