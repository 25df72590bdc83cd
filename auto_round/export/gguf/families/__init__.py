"""The families of models that can be converted, one small file each."""

from __future__ import annotations

from auto_round.errors import ModelError, UnsupportedError, nearest
from auto_round.export.gguf.families import deepseek, falcon, gemma, gpt2, granite, llama, olmo2, phi3, qwen, smollm
from auto_round.export.gguf.families import stablelm as stable
from auto_round.export.gguf.family import Family
from auto_round.export.gguf.settings import Settings

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA, llama.MISTRAL, llama.MIXTRAL, smollm.SMOLLM3, qwen.QWEN2, qwen.QWEN2_MOE, qwen.QWEN3, qwen.QWEN3_MOE,
    gemma.GEMMA2, gemma.GEMMA3, phi3.PHI3, olmo2.OLMO2, gpt2.GPT2, falcon.FALCON, stable.STABLELM, granite.GRANITE,
    granite.GRANITE_MOE, deepseek.DEEPSEEK_V2, deepseek.DEEPSEEK_V3,
)  # fmt: skip
_BY_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def supported_families() -> list[str]:
    """Model types that can be converted, sorted."""
    return sorted(_BY_TYPE)


def family_of(settings: Settings) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: the type is not known, or llama.cpp's architecture is not quite this model.
    """
    kind = settings.model_type
    if kind not in _BY_TYPE:
        hint = nearest(kind, _BY_TYPE)
        raise UnsupportedError(
            f"models of type {kind!r} cannot be written as GGUF{hint} Types that can: {', '.join(supported_families())}"
        )
    family = _BY_TYPE[kind]
    for assumption in family.assumes:
        if not assumption.holds(settings):
            raise UnsupportedError(f"this {kind} model cannot be written as GGUF: {assumption.otherwise}")
    if settings.blocks < 1 or settings.hidden < 1:
        raise ModelError(f"config.json of type {kind!r} has no layers or no width")
    return family
