"""Static FP8 scales of KV cache and queries: parse the request, check formats, describe them in the config.

A runtime that keeps keys and values in FP8 (e4m3) divides them by `k_scale` and `v_scale` before rounding; a
runtime that multiplies queries in FP8 divides them by `q_scale`. The scales are float32 tensors of the attention
module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.base import FORMATS, OutputFormat, available_formats

FP8_MAXIMUM = 448.0  # of e4m3, OCP OFP8 v1.0, 5.1
GRANULARITIES = ("tensor", "head")
_DTYPES = ("fp8", "float8_e4m3fn")
_SIXTEEN_BITS = ("float16", "fp16", "bfloat16", "bf16")


@dataclass(frozen=True)
class CacheScheme:
    """Granularity of the static scales.

    Attributes:
        keys_values: "tensor": one k_scale and one v_scale per layer; "head": one per key-value head.
        queries: the same for q_scale, per query head; None for no q_scale.
    """

    keys_values: str
    queries: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the tensors on each attention module."""
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
    """The scheme that `static_kv_dtype` and the other three options request, or None.

    FP8 attention needs FP8 keys and values: `static_attention_dtype` alone adds their scales, of its own granularity.
    Raises ConfigError for a value that is not allowed, or a granularity without a dtype.
    """
    for what, dtype, granularity in (
        ("static_kv", kv_dtype, kv_granularity), ("static_attention", attention_dtype, attention_granularity),
    ):  # fmt: skip
        if dtype is not None and _type_name(dtype) not in _DTYPES:
            raise ConfigError(f"{what}_dtype={dtype!r} is not allowed; use {' or '.join(_DTYPES)}, or leave it out")
        if granularity not in GRANULARITIES:
            raise ConfigError(f"{what}_granularity={granularity!r} is not allowed; use {' or '.join(GRANULARITIES)}")
        if granularity != GRANULARITIES[0] and dtype is None:
            raise ConfigError(f"{what}_granularity={granularity!r} has no effect without {what}_dtype='fp8'")
    if attention_dtype is None:
        return None if kv_dtype is None else CacheScheme(kv_granularity)
    return CacheScheme(attention_granularity if kv_dtype is None else kv_granularity, attention_granularity)


def none_if_16_bits(value: Any) -> Any:
    """None for a 16-bit type, whose cache needs no scales; other values unchanged."""
    return None if _type_name(value) in _SIXTEEN_BITS else value


def _type_name(value: Any) -> str:
    return str(value).removeprefix("torch.").lower()


def scale_shape(fmt: OutputFormat, cache: CacheScheme, leaf: str, heads: int) -> tuple[int, ...]:
    """Shape of one scale in the files of a format: [1], or one number for each of `heads`."""
    if cache.granularity(leaf) == "tensor":
        return (1,)
    return (heads, *fmt.cache_scale_tail)


def require_cache(formats: Sequence[OutputFormat], cache: CacheScheme | None) -> None:
    """Raise UnsupportedError, naming the formats that can, when one of `formats` cannot store the scales."""
    if cache is None:
        return
    for fmt in formats:
        reason = _unsupported_reason(fmt, cache)
        if reason is not None:
            takers = [name for name in available_formats() if _unsupported_reason(FORMATS[name], cache) is None]
            raise UnsupportedError(
                f"format {fmt.name!r} cannot hold {cache.describe()}: {reason}; formats that can: {', '.join(takers)}"
            )


def _unsupported_reason(fmt: OutputFormat, cache: CacheScheme) -> str | None:
    if not fmt.stores_cache_scales:
        return "its readers do not use such scales"
    if fmt.single_cache_granularity and cache.queries not in (None, cache.keys_values):
        return "its readers expect one granularity for all three"
    return None


def kv_cache_scheme(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """`kv_cache_scheme` of compressed-tensors for a run with these settings, None without static scales."""
    defaults = {f"static_{what}_granularity": GRANULARITIES[0] for what in ("kv", "attention")}
    names = ("static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity")
    cache = parse_cache_scheme(*(settings.get(name, defaults.get(name)) for name in names))
    if cache is None:
        return None
    return {
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "strategy": "attn_head" if cache.keys_values == "head" else "tensor",
        "symmetric": True,
        "type": "float",
    }
