"""Granite 3: Llama with four multipliers, and its mixtures of experts, whose gate and up projections are joined."""

from __future__ import annotations

import re

from auto_round.export.gguf.families.llama import KEYS, ROPE, llama3_factors
from auto_round.export.gguf.families.shared import SILU, WHOLE_ROTATION, half_rows, rotary
from auto_round.export.gguf.family import Assumption, Family, Key, Rule
from auto_round.export.gguf.placement import Placement
from auto_round.export.gguf.settings import Settings

_KEYS = (
    *(key for key in KEYS if key.name not in ("attention.key_length", "attention.value_length")),
    Key("attention.scale", "float32", "attention_multiplier"),
    Key("embedding_scale", "float32", "embedding_multiplier"),
    Key("residual_scale", "float32", "residual_multiplier"),
    Key("logit_scale", "float32", "logits_scaling"),
)
_NARROW = Assumption(
    lambda s: s.head_dim == s.hidden // s.heads,
    "llama.cpp takes Granite's heads to be hidden_size / num_attention_heads wide",
)
_ASSUMES = (SILU, ROPE, WHOLE_ROTATION, _NARROW)


def _shared_mlp(s: Settings, found: re.Match[str]) -> list[Placement]:
    """The feed-forward layers beside the experts, or instead of them in a model without."""
    front, end = f"blk.{found['block']}.ffn_", "_shexp.weight" if s.experts else ".weight"
    if found["part"] == "output":
        return [Placement(f"{front}down{end}")]
    width = int(s.need("shared_intermediate_size"))
    return [half_rows(f"{front}gate{end}", width, False), half_rows(f"{front}up{end}", width, True)]


GRANITE = Family("granite", ("granite",), _KEYS, rotary(), assumes=_ASSUMES, extras=llama3_factors)
GRANITE_MOE = Family(
    "granitemoe", ("granitemoe", "granitemoeshared"),
    (*_KEYS, Key("expert_shared_feed_forward_length", "uint32", "shared_intermediate_size")),
    (
        *rotary(),
        Rule(r"model\.layers\.(?P<block>\d+)\.shared_mlp\.(?P<part>input|output)_linear\.weight", _shared_mlp),
    ),
    renames=((r"\.router\.weight$", ".router.layer.weight"),),
    assumes=_ASSUMES, extras=llama3_factors,
)  # fmt: skip
