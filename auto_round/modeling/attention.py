"""Find attention modules and the argument that takes their KV cache, from structure alone.

The cache argument is recognised by its type and by what the code does with it, so that a new name for it
(Transformers 5.24 says `cache` where older ones say `past_key_values`) changes nothing. `library_error` reports
an observation that only a change in a library explains.
"""

from __future__ import annotations

import dis
import inspect
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from types import CodeType
from typing import Any, get_args

from torch import nn

from auto_round._version import __version__
from auto_round.errors import LibraryError, UnsupportedError
from auto_round.modeling.config import integers, layer_value, read_value


def library_error(found: str, instead: str) -> LibraryError:
    """The error for an observer that saw nothing, or for anything else that only a change in a library explains.

    It is told apart from what a model lacks: the message says that this package is at fault, and with which versions.

    Args:
        found: what was expected and what was found instead.
        instead: what the user can do until a new version of this package knows better.
    """
    libraries = ", ".join(f"{name} {_installed(name)}" for name in ("torch", "transformers"))
    return LibraryError(
        f"{found}. This is a fault of auto-round with the installed libraries, not of the model: please report it with "
        f"the model's config.json and these versions: auto-round {__version__}, {libraries}, "
        f"Python {platform.python_version()}. Until it is mended, {instead}"
    )


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


# The attention of decoder blocks: which modules hand keys and values to a cache, found from structure alone.
#
# The argument that takes the cache is recognised by its type and by what the code does with it, so that a new name for
# it (Transformers 5.24 says `cache` where older ones say `past_key_values`) changes nothing.

# Names under which attention takes its cache even where neither a type nor the code tells (models with own code).
_CACHES = ("past_key_values", "past_key_value", "layer_past")
# The method of a cache that takes keys and values and gives all of them back.
_UPDATE = "update"
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION = re.compile(r"attention|attn", re.I)
# Classes with such a name keep a state instead of keys and values.
_STATE = re.compile(r"linear|lightning|delta|rwkv|mamba|retention", re.I)
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
        shows: which of "k", "v" and "q" its code hands to the cache and to Transformers' table of attention functions,
            so that whoever watches must see them. A layer that uses the keys and values of another hands on none.
    """

    name: str
    module: nn.Module
    cache: str
    shows: frozenset[str] = frozenset()


def find_attention(root: nn.Module) -> list[Attention]:
    """The attention modules under `root`, in the order of the module tree: those that take a key-value cache and have
    no such module inside. Blocks without a cache of keys and values (linear attention, state spaces) have none."""
    found = []
    for name, module in root.named_modules():
        cache = _cache_argument(module)
        if cache and name and not any(_cache_argument(m) for m in module.modules() if m is not module):
            found.append(Attention(name, module, cache, _observable(module)))
    return found


def unrecognised_attention(blocks: Iterable[nn.Module]) -> list[str]:
    """Classes of modules in these blocks that are attention by their name and have a place in a cache (the index of
    their layer) or call Transformers' table of attention functions.

    For a model in which `find_attention` finds nothing: these take their cache in a way that is not known here.
    """
    kinds = {
        type(module): None
        for block in blocks
        for module in block.modules()
        if _ATTENTION.search(type(module).__name__)
        and not _STATE.search(type(module).__name__)
        and (isinstance(getattr(module, "layer_idx", None), int) or _mentions(_kind(module), _TABLE))
    }
    return [kind.__name__ for kind in kinds]


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
    heads = _first_size(sources, _HEADS, layer)
    if heads is None:
        raise UnsupportedError(
            f"{type(attention.module).__name__} does not tell how many heads it has, so static scales cannot be "
            "planned: leave static_kv_dtype and static_attention_dtype out"
        )
    return heads, _first_size(sources, _KEY_VALUE_HEADS, layer) or heads


def replace_argument(
    module: nn.Module, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `module.forward` with one of them replaced, however it was passed."""
    forward: Callable[..., Any] = module.forward
    bound = inspect.signature(forward).bind_partial(*args, **kwargs)
    bound.arguments[name] = value
    return bound.args, bound.kwargs


def _cache_argument(module: nn.Module) -> str | None:
    return _cache_argument_of(_kind(module))


@lru_cache(maxsize=1024)
def _cache_argument_of(kind: Any) -> str | None:
    """The argument of `kind.forward` that takes a key-value cache, or None.

    It is one on which `update(keys, values, ...)` is called, or in a class that calls `update` on something else, one
    whose type or name tells that it is a cache.
    Blocks and models take a cache only to hand it on, and linear attention keeps its state by other methods.
    """
    try:
        parameters = inspect.signature(kind.forward).parameters
    except (TypeError, ValueError):  # forwards written in C have no signature
        return None
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, p in parameters.items() if name != "self" and p.kind in single]
    updated = _read_of(kind.forward, _UPDATE)
    found = [name for name in names if name in _CACHES]
    found += [name for name in names if name in updated]
    if _mentions(kind, _UPDATE):
        found += [name for name in names if _is_cache(parameters[name].annotation, kind.forward)]
        found += [name for name in names if "cache" in name.split("_") or "past" in name.split("_")]
    return found[0] if found else None


def _observable(module: nn.Module) -> frozenset[str]:
    shared = getattr(module, "is_kv_shared_layer", False) or getattr(module, "kv_shared_layer_index", None) is not None
    keys_values = {"k", "v"} if _mentions(_kind(module), _UPDATE) and not shared else set()
    return frozenset(keys_values | ({"q"} if _mentions(_kind(module), _TABLE) else set()))


def _kind(module: nn.Module) -> Any:
    """Its class, as a key of a cache."""
    return type(module)


def _is_cache(annotation: Any, function: Callable[..., Any]) -> bool:
    """Whether a type is, contains or names a class of caches."""
    if isinstance(annotation, str):
        known = getattr(inspect.unwrap(function), "__globals__", {})
        words = re.findall(r"\w+", annotation)
        return any(word.endswith("Cache") or _is_cache(known.get(word), function) for word in words)
    if isinstance(annotation, type):
        return any(base.__name__.endswith("Cache") for base in annotation.__mro__)
    return any(_is_cache(part, function) for part in get_args(annotation))


@lru_cache(maxsize=4096)
def _mentions(kind: Any, word: str) -> bool:
    """Whether the forward of a class, or a method of the class that it calls, reads an attribute or global `word`."""
    names = {name for _, name in _reads(kind.forward)}
    for name in list(names):
        method = inspect.getattr_static(kind, name, None)
        if callable(method) and not hasattr(nn.Module, name):
            names |= {inner for _, inner in _reads(method)}
    return word in names


def _read_of(function: Any, attribute: str) -> set[str]:
    """Local names of a function of which it reads this attribute."""
    return {owner for owner, name in _reads(function) if name == attribute}


@lru_cache(maxsize=4096)
def _reads(function: Any) -> list[tuple[str, str]]:
    """(local name or "", attribute or global) for all that a function and those inside it read, in their order.

    What is read of the dictionary of further keyword arguments is left out: its `update` is no cache's.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    waiting = [code] if isinstance(code, CodeType) else []
    found: list[tuple[str, str]] = []
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        further = code.co_varnames[count] if code.co_flags & inspect.CO_VARKEYWORDS else None
        owner = ""
        for step in dis.get_instructions(code):
            if step.opname in ("EXTENDED_ARG", "CACHE", "NOP"):
                continue
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL") and (owner != further or not owner):
                found.append((owner if step.opname != "LOAD_GLOBAL" else "", str(step.argval)))
            local = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
            owner = str(step.argval[-1] if isinstance(step.argval, tuple) else step.argval) if local else ""
    return found


def _first_size(sources: list[Any], names: tuple[str, ...], layer: int | None) -> int | None:
    for source in sources:
        for name in names:
            value = layer_value(source, name, layer)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
