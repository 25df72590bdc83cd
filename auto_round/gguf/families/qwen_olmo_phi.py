"""Qwen2, Qwen3, OLMo 2, OLMo 3, Phi-3 and Phi-4: GGUF families with Transformers' order of rotary rows.

Qwen includes the mixtures of experts. OLMo has norms after attention and MLP, and over all heads of queries and keys
together. Phi keeps q, k, v and gate, up fused, and has two sets of factors for long contexts.
"""

from __future__ import annotations

import math

import torch

from auto_round.errors import ModelError
from auto_round.gguf.families.shared import (
    DECODER,
    EVERY_LAYER_ROUTED,
    EXPERT_WIDTH,
    ORDINARY_ROPE,
    RMS_EPSILON,
    ROPE_BASE,
    SILU,
    SIZES,
    SLIDING_WINDOW,
    WHOLE_ROTATION,
    rope_types,
    without,
)
from auto_round.gguf.family import Assumption, Family, HfConfig, Key

_QWEN_ASSUMES = (SILU, ORDINARY_ROPE, WHOLE_ROTATION, without("use_sliding_window"))
_SHARED_WIDTH = Key("expert_shared_feed_forward_length", "uint32", "shared_expert_intermediate_size")

QWEN2 = Family("qwen2", ("qwen2",), DECODER, assumes=_QWEN_ASSUMES)
QWEN3 = Family("qwen3", ("qwen3",), DECODER, assumes=(*_QWEN_ASSUMES, without("attention_bias")))
QWEN2_MOE = Family(
    "qwen2moe", ("qwen2_moe",), (*DECODER, EXPERT_WIDTH, _SHARED_WIDTH),
    assumes=(
        *_QWEN_ASSUMES, EVERY_LAYER_ROUTED,
        Assumption(lambda s: not s.get("norm_topk_prob"), "llama.cpp does not normalize the weights of its experts"),
    ),
)  # fmt: skip
QWEN3_MOE = Family(
    "qwen3moe", ("qwen3_moe",), (*DECODER, EXPERT_WIDTH),
    assumes=(
        *_QWEN_ASSUMES, EVERY_LAYER_ROUTED, without("attention_bias"),
        Assumption(
            lambda s: bool(s.get("norm_topk_prob")),
            "llama.cpp normalizes the weights of its experts, and norm_topk_prob is false",
        ),
    ),
)  # fmt: skip


def _olmo_windows(s: HfConfig) -> list[bool] | None:
    if s.get("sliding_window") is None:
        return None
    kinds = s.get("layer_types")
    return [k == "sliding_attention" for k in kinds] if kinds else [(i + 1) % 4 != 0 for i in range(s.blocks)]


OLMO2 = Family(
    "olmo2", ("olmo2", "olmo3"),
    (*DECODER, SLIDING_WINDOW, Key("attention.sliding_window_pattern", "bool", _olmo_windows)),
    assumes=(SILU, ORDINARY_ROPE, WHOLE_ROTATION),
)  # fmt: skip


_LONG_ROPE = ("longrope", "su")


def _phi_original_context(s: HfConfig) -> int:
    return int(s.rope.get("original_max_position_embeddings") or s.need("max_position_embeddings"))


def _phi_rotary_dims(s: HfConfig) -> int:
    return int(float(s.rope.get("partial_rotary_factor", 1.0)) * s.hidden) // s.heads


def _attention_factor(s: HfConfig) -> float | None:
    """LongRoPE's attention factor sqrt(1 + log(scale) / log(original)) with scale = context / original."""
    if s.rope["rope_type"] not in _LONG_ROPE:
        return None
    scale = s.need("max_position_embeddings") / _phi_original_context(s)
    return math.sqrt(1 + math.log(scale) / math.log(_phi_original_context(s))) if scale > 1 else 1.0


def _long_rope_factors(s: HfConfig) -> dict[str, torch.Tensor]:
    """float32 [rotated / 2] each: divisors of the rotary frequencies in long and in short contexts."""
    rope = s.rope
    if rope["rope_type"] not in _LONG_ROPE:
        return {}
    made = {name: torch.tensor(rope.get(f"{name}_factor", ()), dtype=torch.float32) for name in ("long", "short")}
    if any(2 * f.numel() != _phi_rotary_dims(s) for f in made.values()):
        raise ModelError(f"config.json: long_factor and short_factor must have {_phi_rotary_dims(s) // 2} values each")
    return {f"rope_factors_{name}.weight": factors for name, factors in made.items()}


PHI3 = Family(
    "phi3", ("phi3",),
    (
        *SIZES, RMS_EPSILON, ROPE_BASE,
        Key("rope.scaling.original_context_length", "uint32", _phi_original_context),
        Key("rope.dimension_count", "uint32", _phi_rotary_dims),
        Key("rope.scaling.attn_factor", "float32", _attention_factor),
        # 0: no sliding window.
        Key("attention.sliding_window", "uint32", lambda s: s.get("sliding_window", default=0)),
    ),
    assumes=(SILU, rope_types("default", *_LONG_ROPE)), extras=_long_rope_factors,
    notes=((lambda s: bool(s.get("sliding_window")), "llama.cpp does not use the sliding window of Phi-3's layers"),),
)  # fmt: skip
