"""Formats: names, refusals, planned tensors, packed tensors and configs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from guide_matrix import GUIDE_MATRIX, formats_for_preset

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.base import (
    ExportPlan,
    available_formats,
    formats_for_scheme,
    get_format,
    parse_formats,
    register_format,
    require_scheme,
)
from auto_round.gguf.file_types import FILE_TYPES
from auto_round.inference.config import read_config
from auto_round.layer_config import pattern_regex
from auto_round.schemes import PRESET_SCHEMES
from auto_round.schemes import QuantizationScheme as Scheme

SHARED = Path(os.environ.get("AR_TEST_SHARED") or Path(__file__).resolve().parents[4] / "shared")
BUILT = sorted([
    "auto_round", "auto_round:auto_awq", "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:mlx", "fake",
    "auto_gptq", "gptqmodel", "auto_awq", "mlx", "llm_compressor", "auto_round:llm_compressor",
    "auto_round:fp8", "fp8", *(f"gguf:{name}" for name in FILE_TYPES),
])  # fmt: skip


def test_names() -> None:
    assert available_formats() == BUILT
    assert [f.name for f in parse_formats(" auto_round, FAKE ")] == ["auto_round", "fake"]
    assert [f.name for f in parse_formats(["fake", "auto_round"])] == ["fake", "auto_round"]


def test_every_format_of_the_guide_is_built() -> None:
    assert set(GUIDE_MATRIX) <= set(BUILT)


@pytest.mark.parametrize(("text", "message"), [
    ("auto_rond", "did you mean 'auto_round'"),
    ("gguf:q*_1", "types are gguf:q2_k, .*gguf:q4_1"), ("gguf", "types are gguf:q2_k, "),
    ("gguf:q4km", "did you mean 'gguf:q4_k_m'"), ("gguf:q9_z", "unknown format 'gguf:q9_z'"),
    ("", "no format given"), (" , ", "no format given"),
    ("fake,auto_round,fake", "'fake' is given twice"),
])  # fmt: skip
def test_names_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_formats(text)


def test_a_name_cannot_be_registered_twice() -> None:
    get_format("fake")
    with pytest.raises(ConfigError, match="registered already"):
        register_format("fake")(type(get_format("fake")))


def test_the_guides_table() -> None:
    assert set(BUILT) == {*GUIDE_MATRIX, "gguf:q2_k", "gguf:q2_k_mixed"}
    assert formats_for_preset("fp8_block") == ["auto_round", "auto_round:llm_compressor", "auto_round:fp8", "llm_compressor", "fp8", "fake"]  # fmt: skip  # noqa: E501
    for name, schemes in GUIDE_MATRIX.items():
        found = get_format(name).support_schemes
        assert set(PRESET_SCHEMES if schemes == ("all",) else schemes) <= set(found), name
    assert get_format("auto_awq").support_schemes == ("W4A16", "BF16")  # other layers of W4A16_MIXED have 8 bits


@pytest.mark.parametrize(("scheme", "reason"), [
    (Scheme(6, 32, data_type="mx_fp"), "data type 'mx_fp'"), (PRESET_SCHEMES["INT8"], "activations"),
    (Scheme(bits=7), "2, 3, 4 or 8-bit weights, not 7-bit ones"),
    (Scheme(group_size=(128, 128)), "block"), (PRESET_SCHEMES["GGUF:Q4_K_M"], "data type"),
    (Scheme(super_bits=6, super_group_size=8), "doubly"),
])  # fmt: skip
def test_schemes_that_do_not_fit(scheme: Scheme, reason: str) -> None:
    fmt = get_format("auto_round")
    assert reason in str(fmt.check_scheme(scheme))
    takers = [name for name in BUILT if get_format(name).suggested_for(scheme)]
    assert "fake" in takers and formats_for_scheme(scheme) == takers
    with pytest.raises(UnsupportedError, match=f"formats that can: {', '.join(takers)}$"):
        require_scheme(fmt, scheme)


def test_awq_takes_4_bits_only() -> None:
    assert "4-bit" in str(get_format("auto_round:auto_awq").check_scheme(Scheme(bits=8)))
    assert get_format("auto_round:auto_awq").check_scheme(Scheme(bits=4, sym=False)) is None
    assert get_format("auto_round:auto_awq").check_scheme(Scheme(bits=16)) is None


def test_layers_that_cannot_be_packed() -> None:
    fmt, scheme = get_format("auto_round"), Scheme()
    assert fmt.check_layer(scheme, 64, 96) is None
    assert fmt.check_layer(scheme, 40, 96) == "in_features=40 is not a multiple of 32"
    assert fmt.check_layer(scheme, 64, 1) == "out_features=1 is not a multiple of 32"
    assert get_format("fake").check_layer(scheme, 7, 1) is None


def some_layer(scheme: Scheme, bias: bool = True, transposed: bool = False) -> QuantizedLayer:
    torch.manual_seed(0)
    groups = 3 if scheme.group_size == 32 else 1
    zero: torch.Tensor | int = 1 << (scheme.bits - 1)
    if not scheme.sym:
        zero = torch.randint(0, 1 << scheme.bits, (64, groups), dtype=torch.uint8)
    rows = 1 if scheme.group_size == 0 else 64
    codes = torch.randint(0, 1 << scheme.bits, (64, 96), dtype=torch.uint8)
    return QuantizedLayer(
        "a.b", scheme, IntCodes(codes, torch.randn(rows, groups).half(), zero, scheme.group_size),
        bias=torch.randn(64).bfloat16() if bias else None, transposed=transposed,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BUILT if not name.startswith("gguf:")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1, 0, 128])
@pytest.mark.parametrize("bias", [True, False])
def test_planned_tensors_are_the_packed_ones(name: str, bits: int, sym: bool, group_size: int, bias: bool) -> None:
    fmt, scheme = get_format(name), Scheme(bits=bits, sym=sym, group_size=group_size)
    if fmt.check_scheme(scheme) is not None:
        return
    layer = some_layer(scheme, bias, transposed=True)
    specs = fmt.tensor_specs(
        "a.b", scheme, 96, 64, bias_dtype=torch.bfloat16 if bias else None, model_dtype=torch.bfloat16, transposed=True
    )
    tensors = fmt.pack(layer, model_dtype=torch.bfloat16)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == specs
    assert all(t.is_contiguous() for t in tensors.values())


def test_one_scale_for_the_tensor_is_repeated() -> None:
    fmt, layer = get_format("auto_round"), some_layer(Scheme(group_size=0))
    scales = fmt.pack(layer)["a.b.scales"]
    assert scales.shape == (1, 64) and (scales == layer.codes.scale.item()).all()
    config = fmt.config(ExportPlan(layer.scheme, {"l.0.x": layer.scheme}, ("l.0",)))
    assert config is not None and config["group_size"] == -1


def test_config_of_a_plain_run() -> None:
    scheme = Scheme()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    plan = ExportPlan(
        scheme, {**dict.fromkeys(names, scheme), "lm_head": Scheme(bits=16)},
        tuple(f"model.layers.{i}" for i in range(12)),
        {"iters": 0, "nsamples": 128, "seqlen": 512, "enable_quanted_input": False, "lr": None, "dataset": ["x"]},
        "1.2.3",
    )  # fmt: skip
    assert get_format("auto_round").config(plan) == {
        "bits": 4, "data_type": "int", "group_size": 128, "sym": True, "iters": 0, "seqlen": 512,
        "enable_quanted_input": False, "autoround_version": "1.2.3", "block_name_to_quantize": "model.layers",
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq",
    }  # fmt: skip
    assert get_format("fake").config(plan) is None


@pytest.mark.parametrize("folder", ["w4a16-auto_round", "w3a16-auto_round", "w2a16-auto_round-group_size64"])
def test_config_is_what_the_ecosystem_writes(folder: str) -> None:
    path = SHARED / "golden" / folder / "quantization_config.json"
    if not path.is_file():
        pytest.skip("golden checkpoints are not here; set AR_TEST_SHARED")
    theirs = json.loads(path.read_text())
    scheme = Scheme(bits=theirs["bits"], group_size=theirs["group_size"])
    layers, settings = {"model.layers.0.x": scheme}, {"enable_quanted_input": False}
    plan = ExportPlan(scheme, layers, ("model.layers.0",), settings, "0.16.1")
    assert get_format("auto_round").config(plan) == theirs


@pytest.mark.parametrize(("name", "bits", "sym", "packing"), [
    ("auto_round", 4, True, "auto_round:auto_gptq"), ("auto_round", 4, False, "auto_round:auto_awq"),
    ("auto_round", 3, False, "auto_round"), ("auto_round:auto_gptq", 4, False, "auto_round:auto_gptq"),
    ("auto_round:auto_awq", 4, True, "auto_round:auto_awq"),
])  # fmt: skip
def test_packing_follows_the_scheme(name: str, bits: int, sym: bool, packing: str) -> None:
    scheme = Scheme(bits=bits, sym=sym)
    config = get_format(name).config(ExportPlan(scheme, {"l.0.x": scheme}, ("l.0",)))
    assert config is not None and config["packing_format"] == packing


def test_layers_that_differ_are_listed_by_exact_name() -> None:
    default = Scheme()
    layers = {
        "m.layers.0.a": default, "m.layers.0.b": Scheme(bits=8, group_size=32), "m.layers.1.a": Scheme(bits=16),
        "m.layers.1.b": Scheme(sym=False), "lm_head": Scheme(group_size=64, act_bits=16), "vision.x": Scheme(bits=16),
    }  # fmt: skip
    config = get_format("auto_round").config(ExportPlan(default, layers, ("m.layers.0", "m.layers.1")))
    assert config is not None
    extra = config["extra_config"]
    assert list(extra) == ["m.layers.0.b", "m.layers.1.a", "m.layers.1.b", "lm_head"]
    assert extra["m.layers.0.b"] == {"bits": 8, "group_size": 32} and extra["m.layers.1.a"] == {"bits": 16}
    # bits always, because vLLM takes an entry without them for a dense layer
    assert extra["m.layers.1.b"] == {"bits": 4, "sym": False, "packing_format": "auto_round:auto_awq"}
    assert extra["lm_head"] == {**Scheme(group_size=64, act_bits=16).to_dict()}
    json.dumps(config)


def test_patterns_of_the_user_stand_beside_the_names() -> None:
    """Scripts look an exception up as it was given. A pattern is written only where it is true of all it finds."""
    layers = {
        "m.layers.0.fc1": Scheme(bits=16), "m.layers.0.k_proj": Scheme(bits=8), "m.layers.1.fc1": Scheme(bits=16),
        "m.layers.1.k_proj": Scheme(bits=8), "m.layers.0.q_proj": Scheme(), "m.layers.10.q_proj": Scheme(bits=8),
        "m.layers.1.q_proj": Scheme(bits=8), "m.layers.10.fc1": Scheme(bits=16), "m.layers.10.k_proj": Scheme(),
        "k_head": Scheme(bits=16),
    }  # fmt: skip
    blocks = ("m.layers.0", "m.layers.1", "m.layers.10")
    given = ("fc1", ".*fc1", "*fc1", "layers.0.k_proj", "k_proj", "layers.1", "k_", "absent")
    plan = ExportPlan(Scheme(), layers, blocks, patterns=tuple(map(pattern_regex, given)))
    config = get_format("auto_round").config(plan)
    assert config is not None
    extra = config["extra_config"]
    assert {key: entry for key, entry in extra.items() if key not in layers} == {
        ".*fc1.*": {"bits": 16}, ".*fc1": {"bits": 16}, r".*layers\.0\.k_proj.*": {"bits": 8},
    }  # fmt: skip
    found = read_config(config)
    for name, scheme in layers.items():
        layer = found.layer(name, plan.in_block(name))
        assert (16 if layer is None else layer.scheme.bits) == scheme.bits


def test_a_default_of_16_bits_writes_a_quantized_one() -> None:
    """Readers take no default of 16 bits, so the commonest scheme becomes the default and the rest is listed."""
    layers = {
        "l.0.a": Scheme(bits=8), "l.0.b": Scheme(bits=8), "l.0.c": Scheme(bits=4), "l.0.d": Scheme(bits=16),
    }  # fmt: skip
    config = get_format("auto_round").config(ExportPlan(PRESET_SCHEMES["BF16"], layers, ("l.0",)))
    assert config is not None and config["bits"] == 8
    assert config["extra_config"] == {"l.0.c": {"bits": 4}, "l.0.d": {"bits": 16}}
    nothing = ExportPlan(PRESET_SCHEMES["BF16"], {"l.0.a": Scheme(bits=16)}, ("l.0",))
    assert get_format("auto_round").config(nothing) is None


def test_block_prefixes() -> None:
    plan = ExportPlan(Scheme(), {}, ("a.layers.0", "a.layers.1", "b.blocks.0"))
    assert plan.block_prefix() == "a.layers,b.blocks"
    assert plan.in_block("a.layers.1.x") and not plan.in_block("a.layers.10.x")


def test_routers_are_named_dense_where_readers_look() -> None:
    """A router is a linear layer to some readers: with no entry of its own they would take it for quantized."""
    names = [f"m.layers.{i}.{leaf}" for i in range(2) for leaf in ("attn.q_proj", "mlp.experts.0.gate_proj")]
    routers = ("m.layers.0.mlp.gate", "m.layers.1.mlp.gate", "m.proj_in")
    plan = ExportPlan(
        Scheme(), dict.fromkeys(names, Scheme()), ("m.layers.0", "m.layers.1"), other_matrices=routers
    )  # fmt: skip
    configs = {name: get_format(name).config(plan) or {} for name in ("auto_round", "auto_gptq", "auto_awq")}
    assert configs["auto_round"]["extra_config"] == {name: {"bits": 16} for name in routers[:2]}
    assert configs["auto_awq"]["modules_to_not_convert"] == list(routers[:2])
    for name in ("auto_gptq", "auto_awq"):  # GPTQModel reads both from here
        assert configs[name]["dynamic"] == {r"-:^m\.layers\.\d+\.mlp\.gate$": {}}
