"""GPT-2, Falcon and StableLM: GGUF families with layer norms instead of RMS norms.

GPT-2 has learned positions. Falcon 7B, 40B and 2 run attention and MLP in parallel and fuse q, k and v per group of
heads. StableLM rotates a part of each head, and some of its models normalize every head.
"""

from __future__ import annotations

import torch

import auto_round.gguf.families.shared as shared
from auto_round.gguf.families.shared import activation, rope_types, without
from auto_round.gguf.family import Assumption, Family, HfConfig, Key, Placement, Rule

GPT2 = Family(
    "gpt2", ("gpt2",),
    (
        shared.BLOCKS, shared.CONTEXT, shared.EMBEDDING,
        Key("feed_forward_length", "uint32", lambda s: s.get("n_inner", default=4 * s.hidden)),
        shared.HEADS, shared.NORM_EPSILON,
    ),
    assumes=(
        activation("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        without("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
        Assumption(lambda s: s.get("scale_attn_weights", default=True), "llama.cpp always scales the attention scores"),
    ),
)  # fmt: skip


def _falcon_kv_heads(s: HfConfig) -> int:
    """Key-value heads; the old decoder with multi-query attention ignores `num_kv_heads`."""
    if not s.get("new_decoder_architecture") and s.get("multi_query"):
        return 1
    return int(s.get("num_kv_heads", "n_head_kv", default=s.heads))


def qkv_rows(heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """int64 [rows]: all queries, then all keys, then all values, from rows in groups (q ..., k, v)."""
    rows = torch.arange((heads + 2 * kv_heads) * head_dim).view(kv_heads, -1, head_dim)
    return torch.cat([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


_UNUSUAL_ROPE_BASE = Key(  # not written for llama.cpp's default
    "rope.freq_base", "float32", lambda s: None if (base := s.rope.get("rope_theta")) in (None, 10000) else base
)  # fmt: skip
FALCON = Family(
    "falcon", ("falcon", "RefinedWeb", "RefinedWebModel"),
    (
        shared.BLOCKS, shared.EMBEDDING, shared.HEADS,
        Key("context_length", "uint32", lambda s: s.get("max_position_embeddings", default=2048)),
        Key("attention.head_count_kv", "uint32", _falcon_kv_heads), shared.NORM_EPSILON,
        Key("feed_forward_length", "uint32", lambda s: s.get("ffn_hidden_size", default=4 * s.hidden)),
        Key("tensor_data_layout", "string", lambda s: "jploski"),  # name of this order of rows
        _UNUSUAL_ROPE_BASE,
    ),
    (
        Rule(
            r"transformer\.h\.(?P<block>\d+)\.self_attention\.query_key_value\.(?P<leaf>weight|bias)",
            lambda s, m: [
                Placement(
                    f"blk.{m['block']}.attn_qkv.{m['leaf']}",
                    qkv_rows(s.heads, _falcon_kv_heads(s), s.hidden // s.heads),
                )
            ],
        ),
    ),
    assumes=(
        activation("gelu"), rope_types("default"), without("alibi", "bias"),
        Assumption(
            lambda s: s.get("new_decoder_architecture") or s.get("parallel_attn", default=True),
            "llama.cpp runs attention and feed-forward layers in parallel, and this model sequentially",
        ),
    ),
)  # fmt: skip
STABLELM = Family(
    "stablelm", ("stablelm", "stablelm_epoch"),
    (
        *shared.SIZES, shared.NORM_EPSILON,
        Key(
            "rope.dimension_count", "uint32",
            lambda s: int(float(s.rope.get("partial_rotary_factor", 0.25)) * (s.hidden // s.heads)),
        ),
        Key("use_parallel_residual", "bool", lambda s: s.get("use_parallel_residual", default=True)),
        _UNUSUAL_ROPE_BASE,
    ),
    (
        Rule(
            r"model\.layers\.(?P<block>\d+)\.self_attn\.(?P<part>[qk])_layernorm\.norms\.(?P<head>\d+)\.weight",
            lambda s, m: [Placement(f"blk.{m['block']}.attn_{m['part']}_norm.weight", slot=int(m["head"]))],
        ),
    ),
    assumes=(shared.SILU, rope_types("default")),
)  # fmt: skip
