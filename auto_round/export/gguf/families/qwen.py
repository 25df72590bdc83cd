"""Qwen2, Qwen3 and their mixtures of experts. llama.cpp rotates them as Transformers does."""

from __future__ import annotations

from auto_round.export.gguf.families.shared import (
    DECODER,
    EVERY_LAYER_ROUTED,
    EXPERT_WIDTH,
    ORDINARY_ROPE,
    SILU,
    WHOLE_ROTATION,
    without,
)
from auto_round.export.gguf.family import Assumption, Family, Key

_DENSE = (SILU, ORDINARY_ROPE, WHOLE_ROTATION, without("use_sliding_window"))
_SHARED_WIDTH = Key("expert_shared_feed_forward_length", "uint32", "shared_expert_intermediate_size")

QWEN2 = Family("qwen2", ("qwen2",), DECODER, assumes=_DENSE)
QWEN3 = Family("qwen3", ("qwen3",), DECODER, assumes=(*_DENSE, without("attention_bias")))
QWEN2_MOE = Family(
    "qwen2moe", ("qwen2_moe",), (*DECODER, EXPERT_WIDTH, _SHARED_WIDTH),
    assumes=(
        *_DENSE, EVERY_LAYER_ROUTED,
        Assumption(lambda s: not s.get("norm_topk_prob"), "llama.cpp does not normalize the weights of its experts"),
    ),
)  # fmt: skip
QWEN3_MOE = Family(
    "qwen3moe", ("qwen3_moe",), (*DECODER, EXPERT_WIDTH),
    assumes=(
        *_DENSE, EVERY_LAYER_ROUTED, without("attention_bias"),
        Assumption(
            lambda s: bool(s.get("norm_topk_prob")),
            "llama.cpp normalizes the weights of its experts, and norm_topk_prob is false",
        ),
    ),
)  # fmt: skip
