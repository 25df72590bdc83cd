"""The model families that can be written as GGUF: the constants of this folder's modules, and those of plugins."""

from __future__ import annotations

from auto_round.errors import ModelError, UnsupportedError, nearest
from auto_round.gguf.families import deepseek, gemma, layer_norm, llama, qwen_olmo_phi
from auto_round.gguf.family import FAMILIES, Family, HfConfig, register_family

for _module in (deepseek, gemma, layer_norm, llama, qwen_olmo_phi):
    for _value in vars(_module).values():
        if isinstance(_value, Family):
            register_family(_value)


def supported_families() -> list[str]:
    """Model types that can be converted, sorted."""
    return sorted(FAMILIES)


def find_family(settings: HfConfig) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: the type is unknown, or the model violates an assumption of llama.cpp's architecture.
    """
    kind = settings.model_type
    if kind not in FAMILIES:
        hint = nearest(kind, FAMILIES)
        raise UnsupportedError(
            f"models of type {kind!r} cannot be written as GGUF{hint} Types that can: {', '.join(supported_families())}"
        )
    family = FAMILIES[kind]
    for assumption in family.assumes:
        if not assumption.holds(settings):
            raise UnsupportedError(f"this {kind} model cannot be written as GGUF: {assumption.otherwise}")
    if settings.blocks < 1 or settings.hidden < 1:
        raise ModelError(f"config.json of type {kind!r} has no layers or no width")
    return family
