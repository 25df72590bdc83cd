"""The auto_gptq format: tensors, rules for single layers, and zero points that readers cannot hold."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer, group_count
from auto_round.formats.base import ExportPlan, get_format
from auto_round.formats.config_auto_round import flip_zero_zero_points
from auto_round.formats.config_gptq import dynamic_rules
from auto_round.layouts.integers import GPTQ_V1
from auto_round.schemes import QuantizationScheme as Scheme

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip
BLOCKS = tuple(f"model.layers.{i}" for i in range(12))


def plan(changes: dict[str, Scheme], default: Scheme | None = None, leaves: tuple[str, ...] = LEAVES) -> ExportPlan:
    """Twelve blocks; `changes` by the end of the name, such as `1.mlp.up_proj`."""
    default = default or Scheme()
    layers = {f"{block}.{leaf}": default for block in BLOCKS for leaf in leaves} | {"lm_head": Scheme(bits=16)}
    for end, scheme in changes.items():
        layers |= {name: scheme for name in layers if f".{name}".endswith(f".{end}")}
    return ExportPlan(default, layers, BLOCKS, version="1")


def layer(bits: int, sym: bool, group_size: int, out: int, width: int, seed: int = 0) -> QuantizedLayer:
    gen = torch.Generator().manual_seed(seed)
    groups = group_count(width, group_size)
    codes = torch.randint(0, 1 << bits, (out, width), generator=gen, dtype=torch.uint8)
    zero: Any = 1 << (bits - 1)
    if not sym:
        zero = torch.randint(0, 1 << bits, (out, groups), generator=gen, dtype=torch.uint8)
    scale = torch.randn(out, groups, generator=gen).half()
    return QuantizedLayer(
        "a.b", Scheme(bits=bits, sym=sym, group_size=group_size), IntCodes(codes, scale, zero, group_size)
    )


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), sym=st.booleans(), size=st.sampled_from([16, 32, 64, -1, 0]),
    out=st.integers(1, 2), width=st.integers(1, 3), seed=st.integers(0, 999),
    name=st.sampled_from(["auto_gptq", "gptqmodel"]),
)  # fmt: skip
def test_the_file_holds_the_layers_weights(
    bits: int, sym: bool, size: int, out: int, width: int, seed: int, name: str
) -> None:
    fmt, given_layer = get_format(name), layer(bits, sym, size, out * 32, width * 64, seed)
    restated = fmt.normalize_for_format(given_layer)
    tensors = fmt.pack(restated)
    codes, zeros = GPTQ_V1.codes(tensors["a.b.qweight"], bits), GPTQ_V1.zeros(tensors["a.b.qzeros"], bits)
    where = tensors["a.b.g_idx"].long()
    per_group = size if size > 0 else width * 64
    assert where.tolist() == [i // per_group for i in range(width * 64)]
    scales = tensors["a.b.scales"].float().T
    dense = scales[:, where] * (codes.float() - zeros[:, where].float())
    assert torch.equal(dense, given_layer.dequantize())
    # Readers that add 1 to whole words see the same zero points as those that add it to each.
    words = tensors["a.b.qzeros"].long() & 0xFFFFFFFF
    if bits in (2, 4, 8):
        ones = sum(1 << start for start in range(0, 32, bits))
        plain = ((words + ones) & 0xFFFFFFFF).unsqueeze(-1) >> torch.arange(0, 32, bits) & ((1 << bits) - 1)
        assert torch.equal(plain.flatten(1).T, zeros.long())


def test_symmetric_layers_and_layers_without_a_zero_zero_point_stay_as_they_are() -> None:
    for sym in (True, False):
        one = layer(4, sym, 32, 32, 64)
        if isinstance(one.codes.zero_point, torch.Tensor):
            one.codes.zero_point.clamp_(min=1)
        assert flip_zero_zero_points(one) is one


def test_a_plain_config() -> None:
    fmt = get_format("auto_gptq")
    assert fmt.config(plan({})) == {
        "autoround_version": "1", "bits": 4, "block_name_to_quantize": "model.layers", "checkpoint_format": "gptq",
        "damp_percent": 0.01, "data_type": "int", "desc_act": False, "group_size": 128, "lm_head": False,
        "provider": "auto-round", "quant_method": "gptq", "sym": True, "true_sequential": False,
    }  # fmt: skip
    assert fmt.config_files == ("quantization_config.json", "quantize_config.json")


def lookup(rules: dict[str, Any], name: str) -> Any:
    """GPTQModel's and vLLM's rule: the first expression that matches from the start; None for the default."""
    for rule, values in rules.items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), name):
            return False if rule.startswith("-:") else values
    return None


@pytest.mark.parametrize("changes", [
    {"1.self_attn.q_proj": Scheme(bits=8), "1.self_attn.k_proj": Scheme(bits=8), "1.self_attn.v_proj": Scheme(bits=8)},
    {"mlp.down_proj": Scheme(bits=8, group_size=32)},
    {"k_proj": Scheme(sym=False)},
    {"mlp.gate_proj": Scheme(bits=16), "mlp.up_proj": Scheme(bits=16), "11.mlp.down_proj": Scheme(bits=2)},
    {"1.mlp.down_proj": Scheme(bits=16), "lm_head": Scheme(bits=8, group_size=64)},
])  # fmt: skip
def test_every_layer_is_found_by_its_rule(changes: dict[str, Scheme]) -> None:
    made = plan(changes)
    config = get_format("auto_gptq").config(made)
    assert config is not None and json.loads(json.dumps(config)) == config
    for name, scheme in made.layers.items():
        found = lookup(config["dynamic"], name)
        if name == "lm_head" and not scheme.quantizes_weights:
            assert found is None and config["lm_head"] is False
        elif not scheme.quantizes_weights:
            assert found is False
        else:
            values = found or {key: config[key] for key in ("bits", "group_size", "sym")}
            assert values == {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
    assert config["lm_head"] == ("lm_head" in changes)


def test_rules_are_few() -> None:
    rules = dynamic_rules(plan({"mlp.down_proj": Scheme(bits=8)}), Scheme())
    assert rules == {
        r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 128, "sym": True},
    }
    rules = dynamic_rules(plan({"1.mlp.down_proj": Scheme(bits=16)}), Scheme())
    assert rules == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}


def test_joined_layers_have_a_rule_of_their_own() -> None:
    """Engines ask for `qkv_proj` and `gate_up_proj`; where the members differ there is nothing true to say."""
    eight = Scheme(bits=8)
    made = plan({f"self_attn.{x}_proj": eight for x in "qkv"} | {"mlp.gate_proj": eight})
    rules = dynamic_rules(made, Scheme())
    assert lookup(rules, "model.layers.3.self_attn.qkv_proj")["bits"] == 8
    assert lookup(rules, "model.layers.3.mlp.gate_up_proj") is None


def test_experts_share_a_rule() -> None:
    leaves = tuple(f"mlp.experts.{e}.{p}_proj" for e in range(30) for p in ("gate", "up", "down"))
    changes = {f"4.{leaf}": Scheme(bits=8) for leaf in leaves}
    made = plan(changes, leaves=(*leaves, "self_attn.o_proj"))
    rules = dynamic_rules(made, Scheme())
    assert len(rules) <= 5
    assert lookup(rules, "model.layers.4.mlp.experts")["bits"] == 8
    assert lookup(rules, "model.layers.4.mlp.experts.29.down_proj")["bits"] == 8
    assert lookup(rules, "model.layers.5.mlp.experts.29.down_proj") is None
    assert lookup(rules, "model.layers.5.mlp.experts") is None


@pytest.mark.parametrize("ends", [("mlp.down_proj",), ("1.mlp.down_proj", "2.self_attn.q_proj")])
def test_dense_layers_as_optimum_reads_them(ends: tuple[str, ...]) -> None:
    """It keeps a layer of a block when one of the listed names ends its full name."""
    made = plan(dict.fromkeys(ends, Scheme(bits=16)))
    config = get_format("auto_gptq").config(made)
    assert config is not None
    listed = sum(config["modules_in_block_to_quantize"], [])
    for name, scheme in made.layers.items():
        if made.in_block(name):
            assert any(name.endswith(entry) for entry in listed) == scheme.quantizes_weights
    assert len(listed) == (6 if len(ends) == 1 else 12 * 7 - 2)


def test_groups_that_do_not_fill_a_row() -> None:
    for name in ("auto_gptq", "auto_awq"):
        fmt = get_format(name)
        assert fmt.check_layer(Scheme(group_size=64), 576, 64) is None
        assert "choose one that divides it" in str(fmt.check_layer(Scheme(group_size=128), 576, 64))
        assert fmt.check_layer(Scheme(group_size=-1), 576, 64) is None
        assert "multiple of 32" in str(fmt.check_layer(Scheme(group_size=-1), 48, 64))


def test_nothing_quantized() -> None:
    for name in ("auto_gptq", "auto_awq"):
        assert get_format(name).config(ExportPlan(Scheme(bits=16), {"l.0.a": Scheme(bits=16)}, ("l.0",))) is None
