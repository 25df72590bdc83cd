"""DeepSeek-V2 and V3: latent attention, whose `kv_b_proj` llama.cpp stores as two tensors, and shared experts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

import auto_round.gguf.families.shared as shared
from auto_round.gguf.family import Assumption, Family, HfConfig, Key, Placement, Rule


def _split_kv_b(s: HfConfig, found: re.Match[str]) -> list[Placement]:
    """Of `kv_b_proj` [heads * (nope + value), rank]: the keys' part [heads, rank, nope], transposed as llama.cpp
    multiplies with it, and the values' rows of each head."""
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


def _log_multiplier(s: HfConfig) -> float | None:
    found = s.rope.get("mscale_all_dim")
    return None if found is None else 0.1 * float(found)


def _gating(s: HfConfig) -> int:
    kind = s.get("scoring_func", default="sigmoid" if s.model_type == "deepseek_v3" else "softmax")
    return {"softmax": 1, "sigmoid": 2}[kind]


def _expects_query_rank(s: HfConfig) -> bool:
    """llama.cpp recognizes models without low-rank queries by their number of layers."""
    lite = s.blocks in (26, 27) or (s.blocks == 48 and s.get("vocab_size") == 128256)
    return not lite


DEEPSEEK_V3 = Family(
    "deepseek2", ("deepseek_v3",),
    (
        *shared.DECODER,
        # Attention runs with one key-value head of the latent's size.
        Key("attention.head_count_kv", "uint32", lambda s: 1),
        Key("attention.key_length", "uint32", _sum("kv_lora_rank", "qk_rope_head_dim")),
        Key("attention.value_length", "uint32", "kv_lora_rank"),
        Key("attention.key_length_mla", "uint32", _sum("qk_nope_head_dim", "qk_rope_head_dim")),
        Key("attention.value_length_mla", "uint32", "v_head_dim"),
        Key("attention.q_lora_rank", "uint32", "q_lora_rank"),
        Key("attention.kv_lora_rank", "uint32", "kv_lora_rank"),
        Key("rope.dimension_count", "uint32", "qk_rope_head_dim"),
        Key("rope.scaling.yarn_log_multiplier", "float32", _log_multiplier),
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
        Key("expert_gating_func", "uint32", _gating),
    ),
    (Rule(r"model\.layers\.(?P<block>\d+)\.self_attn\.kv_b_proj\.weight", _split_kv_b),),
    ((r"e_score_correction_bias$", "e_score_correction.bias"),),
    (
        shared.SILU, shared.ORDINARY_ROPE,
        Assumption(
            lambda s: s.get("rope_interleave", default=True), "llama.cpp rotates neighbouring dimensions of its queries"
        ),
        Assumption(
            lambda s: s.rope["rope_type"] != "yarn" or s.rope.get("mscale") == s.rope.get("mscale_all_dim", 0) != 0,
            "llama.cpp expects the same mscale and mscale_all_dim in its rotary settings",
        ),
        Assumption(
            lambda s: (s.get("q_lora_rank") is not None) == _expects_query_rank(s),
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
