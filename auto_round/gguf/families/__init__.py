"""All model families that can be written as GGUF: the built-in ones, `register_family`, and `find_family`."""

from __future__ import annotations

from auto_round.errors import ConfigError, ModelError, UnsupportedError, nearest
from auto_round.gguf.families import deepseek, gemma, layer_norm, llama, qwen_olmo_phi
from auto_round.gguf.family import Family, HfConfig

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA,
    llama.MISTRAL,
    llama.MIXTRAL,
    llama.SMOLLM3,
    qwen_olmo_phi.QWEN2,
    qwen_olmo_phi.QWEN2_MOE,
    qwen_olmo_phi.QWEN3,
    qwen_olmo_phi.QWEN3_MOE,
    gemma.GEMMA2,
    gemma.GEMMA3,
    qwen_olmo_phi.PHI3,
    qwen_olmo_phi.OLMO2,
    layer_norm.GPT2,
    layer_norm.FALCON,
    layer_norm.STABLELM,
    llama.GRANITE,
    llama.GRANITE_MOE,
    deepseek.DEEPSEEK_V2,
    deepseek.DEEPSEEK_V3,
)
_BY_TYPE: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make the models of `family.model_types` writable as GGUF. Returns the family.

    Raises:
        ConfigError: a model type belongs to another family.
    """
    taken = [name for name in family.model_types if _BY_TYPE.get(name, family) != family]
    if taken:
        raise ConfigError(
            f"GGUF family {family.arch!r}: model type {taken[0]!r} belongs to family {_BY_TYPE[taken[0]].arch!r}"
        )
    _BY_TYPE.update(dict.fromkeys(family.model_types, family))
    return family


for _family in FAMILIES:
    register_family(_family)


def supported_families() -> list[str]:
    """Model types that can be converted, sorted."""
    return sorted(_BY_TYPE)


def find_family(settings: HfConfig) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: the type is unknown, or the model violates an assumption of llama.cpp's architecture.
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
