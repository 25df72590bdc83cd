"""StableLM: partial rotation, layer norms, and in some models a norm for every head."""

from __future__ import annotations

import re

from auto_round.export.gguf.families.shared import (
    BLOCKS,
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    KV_HEADS,
    NORM_EPSILON,
    SILU,
    rope_types,
)
from auto_round.export.gguf.family import Family, Key, Rule
from auto_round.export.gguf.placement import Placement
from auto_round.export.gguf.settings import Settings


def _head_norm(s: Settings, found: re.Match[str]) -> list[Placement]:
    return [Placement(f"blk.{found['block']}.attn_{found['part']}_norm.weight", slot=int(found["head"]))]


def _rotated(s: Settings) -> int:
    return int(float(s.rope.get("partial_rotary_factor", 0.25)) * (s.hidden // s.heads))


def _base(s: Settings) -> float | None:
    theta = float(s.rope.get("rope_theta", 10000.0))
    return None if theta == 10000.0 else theta


STABLELM = Family(
    "stablelm", ("stablelm", "stablelm_epoch"),
    (
        BLOCKS, CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, NORM_EPSILON,
        Key("rope.dimension_count", "uint32", _rotated),
        Key("use_parallel_residual", "bool", lambda s: s.get("use_parallel_residual", default=True)),
        Key("rope.freq_base", "float32", _base),
    ),
    (
        Rule(
            r"model\.layers\.(?P<block>\d+)\.self_attn\.(?P<part>[qk])_layernorm\.norms\.(?P<head>\d+)\.weight",
            _head_norm,
        ),
    ),
    assumes=(SILU, rope_types("default")),
)  # fmt: skip
