"""Phi-3 and Phi-4: joined q, k, v and joined gate and up stay joined; two sets of factors for long contexts."""

from __future__ import annotations

import math

import torch

from auto_round.errors import ModelError
from auto_round.export.gguf.families.shared import (
    BLOCKS,
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    KV_HEADS,
    RMS_EPSILON,
    ROPE_BASE,
    SILU,
    rope_types,
)
from auto_round.export.gguf.family import Family, Key
from auto_round.export.gguf.settings import Settings

_LONG = ("longrope", "su")


def _original(s: Settings) -> int:
    return int(s.rope.get("original_max_position_embeddings") or s.need("max_position_embeddings"))


def _rotated(s: Settings) -> int:
    return int(float(s.rope.get("partial_rotary_factor", 1.0)) * s.hidden) // s.heads


def _attention_factor(s: Settings) -> float | None:
    """sqrt(1 + log(scale) / log(original)) with scale = context / original: LongRoPE's correction of the scores."""
    if s.rope["rope_type"] not in _LONG:
        return None
    scale = s.need("max_position_embeddings") / _original(s)
    return math.sqrt(1 + math.log(scale) / math.log(_original(s))) if scale > 1 else 1.0


def _factors(s: Settings) -> dict[str, torch.Tensor]:
    """float32 [rotated / 2] each: what the frequencies are divided by in long and in short contexts."""
    rope = s.rope
    if rope["rope_type"] not in _LONG:
        return {}
    made = {name: torch.tensor(rope.get(f"{name}_factor", ()), dtype=torch.float32) for name in ("long", "short")}
    if any(2 * f.numel() != _rotated(s) for f in made.values()):
        raise ModelError(f"config.json: long_factor and short_factor must have {_rotated(s) // 2} values each")
    return {f"rope_factors_{name}.weight": factors for name, factors in made.items()}


PHI3 = Family(
    "phi3", ("phi3",),
    (
        BLOCKS, CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, RMS_EPSILON, ROPE_BASE,
        Key("rope.scaling.original_context_length", "uint32", _original),
        Key("rope.dimension_count", "uint32", _rotated),
        Key("rope.scaling.attn_factor", "float32", _attention_factor),
        # 0 tells llama.cpp that it is no Phi-3 with a window.
        Key("attention.sliding_window", "uint32", lambda s: s.get("sliding_window", default=0)),
    ),
    assumes=(SILU, rope_types("default", *_LONG)), extras=_factors,
    notes=((lambda s: bool(s.get("sliding_window")), "llama.cpp lets Phi-3's layers see the whole context"),),
)  # fmt: skip
