"""Find attention modules and the argument that takes their KV cache, by its type and by what the code does with it.

So a new name for it (Transformers 5.24 says `cache` where older ones say `past_key_values`) changes nothing.
"""

from __future__ import annotations

import dis
import inspect
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, get_args

import torch
from torch import nn

from auto_round._version import __version__
from auto_round.errors import LibraryError, UnsupportedError
from auto_round.modeling.config import integers, layer_value, read_value

# Names of the cache argument when neither its type nor the code identifies it (models with their own code).
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_UPDATE = "update"  # method of a cache: takes new keys and values, returns all
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION = re.compile(r"attention|attn", re.I)
# Classes with such a name have a recurrent state instead of keys and values.
_STATE = re.compile(r"linear|lightning|delta|rwkv|mamba|retention", re.I)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")


def library_error(found: str, instead: str) -> LibraryError:
    """The error for an observation (`found`) that only a change in a library explains, and what to do `instead`."""
    import transformers

    return LibraryError(
        f"{found}. This is a fault of auto-round with the installed libraries, not of the model: please report it with "
        f"the model's config.json and these versions: auto-round {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}. Until it is fixed, {instead}"
    )


@dataclass(frozen=True)
class Attention:
    """One attention module."""

    name: str  # relative to the module that was searched
    module: nn.Module
    cache: str  # the argument that takes the cache
    # Which of "k", "v" and "q" its code passes to the cache and to Transformers' table of attention functions, so that
    # they must be observed. A layer that uses the keys and values of another passes none.
    shows: frozenset[str] = frozenset()


def find_attention(root: nn.Module) -> list[Attention]:
    """The attention modules under `root`, in module order; modules with a recurrent state instead have none."""
    caches = {kind: _cache_argument(kind) for kind in {type(module) for module in root.modules()}}
    found = []
    for name, module in root.named_modules():
        kind = type(module)
        cache = caches[kind]
        if not cache or not name or any(caches[type(m)] for m in module.modules() if m is not module):
            continue
        other_layer = getattr(module, "kv_shared_layer_index", None)
        own = not getattr(module, "is_kv_shared_layer", False) and other_layer is None
        shows = ("kv" if own and _mentions(kind, _UPDATE) else "") + ("q" if _mentions(kind, _TABLE) else "")
        found.append(Attention(name, module, cache, frozenset(shows)))
    return found


def unrecognised_attention(blocks: Iterable[nn.Module]) -> list[str]:
    """Names of classes in these blocks that look like attention: by name, and by a layer index or attention functions.

    For a model in which `find_attention` finds nothing: these take their cache in an unknown way.
    """
    found: dict[type[nn.Module], None] = {}
    for module in (module for block in blocks for module in block.modules()):
        kind = type(module)
        if _ATTENTION.search(kind.__name__) and not _STATE.search(kind.__name__):
            if isinstance(getattr(module, "layer_idx", None), int) or _mentions(kind, _TABLE):
                found[kind] = None
    return [kind.__name__ for kind in found]


def head_counts(attention: Attention, config: Any) -> tuple[int, int]:
    """(query heads, key-value heads), from the module or the text configuration; UnsupportedError for none."""
    sources = (attention.module, getattr(attention.module, "config", None), config)
    if any(integers(read_value(source, "kv_lora_rank")) for source in sources):
        raise UnsupportedError(
            f"{type(attention.module).__name__} caches compressed latents instead of keys and values, for which there "
            "are no static scales: leave static_kv_dtype and static_attention_dtype out"
        )
    layer = getattr(attention.module, "layer_idx", None)

    def first_size(names: tuple[str, ...]) -> int | None:
        values = (layer_value(source, name, layer) for source in sources for name in names)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

    heads = first_size(_HEADS)
    if heads is None:
        raise UnsupportedError(
            f"{type(attention.module).__name__} does not say how many heads it has, so static scales cannot be "
            "planned: leave static_kv_dtype and static_attention_dtype out"
        )
    return heads, first_size(_KEY_VALUE_HEADS) or heads


def replace_argument(
    name: str, value: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `module.forward` with one of them replaced, whether positional or keyword."""
    forward: Callable[..., Any] = module.forward
    bound = inspect.signature(forward).bind_partial(*args, **kwargs)
    bound.arguments[name] = value
    return bound.args, bound.kwargs


def _cache_argument(kind: type[nn.Module]) -> str | None:
    """The argument of `kind.forward` that takes a key-value cache, or None.

    It is one on which `update(keys, values, ...)` is called, or in a class that calls `update` on something else, one
    whose type or name identifies a cache. Blocks only pass a cache on, and linear attention uses other methods.
    """
    forward: Any = kind.forward
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # forwards written in C have no signature
        return None
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, p in parameters.items() if name != "self" and p.kind in single]
    updated = {owner for owner, name in _reads(forward) if name == _UPDATE}
    found = [name for name in names if name in _CACHES]
    found += [name for name in names if name in updated]
    if _mentions(kind, _UPDATE):
        found += [name for name in names if _is_cache(parameters[name].annotation, forward)]
        found += [name for name in names if "cache" in name.split("_") or "past" in name.split("_")]
    return found[0] if found else None


def _is_cache(annotation: Any, function: Callable[..., Any]) -> bool:
    """Whether a type is, contains or names a cache class."""
    if isinstance(annotation, str):
        known = getattr(inspect.unwrap(function), "__globals__", {})
        words = re.findall(r"\w+", annotation)
        return any(word.endswith("Cache") or _is_cache(known.get(word), function) for word in words)
    if isinstance(annotation, type):
        return any(base.__name__.endswith("Cache") for base in annotation.__mro__)
    return any(_is_cache(part, function) for part in get_args(annotation))


def _mentions(kind: type[nn.Module], word: str) -> bool:
    """Whether the forward of a class, or a method of the class that it calls, reads an attribute or global `word`."""
    names = {name for _, name in _reads(kind.forward)}
    for name in list(names):
        method = inspect.getattr_static(kind, name, None)
        if callable(method) and not hasattr(nn.Module, name):
            names |= {inner for _, inner in _reads(method)}
    return word in names


@lru_cache(maxsize=4096)
def _reads(function: Any) -> list[tuple[str, str]]:
    """(local name or "", attribute or global) that a function and its inner functions read, except from **kwargs."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    pending = [code] if isinstance(code, CodeType) else []
    found: list[tuple[str, str]] = []
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        keywords = code.co_varnames[count] if code.co_flags & inspect.CO_VARKEYWORDS else None
        owner = ""
        for step in dis.get_instructions(code):
            if step.opname in ("EXTENDED_ARG", "CACHE", "NOP"):
                continue
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL") and (owner != keywords or not owner):
                found.append((owner if step.opname != "LOAD_GLOBAL" else "", str(step.argval)))
            local = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
            owner = str(step.argval[-1] if isinstance(step.argval, tuple) else step.argval) if local else ""
    return found
