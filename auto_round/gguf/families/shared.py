"""Keys, tensor rules and assumptions that several families share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from auto_round.gguf.family import Assumption, HfConfig, Key, Placement, Rule

_GATING = {"softmax": 1, "sigmoid": 2}


def _rope(name: str, *kinds: str) -> Callable[[HfConfig], Any]:
    """A value of the rotary settings, when their type is one of `kinds` (any type when none is given)."""
    return lambda s: s.rope.get(name) if not kinds or s.rope["rope_type"] in kinds else None


def rope_type(s: HfConfig) -> str | None:
    """llama.cpp's name of the rotary scaling, or None."""
    names = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
    return names.get(s.rope["rope_type"])


def _original_context(s: HfConfig) -> int | None:
    if s.rope["rope_type"] != "yarn":
        return None
    return s.rope.get("original_max_position_embeddings") or s.get("max_position_embeddings")


def _yarn_attention(s: HfConfig) -> float | None:
    found = s.rope if s.rope["rope_type"] == "yarn" else {}
    return found.get("attention_factor", found.get("attn_factor"))


CONTEXT = Key("context_length", "uint32", ("max_position_embeddings", "n_ctx", "n_positions"))
EMBEDDING = Key("embedding_length", "uint32", ("hidden_size", "n_embd"))
BLOCKS = Key("block_count", "uint32", lambda s: s.blocks)
FEED_FORWARD = Key("feed_forward_length", "uint32", "intermediate_size")
HEADS = Key("attention.head_count", "uint32", lambda s: s.heads)
KV_HEADS = Key("attention.head_count_kv", "uint32", lambda s: s.kv_heads)
SIZES = (BLOCKS, CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS)
HEAD_DIM = (
    Key("attention.key_length", "uint32", "head_dim"),
    Key("attention.value_length", "uint32", "head_dim"),
)
RMS_EPSILON = Key("attention.layer_norm_rms_epsilon", "float32", "rms_norm_eps")
NORM_EPSILON = Key("attention.layer_norm_epsilon", "float32", ("layer_norm_eps", "layer_norm_epsilon"))
ROPE_BASE = Key("rope.freq_base", "float32", _rope("rope_theta"))
SLIDING_ROPE_BASE = Key("rope.freq_base_swa", "float32", lambda s: s.sliding_theta)
ROPE_SCALING = (
    Key("rope.scaling.type", "string", rope_type),
    Key("rope.scaling.factor", "float32", _rope("factor", "linear", "yarn")),
    Key("rope.scaling.original_context_length", "uint32", _original_context),
    Key("rope.scaling.yarn_ext_factor", "float32", _rope("extrapolation_factor", "yarn")),
    Key("rope.scaling.yarn_attn_factor", "float32", _yarn_attention),
    Key("rope.scaling.yarn_beta_fast", "float32", _rope("beta_fast", "yarn")),
    Key("rope.scaling.yarn_beta_slow", "float32", _rope("beta_slow", "yarn")),
)
EXPERTS = (
    Key("expert_count", "uint32", ("num_local_experts", "num_experts", "n_routed_experts")),
    Key("expert_used_count", "uint32", "num_experts_per_tok"),
    Key("expert_group_count", "uint32", "n_group"),
    Key("expert_group_used_count", "uint32", "topk_group"),
    Key("expert_gating_func", "uint32", lambda s: _GATING.get(s.get("scoring_func", default=""))),
)
EXPERT_WIDTH = Key("expert_feed_forward_length", "uint32", "moe_intermediate_size")
SLIDING_WINDOW = Key("attention.sliding_window", "uint32", "sliding_window")
VOCABULARY = Key("vocab_size", "uint32", "vocab_size")
ROPE_DIMENSIONS = Key("rope.dimension_count", "uint32", lambda s: s.head_dim)

# Keys of a decoder with RMS norms and rotary embeddings.
DECODER = (
    *SIZES, *ROPE_SCALING, ROPE_BASE, SLIDING_ROPE_BASE,
    RMS_EPSILON, *EXPERTS, *HEAD_DIM,
)  # fmt: skip


def rotary_rows(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: the rows of a query or key projection with each head's two halves interleaved.

    Transformers rotates dimensions i and i + half of a head together; llama.cpp, in some architectures, 2i and 2i + 1.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rotary(q: str = "attn_q", k: str = "attn_k") -> tuple[Rule, ...]:
    """Rules that permute the rows of `q_proj` and `k_proj`, weights and biases."""

    def place(s: HfConfig, found: re.Match[str]) -> list[Placement]:
        heads, name = (s.heads, q) if found["part"] == "q" else (s.kv_heads, k)
        return [Placement(f"blk.{found['block']}.{name}.{found['leaf']}", rotary_rows(heads * s.head_dim, heads))]

    return (Rule(r"model\.layers\.(?P<block>\d+)\.self_attn\.(?P<part>[qk])_proj\.(?P<leaf>weight|bias)", place),)


def add_one(weight: torch.Tensor) -> torch.Tensor:
    """Norm weights stored as the difference from one, as factors [n] in float32."""
    return weight.float() + 1


def half_rows(tensor: str, width: int, second: bool) -> Placement:
    """The first or second `width` rows of a fused gate and up projection."""
    return Placement(tensor, torch.arange(width) + (width if second else 0))


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
EVERY_LAYER_ROUTED = Assumption(
    lambda s: not s.get("mlp_only_layers") and s.get("decoder_sparse_step", default=1) == 1,
    "llama.cpp expects experts in every layer of this architecture",
)


def window_pattern(default_every: int) -> Key:
    """Which layers use a sliding window; not written for llama.cpp's default of one full layer in `default_every`."""

    def pattern(s: HfConfig) -> list[bool] | None:
        kinds = s.get("layer_types")
        if not kinds:
            return None
        local = [kind == "sliding_attention" for kind in kinds]
        usual = [(index + 1) % default_every != 0 for index in range(len(local))]
        return None if local == usual else local

    return Key("attention.sliding_window_pattern", "bool", pattern)
