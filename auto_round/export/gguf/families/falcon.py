"""Falcon 7B, 40B and 2: parallel attention, and q, k and v of every group of heads joined."""

from __future__ import annotations

import re

import torch

from auto_round.export.gguf.families.shared import (
    BLOCKS,
    EMBEDDING,
    HEADS,
    NORM_EPSILON,
    activation,
    rope_types,
    without,
)
from auto_round.export.gguf.family import Assumption, Family, Key, Rule
from auto_round.export.gguf.placement import Placement
from auto_round.export.gguf.settings import Settings


def _kv_heads(s: Settings) -> int:
    """As Transformers' attention counts them: `num_kv_heads` means nothing to the old decoder with one head."""
    if not s.get("new_decoder_architecture") and s.get("multi_query"):
        return 1
    return int(s.get("num_kv_heads", "n_head_kv", default=s.heads))


def qkv_rows(heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """int64 [rows]: all queries, then all keys, then all values, of rows that come group by group as (q ..., k, v)."""
    rows = torch.arange((heads + 2 * kv_heads) * head_dim).view(kv_heads, -1, head_dim)
    return torch.cat([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


def _joined(s: Settings, found: re.Match[str]) -> list[Placement]:
    rows = qkv_rows(s.heads, _kv_heads(s), s.hidden // s.heads)
    return [Placement(f"blk.{found['block']}.attn_qkv.{found['leaf']}", rows)]


def _base(s: Settings) -> float | None:
    theta = float(s.rope.get("rope_theta", 10000.0))
    return None if theta == 10000.0 else theta


FALCON = Family(
    "falcon", ("falcon", "RefinedWeb", "RefinedWebModel"),
    (
        BLOCKS, EMBEDDING, HEADS,
        Key("context_length", "uint32", lambda s: s.get("max_position_embeddings", default=2048)),
        Key("attention.head_count_kv", "uint32", _kv_heads), NORM_EPSILON,
        Key("feed_forward_length", "uint32", lambda s: s.get("ffn_hidden_size", default=4 * s.hidden)),
        Key("tensor_data_layout", "string", lambda s: "jploski"),  # names the order of rows above
        Key("rope.freq_base", "float32", _base),
    ),
    (Rule(r"transformer\.h\.(?P<block>\d+)\.self_attention\.query_key_value\.(?P<leaf>weight|bias)", _joined),),
    assumes=(
        activation("gelu"), rope_types("default"), without("alibi", "bias"),
        Assumption(
            lambda s: s.get("new_decoder_architecture") or s.get("parallel_attn", default=True),
            "llama.cpp runs attention and feed-forward layers side by side, and this model one after the other",
        ),
    ),
)  # fmt: skip
