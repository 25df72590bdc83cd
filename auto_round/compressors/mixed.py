"""Presets of more than one width: which layer of a model gets which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from auto_round.modeling.config_values import read_value
from auto_round.modeling.fused import is_routed_expert
from auto_round.schemes import MixedPreset, QuantizationScheme

_TOWERS = ("vision_config", "audio_config")


def mixed_defaults(
    mixed: MixedPreset | None, scheme: QuantizationScheme, names: Iterable[str], config: Any
) -> dict[str, QuantizationScheme]:
    """The default scheme of every layer that does not simply get `scheme`.

    Args:
        mixed: the mixture, None when there is none.
        scheme: what routed experts get; the others differ from it in their bits alone.
        names: of all linear layers.
        config: the model's, which says whether it reads more than text.
    """
    if mixed is None:
        return {}
    multimodal = any(read_value(config, tower) is not None for tower in _TOWERS)
    other = scheme.with_overrides({"bits": mixed.multimodal_other_bits if multimodal else mixed.other_bits})
    return {name: other for name in names if not is_routed_expert(name)}
