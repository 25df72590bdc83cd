"""The attention of decoder blocks: which modules hand keys and values to a cache, found from structure alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.modeling.config_values import integers, layer_value, read_value

# What the argument is called that takes the key-value cache.
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Attention over compressed latents: what is cached there is neither keys nor values.
_LATENT = ("kv_lora_rank",)


@dataclass(frozen=True)
class Attention:
    """One attention module.

    Attributes:
        name: relative to the module that was searched.
        module: the attention itself.
        cache: name of the argument that takes the cache.
    """

    name: str
    module: nn.Module
    cache: str


def find_attention(root: nn.Module) -> list[Attention]:
    """The attention modules under `root`, in the order of the module tree: those that take a key-value cache and have
    no such module inside. Blocks without a cache of keys and values (linear attention, state spaces) have none."""
    found = []
    for name, module in root.named_modules():
        cache = _cache_argument(module)
        if cache and name and not any(_cache_argument(m) for m in module.modules() if m is not module):
            found.append(Attention(name, module, cache))
    return found


def head_counts(attention: Attention, config: Any) -> tuple[int, int]:
    """(query heads, key-value heads) of an attention module, by itself or by the model's text configuration.

    Raises UnsupportedError when it caches latents, or neither tells.
    """
    own = getattr(attention.module, "config", None)
    sources = [attention.module, *([own] if own is not None else []), config]
    if any(integers(read_value(source, name)) for source in sources for name in _LATENT):
        raise UnsupportedError(
            f"{type(attention.module).__name__} caches compressed latents instead of keys and values, for which there "
            "are no static scales: leave static_kv_dtype and static_attention_dtype out"
        )
    layer = getattr(attention.module, "layer_idx", None)
    heads = _first(sources, _HEADS, layer)
    if heads is None:
        raise UnsupportedError(
            f"{type(attention.module).__name__} does not tell how many heads it has, so static scales cannot be "
            "planned: leave static_kv_dtype and static_attention_dtype out"
        )
    return heads, _first(sources, _KEY_VALUE_HEADS, layer) or heads


def with_argument(
    module: nn.Module, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `module.forward` with one of them replaced, however it was passed."""
    forward: Callable[..., Any] = module.forward
    bound = inspect.signature(forward).bind_partial(*args, **kwargs)
    bound.arguments[name] = value
    return bound.args, bound.kwargs


def _cache_argument(module: nn.Module) -> str | None:
    return _cache_argument_of(type(module).forward)


@lru_cache(maxsize=1024)
def _cache_argument_of(forward: Callable[..., Any]) -> str | None:
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # forwards written in C have no signature
        return None
    return next((name for name in _CACHES if name in parameters), None)


def _first(sources: list[Any], names: tuple[str, ...], layer: int | None) -> int | None:
    for source in sources:
        for name in names:
            value = layer_value(source, name, layer)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
