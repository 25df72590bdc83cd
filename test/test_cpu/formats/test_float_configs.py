"""Configs of the small float types: what Transformers accepts, what vLLM asserts, which layer is what."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from auto_round.formats.base import ExportPlan, get_format, require_plan
from auto_round.inference.config import is_gptq_or_awq, read_config
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

Scheme = QuantizationScheme
FULL = Scheme(bits=16, act_bits=16)
NAMES = [
    f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]
AUTO_ROUND_PRESETS = [
    "MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK",
]  # fmt: skip


def plan(layers: dict[str, QuantizationScheme], **more: Any) -> ExportPlan:
    quantized = [s for s in layers.values() if s.quantizes_weights]
    return ExportPlan(quantized[0], layers, ("model.layers.0", "model.layers.1"), **more)


def all_of(preset: str, **exceptions: QuantizationScheme) -> dict[str, QuantizationScheme]:
    found = {n: PRESET_SCHEMES[preset] for n in NAMES} | {"lm_head": FULL}
    for leaf, scheme in exceptions.items():
        found |= {n: scheme for n in NAMES if n.endswith(leaf)}
    return found


def config(fmt: str, layers: dict[str, QuantizationScheme], **more: Any) -> dict[str, Any]:
    found = get_format(fmt).config(plan(layers, **more))
    assert found is not None
    return found


def group_of(found: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The group of a module by compressed-tensors' rules: `ignore`, then names, then patterns, then classes."""

    def fits(target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name

    if any(fits(target) for target in found["ignore"]):
        return None
    targets = {t: g for g in found["config_groups"].values() for t in g["targets"]}
    return next((targets[t] for t in sorted(targets, key=lambda t: "re:" in t) if fits(t)), targets.get("Linear"))


MX = {"type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8"}
NV = {
    "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "num_bits": 4,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
FP = {"type": "float", "group_size": None, "symmetric": True, "num_bits": 8}
EXPECTED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "MXFP4": ("mxfp4-pack-quantized", MX | {"num_bits": 4}, MX | {"num_bits": 4, "dynamic": True}),
    "MXFP8": ("mxfp8-quantized", MX | {"num_bits": 8}, MX | {"num_bits": 8, "dynamic": True}),
    "NVFP4": ("nvfp4-pack-quantized", NV, NV | {"dynamic": "local", "observer": "static_minmax"}),
    "FPW8A16": ("naive-quantized", FP | {"strategy": "tensor"}, None),
    "FP8_STATIC": ("float-quantized", FP | {"strategy": "channel"}, FP | {"strategy": "tensor", "dynamic": False}),
    "FP8_BLOCK": (
        "float-quantized", FP | {"strategy": "block", "block_structure": [128, 128]},
        FP | {"strategy": "group", "group_size": 128, "dynamic": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", [*EXPECTED, "MXFP4_RCEIL", "MXFP8_RCEIL"])
def test_compressed_tensors(preset: str) -> None:
    found = config("llm_compressor", all_of(preset), other_matrices=("model.layers.0.mlp.gate",))
    name, weights, inputs = EXPECTED[preset.removesuffix("_RCEIL")]
    assert found["format"] == name and found["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    assert list(found["config_groups"]) == ["group_0"]
    group = found["config_groups"]["group_0"]
    assert group["weights"] == weights | {"dynamic": False} and group["input_activations"] == inputs
    assert (group["targets"], group["format"], group["output_activations"]) == (["Linear"], name, None)
    assert (found["quant_method"], found["quantization_status"]) == ("compressed-tensors", "compressed")


def test_fp8_without_a_group_of_its_own() -> None:
    dynamic = Scheme(8, -1, data_type="fp", act_bits=8)
    group = config("llm_compressor", {n: dynamic for n in NAMES})["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == "channel" and group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True


def test_mixed_types() -> None:
    layers = all_of("MXFP4", down_proj=PRESET_SCHEMES["MXFP8"])
    layers["model.layers.1.self_attn.q_proj"] = FULL
    found = config("llm_compressor", layers)
    assert found["format"] == "mixed-precision" and len(found["config_groups"]) == 2
    for name, scheme in layers.items():
        group = group_of(found, name)
        if not scheme.quantizes_weights:
            assert group is None
            continue
        assert group is not None and group["weights"]["num_bits"] == scheme.bits
        assert group["format"] == ("mxfp4-pack-quantized" if scheme.bits == 4 else "mxfp8-quantized")
        assert "Linear" not in group["targets"]


def test_floats_next_to_integers() -> None:
    found = config("llm_compressor", all_of("MXFP8", down_proj=PRESET_SCHEMES["W4A16"]))
    assert {g["format"] for g in found["config_groups"].values()} == {"mxfp8-quantized", "pack-quantized"}


@pytest.mark.parametrize(("scheme", "reason"), [
    (PRESET_SCHEMES["MXINT4"], "no weights of data type 'mx_int'"), (Scheme(8, 0, data_type="fp8_e5m2"), "'fp8_e5m2'"),
    (Scheme(4, 16, data_type="mx_fp"), "groups of 32"), (Scheme(4, 32, data_type="nv_fp"), "groups of 16"),
    (Scheme(4, 16, data_type="nv_fp", act_bits=4), "nv_fp4_with_static_gs"),
    (Scheme(8, -1, data_type="fp", act_bits=8, act_data_type="int"), "activations of data type 'int'"),
    (Scheme(4, 32, False, "mx_fp"), "asymmetric"), (Scheme(6, 32, data_type="mx_fp"), "6 bits"),
    (Scheme(4, -1, data_type="mx_fp"), "not group_size -1"),
    (Scheme(4, 32, data_type="mx_fp", act_bits=4, act_dynamic=False), "no static scales"),
])  # fmt: skip
def test_what_compressed_tensors_cannot_say(scheme: QuantizationScheme, reason: str) -> None:
    assert reason in str(get_format("llm_compressor").check_scheme(scheme))


@pytest.mark.parametrize(("fmt", "preset", "shape", "fits"), [
    ("llm_compressor", "MXFP4", (48, 32), False), ("llm_compressor", "MXFP4", (64, 7), True),
    ("llm_compressor", "FP8_BLOCK", (192, 128), False), ("llm_compressor", "FP8_BLOCK", (256, 192), True),
    ("llm_compressor", "FP8_STATIC", (33, 7), True), ("auto_round", "FP8_BLOCK", (192, 200), True),
    ("auto_round", "NVFP4", (24, 8), False), ("auto_round", "FPW8A16", (33, 7), True),
    ("fp8", "FP8_BLOCK", (256, 192), False), ("fp8", "FP8_BLOCK", (256, 384), True),
    ("fp8", "FP8_BLOCK", (192, 384), False), ("fp8", "FP8_BLOCK", (256, 64), True),
])  # fmt: skip
def test_which_layers_fit(fmt: str, preset: str, shape: tuple[int, int], fits: bool) -> None:
    assert (get_format(fmt).check_layer(PRESET_SCHEMES[preset], *shape) is None) is fits


@pytest.mark.parametrize("preset", AUTO_ROUND_PRESETS)
def test_transformers_takes_the_auto_round_config(preset: str) -> None:
    """Its class refuses a group_size of 0 and of [128, 128]."""
    from transformers import AutoRoundConfig

    layers = all_of(preset, k_proj=FULL, down_proj=PRESET_SCHEMES["MXFP8"])
    found = config("auto_round", layers)
    read = read_config(AutoRoundConfig.from_dict(copy.deepcopy(found)))
    for name, scheme in layers.items():
        fmt = read.layer(name, name != "lm_head")
        if not scheme.quantizes_weights:
            assert fmt is None
            continue
        assert fmt is not None, name
        assert fmt.scheme.describe() == scheme.describe() and fmt.scheme.activations == scheme.activations
        assert fmt.scheme.group_size == scheme.group_size


@pytest.mark.parametrize("default", ["W4A16", "MXFP4", "FPW8A16", "FP8_BLOCK"])
@pytest.mark.parametrize("other", ["W4A16", "W8A16", "MXFP8", "FP8_STATIC", "FPW8A16", "FP8_BLOCK", "NVFP4", "MXINT4"])
def test_any_mixture_is_told(default: str, other: str) -> None:
    layers = all_of(default, down_proj=PRESET_SCHEMES[other], lm_head=FULL)
    layers["lm_head"] = PRESET_SCHEMES[other]
    read = read_config(config("auto_round", layers))
    for name, scheme in layers.items():
        fmt = read.layer(name, name != "lm_head")
        assert fmt is not None and fmt.scheme == scheme
        assert (fmt.packing == "gptq_zp+-1") == (scheme.data_type == "int")


def test_an_entry_inherits_what_is_equal_in_another_data_type() -> None:
    layers = all_of("MXFP4", down_proj=QuantizationScheme(bits=4, group_size=32))
    found = config("auto_round", layers)
    assert any("group_size" not in entry for entry in found["extra_config"].values())
    read = read_config(found)
    assert all(read.layer(name, True).scheme == scheme for name, scheme in layers.items() if scheme.quantizes_weights)


@pytest.mark.parametrize(("preset", "packing"), [
    ("MXFP4", "auto_round:llm_compressor"), ("MXFP8", "auto_round:llm_compressor"),
    ("NVFP4", "auto_round:llm_compressor"), ("MXINT4", "auto_round"), ("FP8_STATIC", "auto_round:fp8_static"),
    ("FP8_BLOCK", "auto_round:fp8"),
])  # fmt: skip
def test_packing_names(preset: str, packing: str) -> None:
    assert config("auto_round", all_of(preset))["packing_format"] == packing


def test_vllm_takes_blocks() -> None:
    """The assertions of its loader of auto-round files, on `quantization_config.json`; config.json differs from that in
    the group size alone, where Transformers' class takes only a number."""
    made = plan(all_of("FP8_BLOCK"), settings={"iters": 0})
    for name in ("auto_round", "auto_round:fp8"):
        found, inner = get_format(name).file_config(made), get_format(name).config(made)
        assert found is not None and inner is not None
        wanted = {
            "bits": 8, "group_size": [128, 128], "sym": True, "packing_format": "auto_round:fp8", "data_type": "fp",
            "act_bits": 8, "act_group_size": 128, "act_data_type": "fp", "act_sym": True, "act_dynamic": True,
            "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        }  # fmt: skip
        assert {key: found[key] for key in wanted} == wanted
        assert {key for key in found if found[key] != inner[key]} == {"group_size"}


@pytest.mark.parametrize("preset", ["MXFP4", "MXFP8"])
@pytest.mark.parametrize("fmt", ["auto_round", "earlier:int8"])
def test_vllm_takes_mx(preset: str, fmt: str, earlier_int8: str) -> None:
    found = config(fmt, all_of(preset))
    bits = PRESET_SCHEMES[preset].bits
    wanted = {
        "bits": bits, "group_size": 32, "sym": True, "packing_format": "auto_round:llm_compressor",
        "data_type": "mx_fp", "act_bits": bits, "act_data_type": "mx_fp", "act_group_size": 32, "act_sym": True,
        "act_dynamic": True, "block_name_to_quantize": "model.layers",
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_native_fp8() -> None:
    from transformers import FineGrainedFP8Config

    layers = all_of("FP8_BLOCK", k_proj=FULL)
    found = config("fp8", layers, other_matrices=("model.layers.0.mlp.gate",))
    native = FineGrainedFP8Config.from_dict(copy.deepcopy(found))
    assert native.quant_method == "fp8" and native.activation_scheme == "dynamic"
    assert list(native.weight_block_size) == [128, 128]
    dense = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head", "model.layers.0.mlp.gate"]
    assert native.modules_to_not_convert == dense
    assert "packing_format" not in found and "extra_config" not in found
    read = read_config(found)
    assert [n for n in layers if read.layer(n, n != "lm_head") is not None] == [n for n in NAMES if "k_proj" not in n]
    assert not is_gptq_or_awq(found)
    # One that another program wrote, without any of our words.
    read = read_config({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 32]})
    assert read.default.packing == "fp8_block" and read.everywhere
    assert read.default.scheme is not None and read.default.scheme.group_size == (64, 32)
    assert (acts := read.default.scheme.activations) is not None and acts.group_size == 32


def test_native_fp8_says_one_scheme() -> None:
    fmt = get_format("fp8")
    other = PRESET_SCHEMES["FP8_BLOCK"].with_overrides({"group_size": (64, 64), "act_group_size": 64})
    assert "one scheme for all layers" in str(fmt.check_plan(plan(all_of("FP8_BLOCK", down_proj=other))))
    assert fmt.check_plan(plan(all_of("FP8_BLOCK", down_proj=FULL))) is None
    with pytest.raises(Exception, match="formats that can: auto_round"):
        require_plan(fmt, plan(all_of("FP8_BLOCK", down_proj=other)))


def test_native_fp8_and_experts() -> None:
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(2)]
    fp8 = PRESET_SCHEMES["FP8_BLOCK"]
    some = all_of("FP8_BLOCK") | {n: fp8 if n == experts[0] else FULL for n in experts}
    assert "experts of a block to be quantized or none" in str(
        get_format("fp8").check_plan(plan(some, model_type="qwen3_moe"))
    )
    dense = config("fp8", all_of("FP8_BLOCK") | dict.fromkeys(experts, FULL), model_type="qwen3_moe")
    assert {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"} <= set(dense["modules_to_not_convert"])
    quantized = config("fp8", all_of("FP8_BLOCK") | dict.fromkeys(experts, fp8), model_type="qwen3_moe")
    assert quantized["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"group_size": -1}, "two-dimensional blocks"), ({"act_group_size": 64}, "groups of 128"),
    ({"act_dynamic": False}, "dynamically"), ({"act_bits": 16}, "act_bits 8"),
    ({"data_type": "mx_fp"}, "not 8-bit mx_fp"),
])  # fmt: skip
def test_what_native_fp8_cannot_say(changes: dict[str, Any], reason: str) -> None:
    scheme = PRESET_SCHEMES["FP8_BLOCK"].with_overrides(changes)
    assert reason in str(get_format("fp8").check_scheme(scheme))
    assert get_format("auto_round:fp8").check_scheme(PRESET_SCHEMES["FPW8A16"]) is not None


@pytest.mark.parametrize("preset", AUTO_ROUND_PRESETS)
def test_integer_layouts_refuse_floats(preset: str) -> None:
    for name in ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel", "auto_gptq", "auto_awq", "mlx"):
        assert get_format(name).check_scheme(PRESET_SCHEMES[preset]) is not None


@pytest.mark.parametrize("preset", AUTO_ROUND_PRESETS)
def test_a_dense_layer_says_that_its_inputs_are_dense(preset: str) -> None:
    """auto-round 0.16.1 fills what an entry does not say from the default, and has no kernel for 16 and 4 bits."""
    layers = all_of(preset, down_proj=FULL)
    entry = config("auto_round", layers)["extra_config"]["model.layers.0.mlp.down_proj"]
    quantized = PRESET_SCHEMES[preset].quantizes_activations
    assert entry == ({"bits": 16, "act_bits": 16} if quantized else {"bits": 16})
