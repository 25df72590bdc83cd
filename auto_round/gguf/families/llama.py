"""Llama, Mistral, Mixtral, SmolLM3 and Granite: GGUF families whose rotary rows llama.cpp interleaves.

Llama 2 and 3, SmolLM2, Mistral and Mixtral are one architecture in llama.cpp. SmolLM3 skips rotation in every fourth
layer. Granite 3 adds four multipliers; its mixtures of experts fuse gate and up projections.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from auto_round.gguf.families.shared import (
    DECODER,
    ORDINARY_ROPE,
    ROPE_DIMENSIONS,
    SILU,
    VOCABULARY,
    WHOLE_ROTATION,
    half_rows,
    rope_types,
    rotary,
    without,
)
from auto_round.gguf.family import Assumption, Family, HfConfig, Key, Placement, Rule


def llama3_factors(s: HfConfig) -> dict[str, torch.Tensor]:
    """float32 [head_dim / 2]: divisors of the rotary frequencies (Llama 3.1's scaling for long contexts).

    The divisor is 1 for wavelengths shorter than original / high and `factor` for those longer than original / low,
    with a linear interpolation in original / wavelength between.
    """
    rope = s.rope
    if rope["rope_type"] != "llama3":
        return {}
    dims = s.head_dim
    frequencies = 1.0 / (
        float(rope.get("rope_theta", 10000.0)) ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    )
    factor, original = float(rope.get("factor", 8.0)), float(rope.get("original_max_position_embeddings", 8192))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    turns = original / (2 * math.pi / frequencies)
    kept = (turns - low) / (high - low)
    between = 1 / ((1 - kept) / factor + kept)
    factors = torch.where(turns > high, torch.ones(()), torch.where(turns < low, torch.tensor(factor), between))
    return {"rope_freqs.weight": factors.float()}


ROPE = rope_types("default", "linear", "yarn", "llama3")
KEYS = (*DECODER, VOCABULARY, ROPE_DIMENSIONS)


def _windowed(s: HfConfig) -> bool:
    return bool(s.get("sliding_window")) and s.get("sliding_window") < s.get("max_position_embeddings", default=0)


LLAMA = Family(
    "llama", ("llama",), KEYS, rotary(), assumes=(SILU, ROPE, WHOLE_ROTATION), extras=llama3_factors
)  # fmt: skip
MISTRAL = replace(
    LLAMA, model_types=("mistral",),
    notes=((_windowed, "llama.cpp does not use the sliding window of Mistral's layers"),),
)  # fmt: skip
MIXTRAL = replace(
    LLAMA, model_types=("mixtral",),
    notes=((_windowed, "llama.cpp does not use the sliding window of Mixtral's layers"),),
)  # fmt: skip


def _every_fourth(s: HfConfig) -> bool:
    rotated = s.get("no_rope_layers")  # 1 where a layer IS rotated
    return not rotated or [bool(r) for r in rotated] == [(i + 1) % 4 != 0 for i in range(s.blocks)]


SMOLLM3 = Family(
    "smollm3", ("smollm3",), KEYS, rotary(),
    assumes=(
        SILU, ORDINARY_ROPE, WHOLE_ROTATION, without("use_sliding_window"),
        Assumption(_every_fourth, "llama.cpp leaves exactly every fourth layer of SmolLM3 without rotation"),
    ),
)  # fmt: skip


_GRANITE_KEYS = (
    *(key for key in KEYS if key.name not in ("attention.key_length", "attention.value_length")),
    Key("attention.scale", "float32", "attention_multiplier"),
    Key("embedding_scale", "float32", "embedding_multiplier"),
    Key("residual_scale", "float32", "residual_multiplier"),
    Key("logit_scale", "float32", "logits_scaling"),
)
_GRANITE_HEAD_DIM = Assumption(
    lambda s: s.head_dim == s.hidden // s.heads,
    "llama.cpp takes Granite's heads to be hidden_size / num_attention_heads wide",
)
_GRANITE_ASSUMES = (SILU, ROPE, WHOLE_ROTATION, _GRANITE_HEAD_DIM)


def _shared_mlp(s: HfConfig, found: re.Match[str]) -> list[Placement]:
    """The shared feed-forward layers beside the experts, or the only ones of a dense model."""
    front, end = f"blk.{found['block']}.ffn_", "_shexp.weight" if s.experts else ".weight"
    if found["part"] == "output":
        return [Placement(f"{front}down{end}")]
    width = int(s.need("shared_intermediate_size"))
    return [half_rows(f"{front}gate{end}", width, False), half_rows(f"{front}up{end}", width, True)]


GRANITE = Family("granite", ("granite",), _GRANITE_KEYS, rotary(), assumes=_GRANITE_ASSUMES, extras=llama3_factors)
GRANITE_MOE = Family(
    "granitemoe", ("granitemoe", "granitemoeshared"),
    (*_GRANITE_KEYS, Key("expert_shared_feed_forward_length", "uint32", "shared_intermediate_size")),
    (
        *rotary(),
        Rule(r"model\.layers\.(?P<block>\d+)\.shared_mlp\.(?P<part>input|output)_linear\.weight", _shared_mlp),
    ),
    renames=((r"\.router\.weight$", ".router.layer.weight"),),
    assumes=_GRANITE_ASSUMES, extras=llama3_factors,
)  # fmt: skip
