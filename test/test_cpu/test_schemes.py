from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from auto_round.errors import ConfigError
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme, is_preset_scheme, parse_scheme, preset_name_to_scheme

# From the guide: bits, group size, symmetric, data type.
WEIGHT_ONLY = {
    "W2A16": (2, 128), "W3A16": (3, 128), "W4A16": (4, 128), "W5A16": (5, 128), "W6A16": (6, 128), "W8A16": (8, 128),
    "W2A16G64": (2, 64), "W2A16G32": (2, 32),
}  # fmt: skip
# bits, group size, data type, then for activations: bits, group size, data type, dynamic.
WITH_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "MXFP4": (4, 32, "mx_fp", 4, 32, "mx_fp", True),
    "MXFP8": (8, 32, "mx_fp", 8, 32, "mx_fp", True),
    "MXFP4_RCEIL": (4, 32, "mx_fp", 4, 32, "mx_fp_rceil", True),
    "MXFP8_RCEIL": (8, 32, "mx_fp", 8, 32, "mx_fp_rceil", True),
    "MXINT4": (4, 32, "mx_int", 4, 32, "mx_int", True),
    "NVFP4": (4, 16, "nv_fp", 4, 16, "nv_fp4_with_static_gs", True),
    "FP8_STATIC": (8, -1, "fp", 8, 0, "fp", False),
    "FP8_BLOCK": (8, (128, 128), "fp", 8, 128, "fp", True),
    "INT8": (8, -1, "int", 8, -1, "int", True),
    "INT4": (4, -1, "int", 4, -1, "int", True),
}
GGUF = {
    "Q4_0": (4, 32, True, None), "Q5_0": (5, 32, True, None), "Q8_0": (8, 32, True, None), "Q4_1": (4, 32, False, None),
    "Q5_1": (5, 32, False, None), "Q2_K_S": (2, 16, False, 4), "Q3_K_S": (3, 16, True, 6), "Q3_K_M": (3, 16, True, 6),
    "Q3_K_L": (3, 16, True, 6), "Q4_K_S": (4, 32, False, 6), "Q4_K_M": (4, 32, False, 6), "Q5_K_S": (5, 32, False, 6),
    "Q5_K_M": (5, 32, False, 6), "Q6_K": (6, 16, True, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_presets(name: str) -> None:
    scheme = PRESET_SCHEMES[name]
    assert (scheme.bits, scheme.group_size) == WEIGHT_ONLY[name]
    assert scheme.sym and scheme.data_type == "int" and scheme.act_bits == 16
    assert scheme.quantizes_weights and not scheme.quantizes_activations


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
def test_presets_that_quantize_activations(name: str) -> None:
    s = PRESET_SCHEMES[name]
    found = (s.bits, s.group_size, s.data_type, s.act_bits, s.act_group_size, s.act_data_type, s.act_dynamic)
    assert found == WITH_ACTIVATIONS[name] and s.sym and s.quantizes_activations


@pytest.mark.parametrize("name", GGUF)
def test_gguf_presets(name: str) -> None:
    s = PRESET_SCHEMES[f"GGUF:{name}"]
    assert (s.bits, s.group_size, s.sym, s.super_bits) == GGUF[name]


def test_full_precision_presets() -> None:
    assert not PRESET_SCHEMES["BF16"].quantizes_weights
    assert PRESET_SCHEMES["FPW8A16"].group_size == 0 and not PRESET_SCHEMES["FPW8A16"].quantizes_activations


@pytest.mark.parametrize("name", ["w4a16", " W4A16 ", "W4a16", "'W4A16'", "gguf:q4_k_m", "fp8-block"])
def test_names_are_read_in_any_case(name: str) -> None:
    assert is_preset_scheme(name)
    assert parse_scheme(name) is preset_name_to_scheme(name)


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'W4A61'; did you mean 'W4A16'"):
        parse_scheme("W4A61")
    assert not is_preset_scheme("W4A61")


def test_fields_by_name_and_overrides() -> None:
    scheme = parse_scheme({"bits": 3, "group_size": 64, "sym": False})
    assert scheme == QuantizationScheme(bits=3, group_size=64, sym=False)
    assert scheme.with_overrides({"bits": 8, "sym": None}) == QuantizationScheme(bits=8, group_size=64, sym=False)
    assert dict(scheme.items())["bits"] == scheme["bits"] == scheme.get("bits") == 3
    assert QuantizationScheme.from_dict(scheme.to_dict()) == scheme
    with pytest.raises(ConfigError, match="'group_siez'; did you mean 'group_size'"):
        parse_scheme({"group_siez": 3})
    with pytest.raises(KeyError):
        scheme["nothing"]
    with pytest.raises(FrozenInstanceError):
        scheme.bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 0}, {"bits": 4.5}, {"bits": True}, {"bits": "4"}, {"group_size": -2}, {"group_size": 1.5},
        {"group_size": (1, 2, 3)}, {"group_size": (0, 4)}, {"group_size": True},
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QuantizationScheme(**values)


@pytest.mark.parametrize("value", [3, None, ["W4A16"], 4.0])
def test_what_is_no_scheme_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="preset name"):
        parse_scheme(value)


def test_spellings_of_data_types() -> None:
    assert QuantizationScheme(data_type="MXFP").data_type == "mx_fp"
    both = QuantizationScheme(data_type="mxfp8", act_bits=4, act_data_type="MXFP8_rceil")
    assert (both.data_type, both.bits, both.act_data_type, both.act_bits) == ("mx_fp", 8, "mx_fp_rceil", 8)
    assert QuantizationScheme(16, data_type="nvfp4", act_bits=16, act_data_type="fp8").bits == 16
    assert QuantizationScheme(data_type="nvfp4").to_dict()["data_type"] == "nv_fp"
    assert QuantizationScheme(group_size=[128, 64]).group_size == (128, 64)  # type: ignore[arg-type]


def test_a_scheme_in_words() -> None:
    assert PRESET_SCHEMES["W4A16"].describe() == "int4 g128 sym"
    assert QuantizationScheme(4, -1, False).describe() == "int4 per channel asym"
    assert QuantizationScheme(8, 0).describe() == "int8 per tensor sym"
    assert PRESET_SCHEMES["FP8_BLOCK"].describe() == "fp8 g128x128 sym, fp8 activations"
    assert PRESET_SCHEMES["BF16"].describe() == "full precision"


def test_presets_are_names_of_the_module() -> None:
    from auto_round import schemes
    from auto_round.schemes import W4A16

    assert W4A16 is schemes.PRESET_SCHEMES["W4A16"] and schemes.MXFP8.bits == 8
    with pytest.raises(AttributeError, match="no attribute 'W17A16'"):
        schemes.W17A16  # noqa: B018
