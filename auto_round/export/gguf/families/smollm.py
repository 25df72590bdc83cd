"""SmolLM3: Llama without rotation in every fourth layer. (SmolLM2 is a Llama.)"""

from __future__ import annotations

from auto_round.export.gguf.families.llama import KEYS
from auto_round.export.gguf.families.shared import ORDINARY_ROPE, SILU, WHOLE_ROTATION, rotary, without
from auto_round.export.gguf.family import Assumption, Family
from auto_round.export.gguf.settings import Settings


def _every_fourth(s: Settings) -> bool:
    rotated = s.get("no_rope_layers")  # 1 where a layer IS rotated
    return not rotated or [bool(r) for r in rotated] == [(i + 1) % 4 != 0 for i in range(s.blocks)]


SMOLLM3 = Family(
    "smollm3", ("smollm3",), KEYS, rotary(),
    assumes=(
        SILU, ORDINARY_ROPE, WHOLE_ROTATION, without("use_sliding_window"),
        Assumption(_every_fourth, "llama.cpp leaves exactly every fourth layer of SmolLM3 without rotation"),
    ),
)  # fmt: skip
