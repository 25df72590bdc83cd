"""Gemma 2 and 3, text only: norms store the difference from one; sliding-window and full attention layers alternate."""

from __future__ import annotations

from auto_round.gguf.families.shared import (
    HEAD_DIM,
    RMS_EPSILON,
    ROPE_BASE,
    ROPE_SCALING,
    SIZES,
    SLIDING_ROPE_BASE,
    SLIDING_WINDOW,
    WHOLE_ROTATION,
    activation,
    add_one,
    rope_types,
    window_pattern,
    without,
)
from auto_round.gguf.family import Assumption, Family, HfConfig, Key, Placement, Rule

_KEYS = (*SIZES, RMS_EPSILON, *HEAD_DIM, SLIDING_WINDOW)
_SOFTCAPS = (
    Key("attn_logit_softcapping", "float32", "attn_logit_softcapping"),
    Key("final_logit_softcapping", "float32", "final_logit_softcapping"),
)
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_RULES = (
    Rule(
        r"model\.layers\.(?P<block>\d+)\.(?P<norm>(self_attn\.)?\w*norm)\.weight",
        lambda s, m: [Placement(f"blk.{m['block']}.{_NORMS[m['norm']]}.weight", edit=add_one)],
    ),
    Rule(r"model\.norm\.weight", lambda s, m: [Placement("output_norm.weight", edit=add_one)]),
)


def _attention_scale(largest: int) -> Assumption:
    """Attention scores are scaled by the head size, or by hidden / heads in the model of `largest` layers."""

    def holds(s: HfConfig) -> bool:
        wanted = s.hidden // s.heads if s.blocks == largest else s.head_dim
        return s.get("query_pre_attn_scalar", default=wanted) == wanted

    return Assumption(holds, "llama.cpp supports only the usual query_pre_attn_scalar of this architecture")


_TIED = Assumption(lambda s: s.tied, "llama.cpp uses Gemma's embedding as its head, and this model has a separate head")
_SHARED = (activation("gelu_pytorch_tanh"), WHOLE_ROTATION, _TIED, without("use_bidirectional_attention"))

GEMMA2 = Family(
    "gemma2", ("gemma2",), (*_KEYS, *_SOFTCAPS, window_pattern(2)), _RULES,
    assumes=(*_SHARED, _attention_scale(46), rope_types("default"), Assumption(
        lambda s: float(s.rope.get("rope_theta", 10000.0)) == 10000.0,
        "llama.cpp's base of Gemma 2's rotary embeddings is 10000",
    )),
)  # fmt: skip
GEMMA3 = Family(
    "gemma3", ("gemma3_text",),
    (
        *_KEYS, *ROPE_SCALING, ROPE_BASE, SLIDING_ROPE_BASE,
        _SOFTCAPS[1], window_pattern(6),
    ),
    _RULES,
    assumes=(*_SHARED, _attention_scale(62), rope_types("default", "linear"), without("attn_logit_softcapping")),
)  # fmt: skip
