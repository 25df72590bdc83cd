"""The model families that can be written as GGUF: the constants of this folder's modules, and those of plugins."""

from __future__ import annotations

from auto_round.errors import ModelError, UnsupportedError, nearest
from auto_round.gguf.families import deepseek, layer_norm, rms_norm
from auto_round.gguf.family import FAMILIES, Family, HfConfig, register_family

for _module in (deepseek, layer_norm, rms_norm):
    for _value in vars(_module).values():
        if isinstance(_value, Family):
            register_family(_value)


def find_family(settings: HfConfig) -> Family:
    """The family of a model.

    Raises UnsupportedError when the type is unknown, or the model violates an assumption of llama.cpp's architecture.
    """
    kind = settings.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"models of type {kind!r} cannot be written as GGUF{nearest(kind, FAMILIES)} Types that can: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    for assumption in FAMILIES[kind].assumes:
        if not assumption.holds(settings):
            raise UnsupportedError(f"this {kind} model cannot be written as GGUF: {assumption.otherwise}")
    if settings.blocks < 1 or settings.hidden < 1:
        raise ModelError(f"config.json of type {kind!r} has no layers or no width")
    return FAMILIES[kind]
