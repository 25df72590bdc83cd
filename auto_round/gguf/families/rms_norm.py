"""Decoders with RMS norms: Llama, Mistral, Mixtral, SmolLM3, Granite, Qwen, OLMo, Phi and Gemma.

llama.cpp interleaves the rotary rows of the first five. SmolLM3 skips rotation in every fourth layer. Granite 3 has
four multipliers, and fuses the gate and up projections of its experts. OLMo has norms after attention and MLP, and over
all heads of queries and keys together. Phi keeps q, k, v and gate, up fused, and has two sets of factors for long
contexts. Gemma's norms store the difference from one; its layers alternate between sliding windows and full attention.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

import auto_round.gguf.families.shared as shared
from auto_round.errors import ModelError
from auto_round.gguf.families.shared import DECODER, ORDINARY_ROPE, SILU, WHOLE_ROTATION, rope_types, rotary, without
from auto_round.gguf.family import Assumption, Family, HfConfig, Key, Placement, Rule


def llama3_factors(s: HfConfig) -> dict[str, torch.Tensor]:
    """float32 [head_dim / 2]: divisors of the rotary frequencies (Llama 3.1's scaling for long contexts).

    The divisor is 1 for wavelengths shorter than original / high and `factor` for those longer than original / low,
    with a linear interpolation in original / wavelength between.
    """
    rope, dims = s.rope, s.head_dim
    if rope["rope_type"] != "llama3":
        return {}
    theta = float(rope.get("rope_theta", 10000.0))
    frequencies = 1.0 / (theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
    factor, original = float(rope.get("factor", 8.0)), float(rope.get("original_max_position_embeddings", 8192))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    turns = original / (2 * math.pi / frequencies)
    kept = (turns - low) / (high - low)
    between = 1 / ((1 - kept) / factor + kept)
    factors = torch.where(turns > high, torch.ones(()), torch.where(turns < low, torch.tensor(factor), between))
    return {"rope_freqs.weight": factors.float()}


def _three_of_four(s: HfConfig) -> list[bool]:
    return [(index + 1) % 4 != 0 for index in range(s.blocks)]


_LLAMA_ROPE = rope_types("default", "linear", "yarn", "llama3")
_LLAMA_KEYS = (*DECODER, shared.VOCABULARY, shared.ROPE_DIMENSIONS)
_WINDOW = "llama.cpp does not use the sliding window of {}'s layers"
_WINDOWED = lambda s: 0 < s.get("sliding_window", default=0) < s.get("max_position_embeddings", default=0)

LLAMA = Family(
    "llama", ("llama",), _LLAMA_KEYS, rotary(), assumes=(SILU, _LLAMA_ROPE, WHOLE_ROTATION), extras=llama3_factors
)  # fmt: skip
MISTRAL = replace(LLAMA, model_types=("mistral",), notes=((_WINDOWED, _WINDOW.format("Mistral")),))
MIXTRAL = replace(LLAMA, model_types=("mixtral",), notes=((_WINDOWED, _WINDOW.format("Mixtral")),))
SMOLLM3 = Family(
    "smollm3", ("smollm3",), _LLAMA_KEYS, rotary(),
    assumes=(
        SILU, ORDINARY_ROPE, WHOLE_ROTATION, without("use_sliding_window"),
        Assumption(  # 1 where a layer IS rotated
            lambda s: [bool(r) for r in s.get("no_rope_layers") or _three_of_four(s)] == _three_of_four(s),
            "llama.cpp leaves exactly every fourth layer of SmolLM3 without rotation",
        ),
    ),
)  # fmt: skip


def _shared_mlp(s: HfConfig, found: re.Match[str]) -> list[Placement]:
    """The shared feed-forward layers beside the experts, or the only ones of a dense model."""
    front, end = f"blk.{found['block']}.ffn_", "_shexp.weight" if s.experts else ".weight"
    if found["part"] == "output":
        return [Placement(f"{front}down{end}")]
    width = int(s.need("shared_intermediate_size"))
    return [
        Placement(f"{front}gate{end}", torch.arange(width)), Placement(f"{front}up{end}", torch.arange(width) + width),
    ]  # fmt: skip


GRANITE = Family(
    "granite", ("granite",),
    (
        *(key for key in _LLAMA_KEYS if key not in shared.HEAD_DIM),
        Key("attention.scale", "float32", "attention_multiplier"),
        Key("embedding_scale", "float32", "embedding_multiplier"),
        Key("residual_scale", "float32", "residual_multiplier"),
        Key("logit_scale", "float32", "logits_scaling"),
    ),
    rotary(),
    assumes=(
        SILU, _LLAMA_ROPE, WHOLE_ROTATION,
        Assumption(
            lambda s: s.head_dim == s.hidden // s.heads,
            "llama.cpp takes Granite's heads to be hidden_size / num_attention_heads wide",
        ),
    ),
    extras=llama3_factors,
)  # fmt: skip
GRANITE_MOE = replace(
    GRANITE, arch="granitemoe", model_types=("granitemoe", "granitemoeshared"),
    keys=(*GRANITE.keys, Key("expert_shared_feed_forward_length", "uint32", "shared_intermediate_size")),
    rules=(
        *rotary(),
        Rule(r"model\.layers\.(?P<block>\d+)\.shared_mlp\.(?P<part>input|output)_linear\.weight", _shared_mlp),
    ),
    renames=((r"\.router\.weight$", ".router.layer.weight"),),
)  # fmt: skip

_QWEN_ASSUMES = (SILU, ORDINARY_ROPE, WHOLE_ROTATION, without("use_sliding_window"))
_EVERY_LAYER_ROUTED = Assumption(
    lambda s: not s.get("mlp_only_layers") and s.get("decoder_sparse_step", default=1) == 1,
    "llama.cpp expects experts in every layer of this architecture",
)
QWEN2 = Family("qwen2", ("qwen2",), DECODER, assumes=_QWEN_ASSUMES)
QWEN3 = Family("qwen3", ("qwen3",), DECODER, assumes=(*_QWEN_ASSUMES, without("attention_bias")))
QWEN2_MOE = Family(
    "qwen2moe", ("qwen2_moe",),
    (
        *DECODER, shared.EXPERT_WIDTH,
        Key("expert_shared_feed_forward_length", "uint32", "shared_expert_intermediate_size"),
    ),
    assumes=(
        *_QWEN_ASSUMES, _EVERY_LAYER_ROUTED,
        Assumption(lambda s: not s.get("norm_topk_prob"), "llama.cpp does not normalize the weights of its experts"),
    ),
)  # fmt: skip
QWEN3_MOE = Family(
    "qwen3moe", ("qwen3_moe",), (*DECODER, shared.EXPERT_WIDTH),
    assumes=(
        *QWEN3.assumes, _EVERY_LAYER_ROUTED,
        Assumption(
            lambda s: bool(s.get("norm_topk_prob")),
            "llama.cpp normalizes the weights of its experts, and norm_topk_prob is false",
        ),
    ),
)  # fmt: skip


def _windows(s: HfConfig) -> list[bool] | None:
    """Whether each layer uses a sliding window, from `layer_types`; None without them."""
    return [kind == "sliding_attention" for kind in s.get("layer_types", default=())] or None


OLMO2 = Family(
    "olmo2", ("olmo2", "olmo3"),
    (
        *DECODER, shared.SLIDING_WINDOW,
        Key(
            "attention.sliding_window_pattern", "bool",
            lambda s: None if s.get("sliding_window") is None else _windows(s) or _three_of_four(s),
        ),
    ),
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
    if s.rope["rope_type"] not in _LONG_ROPE:
        return {}
    made = {name: torch.tensor(s.rope.get(f"{name}_factor", ()), dtype=torch.float32) for name in ("long", "short")}
    if any(2 * f.numel() != _phi_rotary_dims(s) for f in made.values()):
        raise ModelError(f"config.json: long_factor and short_factor must have {_phi_rotary_dims(s) // 2} values each")
    return {f"rope_factors_{name}.weight": factors for name, factors in made.items()}


PHI3 = Family(
    "phi3", ("phi3",),
    (
        *shared.SIZES, shared.RMS_EPSILON, shared.ROPE_BASE,
        Key("rope.scaling.original_context_length", "uint32", _phi_original_context),
        Key("rope.dimension_count", "uint32", _phi_rotary_dims),
        Key("rope.scaling.attn_factor", "float32", _attention_factor),
        # 0: no sliding window.
        Key("attention.sliding_window", "uint32", lambda s: s.get("sliding_window", default=0)),
    ),
    assumes=(SILU, rope_types("default", *_LONG_ROPE)), extras=_long_rope_factors,
    notes=((lambda s: bool(s.get("sliding_window")), _WINDOW.format("Phi-3")),),
)  # fmt: skip


_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_PLUS_ONE = lambda weight: weight.float() + 1
_GEMMA_RULES = (
    Rule(
        r"model\.layers\.(?P<block>\d+)\.(?P<norm>(self_attn\.)?\w*norm)\.weight",
        lambda s, m: [Placement(f"blk.{m['block']}.{_NORMS[m['norm']]}.weight", edit=_PLUS_ONE)],
    ),
    Rule(r"model\.norm\.weight", lambda s, m: [Placement("output_norm.weight", edit=_PLUS_ONE)]),
)
_FINAL_SOFTCAP = Key("final_logit_softcapping", "float32", "final_logit_softcapping")


def _gemma_keys(*others: Key, full_every: int) -> tuple[Key, ...]:
    """The keys of Gemma; the pattern of layers is not written for llama.cpp's default, one full of `full_every`."""

    def pattern(s: HfConfig) -> list[bool] | None:
        found = _windows(s)
        return None if found == [(index + 1) % full_every != 0 for index in range(s.blocks)] else found

    keys = (*shared.SIZES, shared.RMS_EPSILON, *shared.HEAD_DIM, shared.SLIDING_WINDOW, *others, _FINAL_SOFTCAP)
    return (*keys, Key("attention.sliding_window_pattern", "bool", pattern))


def _gemma_assumes(largest: int) -> tuple[Assumption, ...]:
    """Attention scores are scaled by the head size, or by hidden / heads in the model of `largest` layers."""

    def usual_scale(s: HfConfig) -> bool:
        wanted = s.hidden // s.heads if s.blocks == largest else s.head_dim
        return s.get("query_pre_attn_scalar", default=wanted) == wanted

    return (
        shared.activation("gelu_pytorch_tanh"), WHOLE_ROTATION,
        Assumption(
            lambda s: s.tied, "llama.cpp uses Gemma's embedding as its head, and this model has a separate head"
        ),
        without("use_bidirectional_attention"),
        Assumption(usual_scale, "llama.cpp supports only the usual query_pre_attn_scalar of this architecture"),
    )  # fmt: skip


GEMMA2 = Family(
    "gemma2", ("gemma2",),
    _gemma_keys(Key("attn_logit_softcapping", "float32", "attn_logit_softcapping"), full_every=2), _GEMMA_RULES,
    assumes=(
        *_gemma_assumes(46), rope_types("default"),
        Assumption(
            lambda s: float(s.rope.get("rope_theta", 10000.0)) == 10000.0,
            "llama.cpp's base of Gemma 2's rotary embeddings is 10000",
        ),
    ),
)  # fmt: skip
GEMMA3 = Family(
    "gemma3", ("gemma3_text",),
    _gemma_keys(*shared.ROPE_SCALING, shared.ROPE_BASE, shared.SLIDING_ROPE_BASE, full_every=6), _GEMMA_RULES,
    assumes=(*_gemma_assumes(62), rope_types("default", "linear"), without("attn_logit_softcapping")),
)  # fmt: skip
