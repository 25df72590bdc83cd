"""Decoders with RMS norms: Llama, Mistral, Mixtral, SmolLM3, Granite, Qwen, OLMo, Phi, Gemma and DeepSeek.

llama.cpp interleaves the rotary rows of the first five. Gemma's norms store the difference from one. DeepSeek-V2 and V3
have latent attention, whose `kv_b_proj` llama.cpp stores as two tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import torch

import auto_round.gguf.families.shared as shared
from auto_round.errors import ModelError
from auto_round.gguf.families.shared import DECODER, ORDINARY_ROPE, SILU, WHOLE_ROTATION, rope_types, rotary, without
from auto_round.gguf.family import Assumption, Family, HfConfig, Key, Placement, Rule


def llama3_factors(s: HfConfig) -> dict[str, torch.Tensor]:
    """float32 [head_dim / 2]: divisors of the rotary frequencies (Llama 3.1's scaling for long contexts)."""
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


_LLAMA_KEYS = (*DECODER, shared.VOCABULARY, shared.ROPE_DIMENSIONS)
_LLAMA_ASSUMES = (SILU, rope_types("default", "linear", "yarn", "llama3"), WHOLE_ROTATION)
_WINDOW = "llama.cpp does not use the sliding window of {}'s layers"
_WINDOWED = lambda s: 0 < s.get("sliding_window", default=0) < s.get("max_position_embeddings", default=0)

LLAMA = Family("llama", ("llama",), _LLAMA_KEYS, rotary(), assumes=_LLAMA_ASSUMES, extras=llama3_factors)
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
        *_LLAMA_ASSUMES,
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
    original = _phi_original_context(s)
    scale = max(1.0, s.need("max_position_embeddings") / original)
    return math.sqrt(1 + math.log(scale) / math.log(original)) if s.rope["rope_type"] in _LONG_ROPE else None


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


def _split_kv_b(s: HfConfig, found: re.Match[str]) -> list[Placement]:
    """The keys' part of `kv_b_proj`, [heads, rank, nope], as llama.cpp multiplies with it, and the values' rows."""
    heads, nope, value = s.heads, int(s.need("qk_nope_head_dim")), int(s.need("v_head_dim"))

    def keys(weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(heads, -1, weight.shape[-1])[:, :nope].transpose(1, 2).contiguous()

    front = f"blk.{found['block']}.attn_"
    rows = torch.arange(heads * (nope + value)).view(heads, nope + value)[:, nope:]
    values = [Placement(f"{front}v_b.weight", rows[head], slot=head) for head in range(heads)]
    return [Placement(f"{front}k_b.weight", edit=keys), *values]


def _sum(*names: str) -> Callable[[HfConfig], int]:
    return lambda s: sum(int(s.need(name)) for name in names)


def _group_limited_routing(s: HfConfig) -> bool:
    return s.model_type == "deepseek_v3" or s.get("topk_method", default="greedy") != "greedy"


DEEPSEEK_V3 = Family(
    "deepseek2", ("deepseek_v3",),
    (
        *DECODER,
        # Attention runs with one key-value head of the latent's size.
        Key("attention.head_count_kv", "uint32", lambda s: 1),
        Key("attention.key_length", "uint32", _sum("kv_lora_rank", "qk_rope_head_dim")),
        Key("attention.value_length", "uint32", "kv_lora_rank"),
        Key("attention.key_length_mla", "uint32", _sum("qk_nope_head_dim", "qk_rope_head_dim")),
        Key("attention.value_length_mla", "uint32", "v_head_dim"),
        Key("attention.q_lora_rank", "uint32", "q_lora_rank"),
        Key("attention.kv_lora_rank", "uint32", "kv_lora_rank"),
        Key("rope.dimension_count", "uint32", "qk_rope_head_dim"),
        Key(
            "rope.scaling.yarn_log_multiplier", "float32",
            lambda s: 0.1 * float(s.rope["mscale_all_dim"]) if "mscale_all_dim" in s.rope else None,
        ),
        Key(
            "leading_dense_block_count", "uint32",
            lambda s: s.get("first_k_dense_replace", default=0 if s.experts else s.blocks),
        ),
        shared.VOCABULARY, shared.EXPERT_WIDTH,
        Key("expert_group_count", "uint32", lambda s: s.get("n_group") if _group_limited_routing(s) else None),
        Key("expert_group_used_count", "uint32", lambda s: s.get("topk_group") if _group_limited_routing(s) else None),
        Key("expert_shared_count", "uint32", lambda s: s.get("n_shared_experts", default=0)),
        Key("expert_weights_scale", "float32", "routed_scaling_factor"),
        Key("expert_weights_norm", "bool", lambda s: s.get("norm_topk_prob") or None),
        Key(
            "expert_gating_func", "uint32",
            lambda s: shared.GATING[
                s.get("scoring_func", default="sigmoid" if s.model_type == "deepseek_v3" else "softmax")
            ],
        ),
    ),
    (Rule(r"model\.layers\.(?P<block>\d+)\.self_attn\.kv_b_proj\.weight", _split_kv_b),),
    ((r"e_score_correction_bias$", "e_score_correction.bias"),),
    (
        SILU, ORDINARY_ROPE,
        Assumption(
            lambda s: s.get("rope_interleave", default=True), "llama.cpp rotates neighbouring dimensions of its queries"
        ),
        Assumption(
            lambda s: s.rope["rope_type"] != "yarn" or s.rope.get("mscale") == s.rope.get("mscale_all_dim", 0) != 0,
            "llama.cpp expects the same mscale and mscale_all_dim in its rotary settings",
        ),
        Assumption(  # it takes 26, 27 or (with this vocabulary) 48 layers for a model without low-rank queries
            lambda s: (s.get("q_lora_rank") is None)
            == (s.blocks in (26, 27) or (s.blocks == 48 and s.get("vocab_size") == 128256)),
            "llama.cpp infers low-rank queries from the number of layers, and would infer them wrongly for this model",
        ),
        Assumption(lambda s: s.get("moe_layer_freq", default=1) == 1, "llama.cpp expects experts in every later block"),
    ),
)  # fmt: skip
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3, model_types=("deepseek_v2",),
    notes=((
        lambda s: _group_limited_routing(s) and int(s.get("n_group", default=1)) > 1,
        "llama.cpp ranks groups of experts by their best two, DeepSeek-V2 by the best one",
    ),),
)  # fmt: skip
