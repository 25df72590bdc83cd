"""Keys, tensor rules and assumptions that several families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from auto_round.gguf.family import Assumption, HfConfig, Key, Placement, Rule


def scaling(kinds: Sequence[str], *names: str) -> Callable[[HfConfig], Any]:
    """The first of these rotary settings that has a value, where the type of scaling is one of `kinds`."""
    return lambda s: HfConfig(s.rope).get(*names) if s.rope["rope_type"] in kinds else None


CONTEXT = Key("context_length", "uint32", ("max_position_embeddings", "n_ctx", "n_positions"))
EMBEDDING = Key("embedding_length", "uint32", ("hidden_size", "n_embd"))
BLOCKS = Key("block_count", "uint32", lambda s: s.blocks)
FEED_FORWARD = Key("feed_forward_length", "uint32", "intermediate_size")
HEADS = Key("attention.head_count", "uint32", lambda s: s.heads)
KV_HEADS = Key("attention.head_count_kv", "uint32", lambda s: s.kv_heads)
SIZES = (BLOCKS, CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS)
HEAD_DIM = (Key("attention.key_length", "uint32", "head_dim"), Key("attention.value_length", "uint32", "head_dim"))
RMS_EPSILON = Key("attention.layer_norm_rms_epsilon", "float32", "rms_norm_eps")
NORM_EPSILON = Key("attention.layer_norm_epsilon", "float32", ("layer_norm_eps", "layer_norm_epsilon"))
ROPE_BASE = Key("rope.freq_base", "float32", lambda s: s.rope.get("rope_theta"))
SLIDING_ROPE_BASE = Key("rope.freq_base_swa", "float32", lambda s: s.sliding_theta)
_SCALINGS = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
ROPE_SCALING = (
    Key("rope.scaling.type", "string", lambda s: _SCALINGS.get(s.rope["rope_type"])),
    Key("rope.scaling.factor", "float32", scaling(("linear", "yarn"), "factor")),
    Key(
        "rope.scaling.original_context_length", "uint32",
        lambda s: (s.rope.get("original_max_position_embeddings") or s.get("max_position_embeddings"))
        if s.rope["rope_type"] == "yarn" else None,
    ),
    Key("rope.scaling.yarn_ext_factor", "float32", scaling(("yarn",), "extrapolation_factor")),
    Key("rope.scaling.yarn_attn_factor", "float32", scaling(("yarn",), "attention_factor", "attn_factor")),
    Key("rope.scaling.yarn_beta_fast", "float32", scaling(("yarn",), "beta_fast")),
    Key("rope.scaling.yarn_beta_slow", "float32", scaling(("yarn",), "beta_slow")),
)  # fmt: skip
GATING = {"softmax": 1, "sigmoid": 2}
EXPERTS = (
    Key("expert_count", "uint32", ("num_local_experts", "num_experts", "n_routed_experts")),
    Key("expert_used_count", "uint32", "num_experts_per_tok"),
    Key("expert_group_count", "uint32", "n_group"),
    Key("expert_group_used_count", "uint32", "topk_group"),
    Key("expert_gating_func", "uint32", lambda s: GATING.get(s.get("scoring_func", default=""))),
)
EXPERT_WIDTH = Key("expert_feed_forward_length", "uint32", "moe_intermediate_size")
SLIDING_WINDOW = Key("attention.sliding_window", "uint32", "sliding_window")
VOCABULARY = Key("vocab_size", "uint32", "vocab_size")
ROPE_DIMENSIONS = Key("rope.dimension_count", "uint32", lambda s: s.head_dim)

# Keys of a decoder with RMS norms and rotary embeddings.
DECODER = (*SIZES, *ROPE_SCALING, ROPE_BASE, SLIDING_ROPE_BASE, RMS_EPSILON, *EXPERTS, *HEAD_DIM)


def rotary_rows(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: rows of a query or key projection with the halves of each head interleaved, as llama.cpp's."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rotary() -> tuple[Rule, ...]:
    """Rules that permute the rows of `q_proj` and `k_proj`, weights and biases."""

    def place(s: HfConfig, found: re.Match[str]) -> list[Placement]:
        heads = s.heads if found["part"] == "q" else s.kv_heads
        rows = rotary_rows(heads * s.head_dim, heads)
        return [Placement(f"blk.{found['block']}.attn_{found['part']}.{found['leaf']}", rows)]

    return (Rule(r"model\.layers\.(?P<block>\d+)\.self_attn\.(?P<part>[qk])_proj\.(?P<leaf>weight|bias)", place),)


def activation(*names: str) -> Assumption:
    """The feed-forward layers' activation function is one of `names`."""
    keys = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return Assumption(
        lambda s: s.get(*keys, default=names[0]) in names,
        f"llama.cpp runs this architecture with the activation function {names[0]}, and this model has another",
    )


def rope_types(*names: str) -> Assumption:
    """The rotary scaling is one of `names`."""
    return Assumption(
        lambda s: s.rope["rope_type"] in names,
        "llama.cpp does not support the scaling of its rotary embeddings for this architecture, only "
        + ", ".join(names),
    )


def without(*keys: str) -> Assumption:
    """None of these settings is enabled."""
    return Assumption(lambda s: not any(s.get(k) for k in keys), f"llama.cpp does not support {' or '.join(keys)}")


SILU = activation("silu", "swish")
ORDINARY_ROPE = rope_types("default", "linear", "yarn")
WHOLE_ROTATION = Assumption(
    lambda s: float(s.rope.get("partial_rotary_factor", 1.0)) == 1.0,
    "only a part of each head is rotated, and llama.cpp would rotate all of it",
)
