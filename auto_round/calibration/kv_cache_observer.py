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

from auto_round.errors import NumericsError, UnsupportedError
from auto_round.modeling.attention import Attention, library_error, replace_argument

_OBSERVED = "auto_round_observed_queries"


class KVCacheObserver(dict[str, torch.Tensor]):
    """Largest absolute value for each head, float32 [heads], by name such as "self_attn.k". It only grows.

    Attributes:
        mask: bool [B, T] for the next run of the block: which positions exist; None counts all.
        every_token: padding is left out, but not positions that merely have no loss: they are in the cache too.
        promised: names that must be seen when their block runs, as the code of the attention says.
    """

    every_token = True

    def __init__(self, expected: Iterable[str] = ()) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = None
        self.expected = frozenset(expected)

    def add(self, name: str, states: Any) -> None:
        """Take in states [B, heads, T, head width]. Raises UnsupportedError for anything else."""
        if not isinstance(states, torch.Tensor) or states.dim() != 4:
            raise UnsupportedError(
                f"{name}: the attention does not keep [batch, heads, tokens, width] tensors, so static scales cannot "
                "be found: leave static_kv_dtype and static_attention_dtype out"
            )
        largest = states.detach().abs().amax(-1)
        if self.mask is not None and (largest.shape[0], largest.shape[2]) == tuple(self.mask.shape):
            largest = largest.masked_fill(~self.mask.to(largest.device)[:, None], 0)
        heads = largest.amax((0, 2)).float()
        if name in self:
            if self[name].shape != heads.shape:
                raise UnsupportedError(f"{name}: the number of heads changes from call to call ({len(heads)})")
            heads = torch.maximum(heads, self[name])
        self[name] = heads

    def of(self, name: str, heads: int) -> torch.Tensor:
        """float32 [heads].

        Raises:
            LibraryError: nothing was seen of an attention that hands on what was looked for.
            UnsupportedError: the attention hands nothing on, or another number of heads than the model's configuration
                promises.
            NumericsError: NaN or Inf was seen.
        """
        if name not in self and name in self.expected:
            raise library_error(
                f"{name}: the attention was watched while it ran, and nothing was seen of what it hands to its "
                "key-value cache or attention function",
                "leave static_kv_dtype and static_attention_dtype out",
            )
        if name not in self:
            raise UnsupportedError(
                f"{name}: this attention hands nothing to a key-value cache, or does not use Transformers' table of "
                "attention functions, so static scales cannot be found: leave static_kv_dtype and "
                "static_attention_dtype out"
            )
        found = self[name]
        if found.shape[0] != heads:
            raise UnsupportedError(
                f"{name}: the attention keeps {found.shape[0]} heads, its configuration says {heads}; static scales "
                "for it are not supported: leave static_kv_dtype and static_attention_dtype out"
            )
        if not bool(torch.isfinite(found).all()):
            raise NumericsError(f"NaN or Inf in the states of attention {name!r}")
        return found


class _ObservingCache:
    """Stands in for a key-value cache: looks at what it is given, keeps nothing and gives it back."""

    def __init__(self, name: str, extremes: KVCacheObserver) -> None:
        self._name, self._extremes = name, extremes

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values are the first two arguments, whatever they are called."""
        key_states, value_states = (*args, *kwargs.values())[:2]
        self._extremes.add(f"{self._name}.k", key_states)
        self._extremes.add(f"{self._name}.v", value_states)
        return key_states, value_states

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        return 0

    def __getattr__(self, wanted: str) -> Any:
        if wanted.startswith("_"):
            raise AttributeError(wanted)
        raise UnsupportedError(
            f"{self._name}: the attention reads {wanted!r} of its key-value cache, so what it keeps cannot be seen: "
            "leave static_kv_dtype and static_attention_dtype out"
        )


@contextmanager
def observe_kv_cache(attentions: Sequence[Attention], queries: bool = False) -> Iterator[KVCacheObserver]:
    """Watch the keys and values, and the queries too if asked, of the attention modules that run meanwhile.

    Everything is put back at the end, also after an error: hooks, the names of attention functions in configurations,
    and Transformers' table of them.
    """
    leaves = "kvq" if queries else "kv"
    extremes = KVCacheObserver(f"{a.name}.{leaf}" for a in attentions for leaf in leaves if leaf in a.shows)
    with ExitStack() as stack:
        for attention in attentions:
            hook = _cache_hook(attention, extremes)
            stack.callback(attention.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if queries and attentions:
            stack.enter_context(_observe_queries(attentions, extremes))
        yield extremes


def _cache_hook(attention: Attention, extremes: KVCacheObserver) -> Callable[..., Any]:
    recorder = _ObservingCache(attention.name, extremes)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_argument(module, attention.cache, recorder, args, kwargs)

    return before


@contextmanager
def _observe_queries(attentions: Sequence[Attention], extremes: KVCacheObserver) -> Iterator[None]:
    """While this is open, the attention modules call a function that looks at the queries and then does what was
    chosen before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {id(attention.module): attention.name for attention in attentions}
    chosen: dict[int, str] = {}  # by configuration
    configs: dict[int, Any] = {}
    for attention in attentions:
        config = getattr(attention.module, "config", None)
        before = getattr(config, "_attn_implementation", None)
        if not isinstance(before, str):
            raise UnsupportedError(
                f"{type(attention.module).__name__} does not use Transformers' table of attention functions, so scales "
                "of queries cannot be found: leave static_attention_dtype out; static_kv_dtype may work"
            )
        chosen[id(config)], configs[id(config)] = before, config

    def observed(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        extremes.add(f"{names[id(module)]}.q", query)
        before = chosen[id(module.config)]
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get(before, own)
        return function(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[_OBSERVED] = observed
    try:
        for config in configs.values():
            config._attn_implementation = _OBSERVED
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = chosen[key]
        del ALL_ATTENTION_FUNCTIONS[_OBSERVED]
