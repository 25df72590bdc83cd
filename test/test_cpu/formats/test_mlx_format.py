"""Formats mlx and auto_round:mlx: refusals, names, configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.formats.base import ExportPlan, ModelRules, get_format, require_scheme
from auto_round.formats.config_mlx import MLX_FAMILIES, with_legacy_rope
from auto_round.schemes import PRESET_SCHEMES
from auto_round.schemes import QuantizationScheme as Scheme

BOTH = pytest.mark.parametrize("name", ["mlx", "auto_round:mlx"])


@BOTH
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_and_group_sizes(name: str, bits: int) -> None:
    fmt = get_format(name)
    for size in (16, 32, 64, 128, 256, -1, 0, (32, 32)):
        for sym in (True, False):
            reason = fmt.check_scheme(Scheme(bits=bits, group_size=size, sym=sym))
            assert (reason is None) == (bits != 7 and size in (32, 64, 128))
            if bits != 7 and reason is not None:
                assert "32, 64 or 128" in reason
    assert fmt.check_scheme(Scheme(bits=16, group_size=-1)) is None


@BOTH
def test_other_schemes(name: str) -> None:
    fmt = get_format(name)
    for preset in ("MXFP4", "INT8", "FP8_STATIC", "GGUF:Q4_K_M"):
        assert fmt.check_scheme(PRESET_SCHEMES[preset]) is not None
    for preset in fmt.support_schemes:
        assert fmt.check_scheme(PRESET_SCHEMES[preset]) is None


def test_a_refusal_names_the_formats_that_would_do() -> None:
    with pytest.raises(
        UnsupportedError, match="7-bit.*formats that can: auto_round:llm_compressor, fake, llm_compressor$"
    ):
        require_scheme(get_format("mlx"), Scheme(bits=7))
    with pytest.raises(
        UnsupportedError,
        match="formats that can: auto_round:llm_compressor, auto_round:mlx, fake, llm_compressor, mlx$",
    ):
        require_scheme(get_format("auto_round"), Scheme(bits=5))


def test_shapes() -> None:
    fmt = get_format("mlx")
    assert fmt.check_layer(Scheme(group_size=64), 128, 8) is None
    assert "multiple of group_size 64" in str(fmt.check_layer(Scheme(group_size=64), 96, 8))
    assert fmt.check_layer(Scheme(group_size=32), 96, 1) is None  # MLX asks nothing of the outputs


def test_a_bias_that_is_no_whole_zero_point_is_found() -> None:
    fmt, scheme = get_format("mlx"), Scheme(group_size=32)
    codes = IntCodes(torch.zeros(8, 32, dtype=torch.uint8), torch.full((8, 1), 0.1).half(), 8, scheme.group_size)
    layer = QuantizedLayer("a", scheme, codes)
    tensors = fmt.pack(layer)
    tensors["a.biases"][3] *= 1.05
    with pytest.raises(ModelError, match="layer a: its biases"):
        fmt.unpack_layer("a", scheme, tensors, 32, 8)


def plan(layers: dict[str, Scheme], model_type: str = "llama", scheme: Scheme | None = None) -> ExportPlan:
    return ExportPlan(
        scheme or Scheme(), layers, ("model.layers.0",), model_type=model_type, embeddings=("model.embed_tokens",)
    )


def test_config_of_a_mixture() -> None:
    layers = {
        "model.layers.0.q_proj": Scheme(), "model.layers.0.k_proj": Scheme(bits=6, group_size=32, sym=False),
        "model.layers.0.o_proj": Scheme(bits=16), "lm_head": Scheme(bits=16),
    }  # fmt: skip
    wanted = {
        "group_size": 128, "bits": 4, "model.embed_tokens": False, "lm_head": False, "model.layers.0.o_proj": False,
        "model.layers.0.q_proj": {"group_size": 128, "bits": 4},
        "model.layers.0.k_proj": {"group_size": 32, "bits": 6},
    }  # fmt: skip
    values = get_format("mlx").model_config({"model_type": "llama"}, plan(layers))
    assert values["quantization"] == values["quantization_config"] == wanted
    values = get_format("auto_round:mlx").model_config({"model_type": "llama"}, plan(layers))
    assert values["quantization"] == wanted
    config = values["quantization_config"]
    assert (config["quant_method"], config["packing_format"], config["bits"]) == ("auto-round", "mlx", 4)
    assert config["extra_config"] == {
        "model.layers.0.k_proj": {"bits": 6, "group_size": 32, "sym": False}, "model.layers.0.o_proj": {"bits": 16}
    }  # fmt: skip


def test_the_default_is_one_that_some_layer_has() -> None:
    layers = {f"model.layers.0.{n}": Scheme(bits=8) for n in "abc"}
    for name in ("mlx", "auto_round:mlx", "auto_round"):
        values = get_format(name).model_config({}, plan(layers))
        assert values["quantization_config"]["bits"] == 8 and "extra_config" not in values["quantization_config"]


def test_a_dense_model_gets_no_quantization() -> None:
    for name in ("mlx", "auto_round:mlx"):
        values = get_format(name).model_config({"a": 1}, plan({"lm_head": Scheme(bits=16)}))
        assert values == {"a": 1}


def mlx_rules(model_type: str) -> ModelRules:
    return get_format("mlx").rules(model_type)


def test_names_in_mlx_lm() -> None:
    rules = mlx_rules("mixtral")
    assert rules.stored_as("model.layers.3.mlp.experts.12.up_proj.scales") == (
        "model.layers.3.block_sparse_moe.switch_mlp.up_proj.scales", 12
    )  # fmt: skip
    assert rules.stored_as("model.layers.3.mlp.gate.weight") == ("model.layers.3.block_sparse_moe.gate.weight", None)
    assert mlx_rules("qwen3_moe").module_name("l.0.mlp.experts.1.up_proj") == "l.0.mlp.switch_mlp.up_proj"
    assert mlx_rules("llama").stored_as("a.experts.0.b") == ("a.experts.0.b", None)
    assert mlx_rules("llama") == ModelRules()
    assert "'gpt9' were not tried" in str(mlx_rules("gpt9").note)
    assert all(rules.refused is None or rules.note is None for rules in MLX_FAMILIES.values())


def test_dense_layers_by_rule() -> None:
    rules = ModelRules(dense=((r"kv_b_proj$", "it is rounded again"),))
    assert rules.unquantized_reason("model.layers.0.self_attn.kv_b_proj") == "it is rounded again"
    assert rules.unquantized_reason("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(("given", "added"), [
    ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
     {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
     {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}),
    ({"full_attention": {"rope_type": "default", "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
     {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
])  # fmt: skip
def test_rotary_settings_where_older_readers_look(given: dict[str, Any], added: dict[str, Any]) -> None:
    assert with_legacy_rope({"rope_parameters": given}) == {"rope_parameters": given} | added
    assert with_legacy_rope({"rope_parameters": given, "rope_theta": 7})["rope_theta"] == 7
    assert with_legacy_rope({"a": 1}) == {"a": 1}


def test_stacks_need_one_scheme(packable_model: Callable[..., Any]) -> None:
    from auto_round.run.file_layout import stacked_targets as stored_targets

    rules, fmt = mlx_rules("qwen3_moe"), get_format("mlx")
    specs: dict[str, Any] = {}
    for expert in range(3):
        specs |= fmt.tensor_specs(f"l.0.mlp.experts.{expert}.up_proj", Scheme(group_size=32), 64, 32)
    targets = stored_targets(specs, rules)
    assert {t.name for t in targets.values()} == {
        f"l.0.mlp.switch_mlp.up_proj.{leaf}" for leaf in ("weight", "scales", "biases")
    }
    assert targets["l.0.mlp.experts.1.up_proj.weight"].shape == (3, 32, 8)
    for other in (Scheme(bits=8, group_size=32), Scheme(group_size=32, sym=False), Scheme(group_size=64)):
        changed = specs | fmt.tensor_specs("l.0.mlp.experts.1.up_proj", other, 64, 32)
        with pytest.raises(UnsupportedError, match="stacks the 3 experts.*switch_mlp.up_proj"):
            stored_targets(changed, rules)
    changed = {k: v for k, v in specs.items() if "experts.1." not in k}
    changed["l.0.mlp.experts.1.up_proj.weight"] = ((32, 64), torch.float32)
    with pytest.raises(UnsupportedError, match="different schemes"):
        stored_targets(changed, rules)
