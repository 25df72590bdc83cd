"""Observe the largest absolute keys, values and queries of attention, for static FP8 scales.

Keys and values are observed where a runtime rounds them: as the attention passes them to its cache, after norms
and rotary embedding. The attention is given a cache that stores nothing. Queries are observed as they enter the
attention function, through Transformers' own table of such functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from auto_round.calibration.observers import InputObserver
from auto_round.errors import NumericsError, UnsupportedError
from auto_round.modeling.attention import Attention, library_error, replace_argument

_OBSERVED = "auto_round_observed_queries"
_ADVICE = "leave static_kv_dtype and static_attention_dtype out"


class KVCacheObserver(InputObserver, dict[str, torch.Tensor]):
    """Largest absolute value of each head, float32 [heads], by name such as "self_attn.k".

    Padding is excluded, but positions without a loss count: they are in the cache too.

    Args:
        expected: names that the code of the attention passes on, so that they must be observed when their block runs.
    """

    every_token = True

    def __init__(self, expected: Iterable[str] = ()) -> None:
        super().__init__()
        self.expected = frozenset(expected)

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add states [B, heads, T, head width]. Raises UnsupportedError for anything else."""
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
            raise UnsupportedError(
                f"{name}: the attention does not cache [batch, heads, tokens, width] tensors, so static scales cannot "
                f"be computed: {_ADVICE}"
            )
        largest = inputs.detach().abs().amax(-1)
        if self.mask is not None and (largest.shape[0], largest.shape[2]) == tuple(self.mask.shape):
            largest = largest.masked_fill(~self.mask.to(largest.device)[:, None], 0)
        heads = largest.amax((0, 2)).float()
        if name in self:
            if self[name].shape != heads.shape:
                raise UnsupportedError(f"{name}: the number of heads changes from call to call ({len(heads)})")
            heads = torch.maximum(heads, self[name])
        self[name] = heads

    def of(self, name: str, heads: int) -> torch.Tensor:
        """The largest absolute values of the states `name`, float32 [heads].

        Raises:
            LibraryError: nothing was observed although the code of the attention passes these states on.
            UnsupportedError: the attention does not pass them on, or has another number of heads than its
                configuration.
            NumericsError: NaN or Inf was observed.
        """
        if name not in self and name in self.expected:
            raise library_error(
                f"{name}: the attention ran, but none of the states that it passes to its key-value cache or "
                "attention function were observed",
                _ADVICE,
            )
        if name not in self:
            raise UnsupportedError(
                f"{name}: this attention passes nothing to a key-value cache, or does not use Transformers' table of "
                f"attention functions, so static scales cannot be computed: {_ADVICE}"
            )
        found = self[name]
        if found.shape[0] != heads:
            raise UnsupportedError(
                f"{name}: the attention caches {found.shape[0]} heads, its configuration says {heads}; static scales "
                f"for it are not supported: {_ADVICE}"
            )
        if not bool(torch.isfinite(found).all()):
            raise NumericsError(f"NaN or Inf in the states of attention {name!r}")
        return found


class _ObservingCache:
    """A key-value cache that observes the states it is given, stores nothing and returns them."""

    def __init__(self, name: str, observer: KVCacheObserver) -> None:
        self._name, self._observer = name, observer

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Observe the first two arguments, which are the keys and the values."""
        key_states, value_states = (*args, *kwargs.values())[:2]
        self._observer.add(f"{self._name}.k", key_states)
        self._observer.add(f"{self._name}.v", value_states)
        return key_states, value_states

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        return 0

    def __getattr__(self, wanted: str) -> Any:
        if wanted.startswith("_"):
            raise AttributeError(wanted)
        raise UnsupportedError(
            f"{self._name}: the attention reads {wanted!r} of its key-value cache, so its states cannot be observed: "
            f"{_ADVICE}"
        )


@contextmanager
def observe_kv_cache(attentions: Sequence[Attention], queries: bool = False) -> Iterator[KVCacheObserver]:
    """Observe the keys and values, and on request the queries, of the attention modules that run inside.

    Hooks, the attention functions of configurations, and Transformers' table of them are restored at the end.
    """
    states = "kvq" if queries else "kv"
    observer = KVCacheObserver(f"{a.name}.{state}" for a in attentions for state in states if state in a.shows)
    with ExitStack() as stack:
        for attention in attentions:
            hook = _cache_hook(attention, observer)
            stack.callback(attention.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if queries and attentions:
            stack.enter_context(_observe_queries(attentions, observer))
        yield observer


def _cache_hook(attention: Attention, observer: KVCacheObserver) -> Callable[..., Any]:
    cache = _ObservingCache(attention.name, observer)
    return lambda module, args, kwargs: replace_argument(module, attention.cache, cache, args, kwargs)


@contextmanager
def _observe_queries(attentions: Sequence[Attention], observer: KVCacheObserver) -> Iterator[None]:
    """Make the attention modules call a function that observes the queries, then the attention function set before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {id(attention.module): attention.name for attention in attentions}
    chosen: dict[int, tuple[Any, str]] = {}  # by id: a configuration and its attention function
    for attention in attentions:
        config = getattr(attention.module, "config", None)
        before = getattr(config, "_attn_implementation", None)
        if not isinstance(before, str):
            raise UnsupportedError(
                f"{type(attention.module).__name__} does not use Transformers' table of attention functions, so scales "
                "of queries cannot be computed: leave static_attention_dtype out; static_kv_dtype may work"
            )
        chosen[id(config)] = (config, before)

    def observed(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        observer.add(f"{names[id(module)]}.q", query)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get(chosen[id(module.config)][1], own)
        return function(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[_OBSERVED] = observed
    try:
        for config, _ in chosen.values():
            config._attn_implementation = _OBSERVED
        yield
    finally:
        for config, before in chosen.values():
            config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[_OBSERVED]
