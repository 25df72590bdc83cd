"""The compressed-tensors format: layouts, configs, and reading back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.formats.base import ExportPlan, ModelRules, get_format
from auto_round.formats.config_compressed_tensors import PackedInt8Format, name_patterns
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

Scheme = QuantizationScheme
INT8 = PRESET_SCHEMES["INT8"]


def quantized(scheme: QuantizationScheme, out: int, columns: int, seed: int = 0, bias: bool = False) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    activation = None
    if scheme.activations is not None:
        fixed = not scheme.activations.dynamic
        zero = 5 if fixed and not scheme.activations.sym else None
        activation = ActivationQuantizer(scheme.activations, torch.tensor(0.5) if fixed else None, zero)
    task = LayerTask(
        "m.l", torch.nn.Linear(1, 1), weight, scheme, bias=torch.randn(out) if bias else None, activation=activation
    )
    return quantize_layer(task, False, torch.float16)


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([-1, 0, 8, 24]), st.integers(1, 9), st.integers(1, 4),
    st.sampled_from([None, (True, True), (True, False), (False, True), (False, False)]), st.booleans(),
)  # fmt: skip
def test_written_and_read_back(
    bits: int, sym: bool, group: int, out: int, groups: int, inputs: tuple[bool, bool] | None, bias: bool
) -> None:
    act: dict[str, Any] = {"act_bits": 16} if inputs is None else {"act_bits": 8, "act_group_size": -1}
    if inputs is not None:
        act |= {"act_dynamic": inputs[0], "act_sym": inputs[1]}
    scheme = Scheme(bits=bits, group_size=group, sym=sym, **act)
    layer = quantized(scheme, out, max(group, 7) * groups, bits, bias)
    fmt = get_format("llm_compressor")
    tensors = fmt.pack(layer, model_dtype=torch.bfloat16)
    specs = fmt.tensor_specs(
        "m.l", scheme, layer.in_features, out, bias_dtype=torch.float32 if bias else None, model_dtype=torch.bfloat16
    )
    assert {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} == specs
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    read = fmt.unpack_layer("m.l", scheme, tensors, layer.in_features, out)
    assert torch.equal(read.codes.codes, layer.codes.codes) and torch.equal(read.codes.scale, layer.codes.scale)
    zeros = [torch.as_tensor(one.codes.zero_point).expand(layer.codes.scale.shape) for one in (read, layer)]
    assert torch.equal(*zeros)
    assert (read.act_scale, read.act_zero_point) == (layer.act_scale, layer.act_zero_point)


def test_tensors_of_each_layout() -> None:
    fmt = get_format("llm_compressor")
    names = lambda scheme: {k.rpartition(".")[2] for k in fmt.tensor_specs("m.l", scheme, 64, 32)}
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    assert names(Scheme()) == packed and names(Scheme(sym=False)) == packed | {"weight_zero_point"}
    assert names(INT8) == {"weight", "weight_scale"}
    static = INT8.with_overrides({"act_dynamic": False})
    assert names(static) == {"weight", "weight_scale", "input_scale"}
    assert "input_zero_point" in names(static.with_overrides({"act_sym": False}))


@pytest.mark.parametrize(("scheme", "reason"), [
    (Scheme(data_type="some"), "data type 'some'"), (Scheme(group_size=(8, 8)), "groups of (8, 8)"),
    (Scheme(act_bits=8, act_data_type="fp"), "activations of data type 'fp'"),
    (PRESET_SCHEMES["GGUF:Q4_K_M"], "int_asym_dq"),
])  # fmt: skip
def test_schemes_that_are_refused(scheme: QuantizationScheme, reason: str) -> None:
    assert reason in str(get_format("llm_compressor").check_scheme(scheme))


def test_layers_whose_groups_do_not_fit() -> None:
    fmt = get_format("llm_compressor")
    assert "not a multiple of group_size 128" in str(fmt.check_layer(Scheme(), 192, 64))
    assert fmt.check_layer(Scheme(group_size=-1), 193, 7) is None
    assert fmt.check_layer(Scheme(group_size=64), 192, 7) is None
    both = INT8.with_overrides({"act_group_size": 128})
    assert "activations: in_features=192 is not a multiple of group_size 128" in str(fmt.check_layer(both, 192, 64))


def plan(layers: dict[str, QuantizationScheme], **more: Any) -> ExportPlan:
    return ExportPlan(Scheme(), layers, ("model.layers.0", "model.layers.1"), **more)


def names(count: int = 2) -> list[str]:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    return [f"model.layers.{i}.{leaf}" for i in range(count) for leaf in leaves]


FULL = Scheme(bits=16, act_bits=16)


def config(layers: dict[str, QuantizationScheme], **more: Any) -> dict[str, Any]:
    found = get_format("llm_compressor").config(plan(layers, **more))
    assert found is not None
    return found


def group_of(found: dict[str, Any], name: str, linear: bool = True) -> dict[str, Any] | None:
    """The group of a module by the library's rules: `ignore` first, names before patterns before classes."""

    def fits(target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name

    if any(fits(target) for target in found["ignore"]):
        return None
    targets = {t: g for g in found["config_groups"].values() for t in g["targets"]}
    for target in sorted(targets, key=lambda t: ("re:" in t, t)):
        if fits(target):
            return targets[target]
    return targets.get("Linear") if linear else None


def test_one_scheme_for_all() -> None:
    found = config({n: Scheme() for n in names()} | {"lm_head": FULL}, other_matrices=("model.proj_in",))
    assert list(found["config_groups"]) == ["group_0"]
    group = found["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    assert group["weights"] == {
        "dynamic": False, "group_size": 128, "num_bits": 4, "strategy": "group", "symmetric": True, "type": "int"
    }  # fmt: skip
    assert found["ignore"] == ["lm_head", "model.proj_in"]
    assert (found["format"], found["quant_method"]) == ("pack-quantized", "compressed-tensors")
    assert found["quantization_status"] == "compressed"


def test_a_quantized_head_is_not_ignored() -> None:
    found = config({n: Scheme() for n in [*names(), "lm_head"]})
    assert found["ignore"] == [] and group_of(found, "lm_head") is not None


@pytest.mark.parametrize("changed", [["model.layers.0.mlp.down_proj"], [n for n in names() if "self_attn" in n]])
def test_every_layer_is_told_its_own(changed: list[str]) -> None:
    layers = {n: Scheme(bits=8, sym=False) if n in changed else Scheme() for n in names()} | {"lm_head": FULL}
    layers["model.layers.1.self_attn.q_proj"] = FULL
    found = config(layers)
    assert all("Linear" not in group["targets"] for group in found["config_groups"].values())
    for name, scheme in layers.items():
        group = group_of(found, name)
        if not scheme.quantizes_weights:
            assert group is None
        else:
            assert group is not None and group["weights"]["num_bits"] == scheme.bits
            assert group["weights"]["symmetric"] is scheme.sym
    assert group_of(found, "model.layers.0.other") is None


def test_weights_alone_next_to_int8() -> None:
    found = config({n: INT8 if "mlp" in n else Scheme(group_size=0) for n in names()} | {"lm_head": FULL})
    assert found["format"] == "mixed-precision"
    assert {g["format"] for g in found["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    group = group_of(found, names()[0])
    assert group is not None and group["weights"]["strategy"] == "channel" and group["weights"]["group_size"] is None


@pytest.mark.parametrize(("changes", "strategy", "group_size"), [
    ({}, "token", None), ({"act_group_size": 0}, "tensor", None), ({"act_group_size": 32}, "group", 32),
    ({"act_dynamic": False}, "tensor", None),
])  # fmt: skip
def test_activations(changes: dict[str, Any], strategy: str, group_size: int | None) -> None:
    found = config({n: INT8.with_overrides(changes) for n in names()})
    inputs = found["config_groups"]["group_0"]["input_activations"]
    assert inputs == {
        "dynamic": "act_dynamic" not in changes, "group_size": group_size, "num_bits": 8, "strategy": strategy,
        "symmetric": True, "type": "int",
    }  # fmt: skip


def test_patterns_mean_no_other_layer() -> None:
    everything = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(3) for e in range(4) for p in ("up", "up2")]
    everything += ["lm_head", "model.layers.1.gate.up"]
    wanted = [n for n in everything if n.endswith(".up") and "experts" in n]
    patterns = name_patterns(wanted, everything)
    assert patterns == [r"re:.*model\.layers\.\d+\.mlp\.experts\.\d+\.up$"]
    assert [n for n in everything if re.match(patterns[0][3:], n)] == wanted
    assert name_patterns(wanted[1:], everything) == wanted[1:]
    assert name_patterns(["lm_head"], everything) == ["lm_head"]


def test_configs_use_the_names_of_the_plan() -> None:
    """The job gives a plan in the checkpoint's names; no rule of the format's own renames a family's experts."""
    moe = "model.layers.{}.block_sparse_moe"
    layers = {f"{moe.format(i)}.experts.{e}.w3": Scheme() for i in range(2) for e in range(2)}
    layers |= {f"model.layers.{i}.self_attn.q_proj": Scheme(bits=8) for i in range(2)} | {"lm_head": FULL}
    found = config(layers, model_type="mixtral", other_matrices=tuple(f"{moe.format(i)}.gate" for i in range(2)))
    assert found["ignore"] == ["lm_head", r"re:.*model\.layers\.\d+\.block_sparse_moe\.gate$"]
    targets = [group["targets"] for group in found["config_groups"].values()]
    assert targets[0] == [r"re:.*model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w3$"]
    assert get_format("llm_compressor").rules("mixtral") == ModelRules()


def test_nothing_quantized_has_no_config() -> None:
    assert get_format("llm_compressor").config(plan({"a": FULL})) is None


def test_the_auto_round_config() -> None:
    layers = {n: INT8 for n in names()} | {"lm_head": FULL}
    layers[names()[0]] = FULL
    layers[names()[1]] = INT8.with_overrides({"act_dynamic": False})
    found = PackedInt8Format().config(ExportPlan(INT8, layers, ("model.layers.0",)))
    assert found is not None and found["packing_format"] == "auto_round:llm_compressor"
    assert {k: v for k, v in found.items() if k.startswith("act_")} == {
        "act_bits": 8, "act_group_size": -1, "act_sym": True, "act_data_type": "int", "act_dynamic": True
    }  # fmt: skip
    assert found["extra_config"][names()[0]] == {"bits": 16, "act_bits": 16}
    assert found["extra_config"][names()[1]] == {"bits": 8, "act_dynamic": False}
    assert "weights only" not in str(get_format("auto_round:llm_compressor").check_scheme(INT8))
