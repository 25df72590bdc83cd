"""Read a `quantization_config`'s values for layers of small float types: FP8, MXFP, MXINT, NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.codecs.activation import activation_function
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import (
    AUTO_ROUND_FLOATS,
    COMPRESSED_TENSORS_FLOATS,
    FloatLayout,
    float_family_of,
)
from auto_round.schemes import ACTIVATION_KEYS, GroupSize, QuantizationScheme

_COMPRESSED_TENSORS_PACKING = "auto_round:llm_compressor"


def is_float_config(values: Mapping[str, Any]) -> bool:
    """Whether the config's default, or one layer's entry, is of a small float type."""
    return float_family_of(str(values.get("data_type") or "int")) is not None


def normalize_native_fp8(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config of `quant_method` "fp8", translated to AutoRound's keys; a copy of any other.

    Raises UnsupportedError for FP8 models without two-dimensional blocks.
    """
    if str(values.get("quant_method") or "").rpartition(".")[2].lower() != "fp8":
        return dict(values)
    block = values.get("weight_block_size")
    if block is None or str(values.get("activation_scheme") or "dynamic").lower() != "dynamic":
        raise UnsupportedError(
            "the checkpoint is FP8 without two-dimensional blocks, or with static activations; Transformers opens it "
            "by itself"
        )
    usual = {
        "bits": 8, "data_type": "fp", "sym": True, "act_bits": 8, "act_data_type": "fp", "act_sym": True,
        "act_dynamic": True, "act_group_size": block[1],
    }  # fmt: skip
    return usual | {key: value for key, value in values.items() if value is not None}


def float_scheme(values: Mapping[str, Any], where: str) -> QuantizationScheme:
    """The scheme of a layer; `where` names it in messages.

    Raises:
        UnsupportedError: no such layout, or activations that this version cannot quantize.
        ConfigError: malformed values.
    """
    data_type = str(values["data_type"])
    if float_family_of(data_type) == "fp" and values.get("fmt") == "e5m2":
        data_type = "fp8_e5m2"
    acts = {key: values.get(key) for key in ACTIVATION_KEYS}
    if isinstance(acts["act_group_size"], list):
        acts["act_group_size"] = tuple(acts["act_group_size"])
    scheme = QuantizationScheme(
        bits=read_int(values, "bits", 4), group_size=_group_size(values, where), sym=bool(values.get("sym", True)),
        data_type=data_type, **acts,
    )  # fmt: skip
    problem = AUTO_ROUND_FLOATS.problem(scheme)
    if problem is not None:
        raise UnsupportedError(f"{where}: {problem}")
    if scheme.activations is not None:
        activation_function(scheme.activations)
    return scheme


def naming_of(values: Mapping[str, Any]) -> FloatLayout:
    """The tensor names of FP8 layers under a config's `packing_format`."""
    compressed = values.get("packing_format") == _COMPRESSED_TENSORS_PACKING
    return COMPRESSED_TENSORS_FLOATS if compressed else AUTO_ROUND_FLOATS


def scheme_values(scheme: QuantizationScheme, naming: Layout) -> dict[str, Any]:
    """The inverse of `float_scheme` and `naming_of`: the values that a layer's own entry overrides."""
    size = scheme.group_size
    packing = {"packing_format": _COMPRESSED_TENSORS_PACKING} if naming is COMPRESSED_TENSORS_FLOATS else {}
    return {
        "bits": scheme.bits, "sym": scheme.sym, "data_type": scheme.data_type, **packing,
        "group_size": list(size) if isinstance(size, tuple) else size, **{key: scheme[key] for key in ACTIVATION_KEYS},
    }  # fmt: skip


def read_int(values: Mapping[str, Any], key: str, default: int) -> int:
    """The whole number at `key`. Raises ConfigError for anything else."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"quantization_config has {key}={value!r}, which is not a whole number")
    return value


def _group_size(values: Mapping[str, Any], where: str) -> GroupSize:
    """The group size; `weight_strategy` and `weight_block_size` take precedence over the key `group_size`."""
    if values.get("weight_strategy") == "tensor":
        return 0
    size = values.get("weight_block_size") or values.get("group_size", 32)
    if isinstance(size, (list, tuple)):
        if len(size) != 2 or not all(type(part) is int and part > 0 for part in size):
            raise ConfigError(f"{where} has blocks of {size!r}; two positive whole numbers are needed")
        return (size[0], size[1])
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"{where} has group_size={size!r}, which is not a whole number")
    return size
