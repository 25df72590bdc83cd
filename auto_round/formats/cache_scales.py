"""Static FP8 scales of KV cache and queries: the request and its scheme.

A runtime that keeps keys and values in FP8 (e4m3) divides them by `k_scale` and `v_scale` before rounding; a runtime
that multiplies queries in FP8 divides them by `q_scale`. The scales are float32 tensors of the attention module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from auto_round.errors import ConfigError

FP8_MAXIMUM = 448.0  # of e4m3, OCP OFP8 v1.0, 5.1
_GRANULARITIES = ("tensor", "head")
_DTYPES = ("fp8", "float8_e4m3fn")
_SIXTEEN_BITS = ("float16", "fp16", "bfloat16", "bf16")


@dataclass(frozen=True)
class CacheScheme:
    """Granularity of the static scales. `keys_values`: "tensor": one k_scale and one v_scale per layer; "head": one per
    key-value head; `queries`: the same for q_scale, per query head; None for no q_scale."""

    keys_values: str
    queries: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("k_scale", "v_scale") if self.queries is None else ("k_scale", "q_scale", "v_scale")

    def granularity(self, leaf: str) -> str:
        """The granularity of one of `leaves`: "tensor" or "head"."""
        return self.queries if leaf == "q_scale" and self.queries is not None else self.keys_values

    def describe(self) -> str:
        """One phrase, such as `fp8 keys and values, one scale per tensor`."""
        words = f"fp8 keys and values, one scale per {self.keys_values}"
        return words if self.queries is None else f"{words}; fp8 queries, one per {self.queries}"


def parse_cache_scheme(
    kv_dtype: Any, kv_granularity: Any, attention_dtype: Any, attention_granularity: Any
) -> CacheScheme | None:
    """The scheme that `static_kv_dtype` and the other three options request, or None. FP8 attention needs FP8 keys and
    values: `static_attention_dtype` alone adds their scales, of its own granularity. Raises ConfigError for a value
    that is not allowed, or a granularity without a dtype."""
    for what, dtype, granularity in (
        ("static_kv", kv_dtype, kv_granularity), ("static_attention", attention_dtype, attention_granularity),
    ):  # fmt: skip
        if dtype is not None and str(dtype).removeprefix("torch.").lower() not in _DTYPES:
            raise ConfigError(f"{what}_dtype={dtype!r} is not allowed; use {' or '.join(_DTYPES)}, or leave it out")
        if granularity not in _GRANULARITIES:
            raise ConfigError(f"{what}_granularity={granularity!r} is not allowed; use {' or '.join(_GRANULARITIES)}")
        if granularity != "tensor" and dtype is None:
            raise ConfigError(f"{what}_granularity={granularity!r} has no effect without {what}_dtype='fp8'")
    if attention_dtype is None:
        return None if kv_dtype is None else CacheScheme(kv_granularity)
    return CacheScheme(attention_granularity if kv_dtype is None else kv_granularity, attention_granularity)


def none_if_16_bits(value: Any) -> Any:
    """None for a 16-bit type, whose cache needs no scales; other values unchanged."""
    return None if str(value).removeprefix("torch.").lower() in _SIXTEEN_BITS else value
