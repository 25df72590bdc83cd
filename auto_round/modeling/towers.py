"""Models that read images or sound beside text, of which Transformers' causal class is the text part alone.

Qwen3.5, Llama 4, Mllama and others: `AutoModelForCausalLM` builds a class without the tower, which drops its tensors
without a word, while config.json goes on promising them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from auto_round.errors import UnsupportedError

# Modules beside the language model; "vq" are image tokenizers.
_TOWER = re.compile(
    r"(?:^|\.)(?:\w*(?:vision|visual|image|video|audio|speech|sound)\w*|vqmodel|vq_model|multi_modal_projector"
    r"|mm_projector|multimodal_projector)\."
)
_PARTS = ("vision_config", "audio_config", "vq_config", "vision_tower_config", "speech_config", "sound_config")
MODEL_FREE = (
    "leave tuning out and use model-free mode, which keeps all its tensors and rounds the language layers: "
    "model_free=True (--model_free)"
)


def tower_tensors(names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that belong to what reads images or sound."""
    return [name for name in names if _TOWER.search(name)]


def reads_more_than_text(config: Any) -> bool:
    """Whether a configuration describes a part that reads images or sound."""
    return any(getattr(config, part, None) is not None for part in _PARTS)


def check_towers(config: Any, names: Iterable[str], model: str) -> None:
    """Refuse a checkpoint whose vision or audio part the causal class of its family would drop.

    A text-only checkpoint of such a family passes.

    Args:
        names: of the checkpoint's tensors.
        model: for messages.

    Raises UnsupportedError.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    named = tuple(getattr(config, "architectures", None) or ())
    if not reads_more_than_text(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = [kind.__name__ for kind in (found if isinstance(found, (tuple, list)) else (found,))]
    if any(name in classes for name in named):
        return
    lost = tower_tensors(names)
    if lost:
        what = f"config.json names {named[0]}" if named else "config.json names no class"
        raise UnsupportedError(
            f"{model} reads more than text: {what}, and {classes[0]}, which is tuned, has no place for {len(lost)} of "
            f"its tensors, such as {lost[0]}; {MODEL_FREE}"
        )
