"""Which layers are quantized, and how, according to AutoRound's, GPTQ's and AWQ's configs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from integer_weights import int_format

from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.inference.config import LayerFormat, read_config, resolve_layers

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate", "mlp.up")
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in PARTS] + ["vision.layers.0.q_proj", "lm_head"]
BLOCKS = ("model.layers.0", "model.layers.1", "model.layers.10")
BASE: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
AUTO = {**BASE, "block_name_to_quantize": "model.layers"}


def resolve(config: dict[str, Any], names: list[str] = NAMES) -> dict[str, LayerFormat]:
    return resolve_layers(read_config(config), names, lambda: BLOCKS)


def test_blocks_only() -> None:
    found = resolve(AUTO)
    assert list(found) == NAMES[:12]
    assert set(found.values()) == {int_format(4, 128, True, "gptq_zp+-1")}
    assert found["model.layers.0.mlp.up"].packing == "gptq_zp+-1"


@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names", "quant_block_list"])
@pytest.mark.parametrize("value", ["model.layers.1", ["model.layers.1"], [["model.layers.1"]], "model.layers.1, v.x"])
def test_ways_to_name_blocks(key: str, value: Any) -> None:
    assert list(resolve({**BASE, key: value})) == [n for n in NAMES if n.startswith("model.layers.1.")]


def test_exact_names_win_over_patterns() -> None:
    extra = {
        ".*k_proj.*": {"bits": 8}, "model.layers.1.self_attn.k_proj": {"bits": 2, "group_size": 32, "sym": None},
        "model.layers.0.mlp.gate": {"bits": 16}, "lm_head": {"bits": 8, "group_size": 64, "super_bits": None},
    }  # fmt: skip
    found = resolve({**AUTO, "extra_config": extra})
    assert found["model.layers.0.self_attn.k_proj"] == int_format(8, 128, True, "gptq_zp+-1")
    assert found["model.layers.1.self_attn.k_proj"] == int_format(2, 32, True, "gptq_zp+-1")
    assert found["lm_head"] == int_format(8, 64, True, "gptq_zp+-1")
    assert "model.layers.0.mlp.gate" not in found and "model.layers.1.mlp.gate" in found


def test_a_plain_name_is_no_pattern() -> None:
    """`model.layers.1.mlp.up` must not reach layer 10, nor a pattern reach outside the blocks."""
    found = resolve({**AUTO, "extra_config": {"model.layers.1.mlp.up": {"bits": 2}, ".*q_proj": {"bits": 8}}})
    assert found["model.layers.10.mlp.up"].scheme.bits == 4 and found["model.layers.1.mlp.up"].scheme.bits == 2
    assert "vision.layers.0.q_proj" not in found


def test_a_part_of_a_name_means_all_layers_that_it_is_segments_of() -> None:
    extra = {"k_proj": {"bits": 8}, "layers.1.mlp": {"bits": 2}, "proj": {"bits": 3}, "lm": {"bits": 8}}
    found = resolve({**AUTO, "extra_config": extra})
    assert found["model.layers.0.self_attn.k_proj"].scheme.bits == 8 and found["model.layers.1.mlp.up"].scheme.bits == 2
    assert found["model.layers.10.mlp.up"].scheme.bits == 4 and "lm_head" not in found


def test_wrapper_prefixes_may_differ() -> None:
    config = {**AUTO, "block_name_to_quantize": "model.language_model.layers"}
    found = resolve({**config, "extra_config": {"model.language_model.layers.0.mlp.up": {"bits": 16}}})
    assert "model.layers.0.mlp.up" not in found and len(found) == 11


def test_a_layer_with_another_packing() -> None:
    extra = {"model.layers.0.mlp.up": {"sym": False, "packing_format": "auto_round:auto_awq"}}
    found = resolve({**AUTO, "extra_config": extra})
    assert found["model.layers.0.mlp.up"] == int_format(4, 128, False, "awq")


@pytest.mark.parametrize(("packing_format", "packing"), [
    ("auto_round", "gptq"), ("auto_round:gptqmodel", "gptq"), ("auto_round:auto_gptq", "gptq_zp+-1"),
    ("auto_round:gptq", "gptq_zp+-1"), ("auto_round:auto_awq", "awq"), ("auto_round:awq", "awq"), (None, "gptq_zp+-1"),
])  # fmt: skip
def test_packings(packing_format: str | None, packing: str) -> None:
    assert read_config({**AUTO, "packing_format": packing_format}).default.packing == packing


GPTQ = {**BASE, "desc_act": False, "packing_format": "auto_round:gptq"}


def test_gptq_uses_the_models_blocks_and_the_head_only_when_said() -> None:
    assert list(resolve(GPTQ)) == NAMES[:12]
    assert list(resolve({**GPTQ, "lm_head": True})) == [*NAMES[:12], "lm_head"]
    assert read_config({**GPTQ, "checkpoint_format": "gptq_v2"}).default.packing == "gptq"
    assert read_config(GPTQ).g_idx and not read_config(AUTO).g_idx


def test_gptq_modules_in_block() -> None:
    found = resolve({**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up"]]})
    assert list(found) == [n for n in NAMES[:12] if not n.endswith("gate")]


def test_gptq_dynamic() -> None:
    dynamic = {r"-:.*mlp\.gate": {}, r"+:.*\.1\..*k_proj": {"bits": 8, "group_size": 32}, r".*10\..*up": {"sym": False}}
    found = resolve({**GPTQ, "dynamic": dynamic})
    assert not any(n.endswith("gate") for n in found)
    assert found["model.layers.1.self_attn.k_proj"] == int_format(8, 32, True, "gptq_zp+-1")
    assert found["model.layers.10.self_attn.k_proj"].scheme.bits == 4 and not found["model.layers.10.mlp.up"].scheme.sym


def test_awq_converts_all_but_the_named() -> None:
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
        "packing_format": "auto_round:awq", "modules_to_not_convert": ["vision", "gate", "lm_head"],
    }  # fmt: skip
    assert list(resolve(config)) == [n for n in NAMES[:12] if not n.endswith("gate")]
    found = resolve({**config, "modules_to_not_convert": None})
    assert list(found) == NAMES  # the loader itself leaves the output head out
    assert list(resolve({**config, "to_quant_block_names": "model.layers.1"})) == [
        n for n in NAMES if n.startswith("model.layers.1.") and not n.endswith("gate")
    ]


def test_objects_are_read_like_mappings() -> None:
    assert vars(read_config(SimpleNamespace(**AUTO))) == vars(read_config(AUTO))


def test_transformers_own_object() -> None:
    from transformers import AutoRoundConfig

    config = AutoRoundConfig.from_dict({**AUTO, "packing_format": "auto_round"})
    assert read_config(config).default == int_format(4, 128, True, "gptq")


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"bits": "4"}, ConfigError, "bits='4'"),
    ({"bits": 5}, UnsupportedError, "5-bit"),
    ({"group_size": [128, 128]}, UnsupportedError, "group_size"),
    ({"packing_format": "marlin"}, UnsupportedError, "marlin"),
    ({"packing_format": "mlx", "bits": 7}, UnsupportedError, "7-bit"),
    ({"data_type": "fp"}, UnsupportedError, "fp"),
    ({"extra_config": {"model.layers.0.mlp.up": {"bits": 4, "act_bits": 4}}}, UnsupportedError, "layers.0.mlp.up"),
    ({"spinquant_config": {"r1": True}}, UnsupportedError, "spinquant_config"),
    ({"block_name_to_quantize": 5}, ConfigError, "module names"),
])  # fmt: skip
def test_what_is_refused(change: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        resolve({**AUTO, **change})


def test_mlx_layers_may_have_5_and_6_bits() -> None:
    config = {**AUTO, "packing_format": "mlx", "bits": 5, "extra_config": {"model.layers.0.q": {"bits": 6}}}
    default = read_config(config).default
    assert (default.scheme.bits, default.packing) == (5, "mlx")
    with pytest.raises(UnsupportedError, match="layer model.layers.0.q has 6-bit"):
        read_config({**config, "packing_format": "auto_round", "bits": 4}).layer("model.layers.0.q", True)


def test_nothing_quantized_is_an_error() -> None:
    with pytest.raises(ModelError, match="no layer"):
        resolve({**AUTO, "block_name_to_quantize": "other.blocks"}, ["lm_head"])
