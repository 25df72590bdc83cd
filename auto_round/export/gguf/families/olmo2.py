"""OLMo 2 and 3: norms after attention and feed-forward layers, and over all heads of queries and keys together."""

from __future__ import annotations

from auto_round.export.gguf.families.shared import DECODER, ORDINARY_ROPE, SILU, SLIDING_WINDOW, WHOLE_ROTATION
from auto_round.export.gguf.family import Family, Key
from auto_round.export.gguf.settings import Settings


def _windows(s: Settings) -> list[bool] | None:
    if s.get("sliding_window") is None:
        return None
    kinds = s.get("layer_types")
    return [k == "sliding_attention" for k in kinds] if kinds else [(i + 1) % 4 != 0 for i in range(s.blocks)]


OLMO2 = Family(
    "olmo2", ("olmo2", "olmo3"),
    (*DECODER, SLIDING_WINDOW, Key("attention.sliding_window_pattern", "bool", _windows)),
    assumes=(SILU, ORDINARY_ROPE, WHOLE_ROTATION),
)  # fmt: skip
