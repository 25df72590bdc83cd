"""Observe a running block: second moments, ranges and Hessians of the inputs of its layers, and attention states.

The Hessian A = sum x x' over tokens says what rounding one weight means for the others: with D the change of a layer's
weight, tr(D A D') is the summed squared error of its outputs. A whole one may be larger than the layer, so channels are
split into bands of at most 4096 (fewer if a block has many layers); pairs across bands are dropped.
"""

from __future__ import annotations

import re
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from auto_round.errors import NumericsError, UnsupportedError
from auto_round.modeling.attention import Attention, library_error, replace_argument
from auto_round.modeling.blocks import weight_2d

_CHUNK_ROWS = 1024  # rows are summed in chunks of fixed size, so that the result does not depend on the thread count
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_BAND_WIDTHS = (4096, 2048, 1024, 512, 256)
_MAX_NUMEL = 1 << 28  # float32 elements of all Hessians of a block: 1 GiB
_TILE = 256
_MAX_STRIDE = 4  # Hessians use at least every fourth token, and at least as many tokens as channels
_OBSERVED = "auto_round_observed_queries"
_ADVICE = "leave static_kv_dtype and static_attention_dtype out"
_O = TypeVar("_O", bound="InputObserver")


class InputObserver(ABC):
    """Statistics of the inputs of layers, by name. `mask`, bool [B, T]: positions that count, in inputs [B, T, in]."""

    every_token = False  # the mask excludes padding only, not positions without a loss
    mask: torch.Tensor | None = None

    @abstractmethod
    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add what layer `name` gets: all counted rows of `inputs` [..., in]."""

    def counted(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.detach()
        if self.mask is not None and rows.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.to(rows.device)]
        return rows

    def prepare(self, block: nn.Module, names: Sequence[str]) -> None:
        """Get ready to observe the layers `names` of a block."""
        self.mask = None

    def close(self) -> None:
        self.mask = None

    @contextmanager
    def observing(self: _O, block: nn.Module, names: Iterable[str]) -> Iterator[_O]:
        """Observe the inputs of the layers `names` (relative to `block`) that run inside; closes at the end."""

        def hook(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(name, args[0])

        names = list(names)
        self.prepare(block, names)
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(block.get_submodule(name).register_forward_pre_hook(partial(hook, name)))
            stack.callback(self.close)
            yield self


class SecondMomentObserver(InputObserver, dict[str, torch.Tensor]):
    """Sums of squares by layer name, float32 [in_features]; zeros for observed layers that never ran."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[str, int] = {}  # rows summed, by layer name
        self._last: Callable[[], torch.Tensor | None] = lambda: None  # a weak reference to the last inputs
        self._last_sums: tuple[list[torch.Tensor], int] = [], 0

    def prepare(self, block: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            module = block.get_submodule(name)
            device = "cpu" if (weight := module.get_parameter("weight")).is_meta else weight.device
            self[name] = torch.zeros(weight_2d(module).shape[1], dtype=torch.float32, device=device)
            self.tokens[name] = 0

    def add(self, name: str, inputs: torch.Tensor) -> None:
        total = self.get(name)
        if total is None:
            total = self[name] = torch.zeros(inputs.shape[-1], dtype=torch.float32, device=inputs.device)
        elif total.device != inputs.device:  # the layer's weight was on meta when observation began
            total = self[name] = total.to(inputs.device)
        if self._last() is not inputs:  # q, k and v, for example, get the same tensor
            rows = self.counted(inputs).reshape(-1, inputs.shape[-1])
            sums = [part.float().square().sum(dim=0) for part in rows.split(_CHUNK_ROWS)]
            self._last_sums, self._last = (sums, rows.shape[0]), weakref.ref(inputs)
        for part in self._last_sums[0]:
            total += part
        self.tokens[name] = self.tokens.get(name, 0) + self._last_sums[1]

    def check(self) -> None:
        """Raise NumericsError naming the first layer whose inputs have NaN or Inf."""
        for name, total in self.items():
            if not bool(torch.isfinite(total).all()):
                raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")


class MinMaxObserver(InputObserver, dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """(minimum, maximum) by layer name, float32 scalars; minimum <= 0 <= maximum. A layer that never ran is absent."""

    def add(self, name: str, inputs: torch.Tensor) -> None:
        rows = self.counted(inputs)
        if rows.numel() == 0:
            return
        low, high = torch.aminmax(rows)
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if name in self:
            low, high = torch.minimum(low, self[name][0]), torch.maximum(high, self[name][1])
        self[name] = (low, high)

    def of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(minimum, maximum) of a layer, or if it never ran of others. Raises NumericsError for NaN, Inf or none."""
        found = [self[name]] if name in self else []
        if not found and _EXPERT.search(name):
            experts = _EXPERT.sub("experts.*.", name)
            found = [pair for other, pair in self.items() if _EXPERT.sub("experts.*.", other) == experts]
        found = found or list(self.values())
        if not found:
            raise NumericsError(f"layer {name!r}: no calibration token reached it, so it has no activation scale")
        low, high = torch.stack([p[0] for p in found]).min(), torch.stack([p[1] for p in found]).max()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")
        return low, high


def band_width(widths: Sequence[int]) -> int:
    """The widest band for which the Hessians of layers of these input widths stay below 1 GiB; 256 at least."""
    fits = (band for band in _BAND_WIDTHS if sum(width * min(width, band) for width in widths) <= _MAX_NUMEL)
    return next(fits, _BAND_WIDTHS[-1])


def hessian_bytes(widths: Sequence[int]) -> int:
    """Peak bytes of the Hessians of layers of these input widths."""
    band = band_width(widths)
    return sum(4 * width * min(width, band) for width in widths)


class InputHessian(InputObserver):
    """Sums of x x' by layer name, ready after `close`. Layers that get the same tensor share one sum. `band`: channels
    of one diagonal block; `passes`: how often a layer will run, each time on about as many tokens."""

    def __init__(self, band: int = _BAND_WIDTHS[0], passes: int = 1) -> None:
        self.band, self.passes = band, passes
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._leaders: dict[str, str] = {}  # by layer, the layer whose sum it shares
        self._seen: dict[str, int] = {}
        self._mixed: set[str] = set()  # layers that share their inputs in some runs only
        self._last: tuple[str, torch.Tensor] | None = None

    def prepare(self, block: nn.Module, names: Sequence[str]) -> None:
        self.band = band_width([weight_2d(block.get_submodule(name)).shape[1] for name in names])

    def add(self, name: str, inputs: torch.Tensor) -> None:
        self._seen[name] = self._seen.get(name, 0) + inputs.shape[:-1].numel()
        shared = self._last is not None and self._last[1] is inputs
        if not shared:
            self._last = name, inputs
        assert self._last is not None
        if self._leaders.setdefault(name, self._last[0]) != self._last[0]:
            self._mixed.add(name)
        if shared or name in self._mixed:
            return
        width = inputs.shape[-1]
        rows = self.counted(inputs).reshape(-1, width)
        rows = rows[:: min(_MAX_STRIDE, max(1, self.passes * rows.shape[0] // width))]
        if name not in self._sums:
            sizes = [min(self.band, width - start) for start in range(0, width, self.band)]
            self._sums[name] = [torch.zeros(size, size, device=rows.device) for size in sizes]
        for part in rows.split(_CHUNK_ROWS):
            columns = part.float()
            for start, total in zip(range(0, width, self.band), self._sums[name], strict=True):
                band, size = columns[:, start : start + self.band], total.shape[0]
                for first in range(0, size, _TILE):  # the upper triangle, in tiles; `close` fills the lower one
                    last = min(first + _TILE, size)
                    total[:last, first:last].addmm_(band[:, :last].t(), band[:, first:last])

    def tokens(self, name: str) -> int:
        return self._seen.get(name, 0)

    def of(self, name: str, least: int = 1) -> list[torch.Tensor] | None:
        """The Hessian of a layer, float32 [n, n] for each band of channels; None with fewer than `least` tokens."""
        leader = self._leaders.get(name)
        if leader is None or self._mixed & {name, leader} or not least <= self._seen[name] == self._seen[leader]:
            return None
        return self._sums[leader]

    def close(self) -> None:
        self._last = None
        for total in (total for bands in self._sums.values() for total in bands):
            for start in range(0, total.shape[0], _TILE):  # copy the upper triangle to the lower one
                rows = slice(start, start + _TILE)
                total[rows, :start] = total[:start, rows].t()
                total[rows, rows] = total[rows, rows].triu() + total[rows, rows].triu(1).t()


class KVCacheObserver(InputObserver, dict[str, torch.Tensor]):
    """Largest magnitude of each head, float32 [heads], by name such as "self_attn.k"; `expected`: must be observed."""

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
        """The largest absolute values of the states `name`, float32 [heads]. Raises LibraryError when nothing was
        observed although the code of the attention passes these states on, UnsupportedError for attention that does not
        or has another number of heads, NumericsError for NaN or Inf."""
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
    """Observe keys and values as attention passes them to its cache, and queries as they enter its function."""
    states = "kvq" if queries else "kv"
    observer = KVCacheObserver(f"{a.name}.{state}" for a in attentions for state in states if state in a.shows)
    with ExitStack() as stack:
        for attention in attentions:
            cache = _ObservingCache(attention.name, observer)
            hook = partial(replace_argument, attention.cache, cache)
            stack.enter_context(attention.module.register_forward_pre_hook(hook, with_kwargs=True))
        if queries and attentions:
            stack.enter_context(_observe_queries(attentions, observer))
        yield observer


@contextmanager
def _observe_queries(attentions: Sequence[Attention], observer: KVCacheObserver) -> Iterator[None]:
    """Make attention modules call a function that observes the queries, then the attention function set before."""
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
