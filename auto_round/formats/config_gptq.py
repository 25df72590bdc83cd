"""The formats `auto_gptq` (`gptqmodel` is its other name) and `auto_awq`, for vLLM, SGLang, GPTQModel and AutoAWQ.

How readers of these files learn about single layers, and why the config has no `meta.quantizer`: docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from auto_round.formats.base import MARLIN, ExportPlan, SizeRule, number_pattern, register_format
from auto_round.formats.config_auto_round import AutoRoundAwqFormat, AutoRoundGptqFormat
from auto_round.layouts.base import Layout
from auto_round.layouts.integers import GptqLayout, stored_group_size
from auto_round.schemes import QuantizationScheme

Rule = Mapping[str, Any]
# Layers that engines fuse, and the name of the fused layer.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.[^.]+$")


@register_format("gptqmodel")  # the same files under GPTQModel's name
@register_format("auto_gptq")
class AutoGptqFormat(AutoRoundGptqFormat):
    """GPTQ v1: 2, 3, 4 and 8 bits, zero points stored minus one, groups in order (`desc_act: false`)."""

    cache_scale_tail: ClassVar[tuple[int, ...] | None] = None
    requires_full_groups: ClassVar[bool] = True
    config_files: ClassVar[tuple[str, ...]] = ("quantization_config.json", "quantize_config.json")
    stored_layout: ClassVar[Layout] = GptqLayout(1, g_idx=True)
    sizes: ClassVar[Mapping[str, SizeRule]] = {"int": SizeRule(32, 32)}
    fast_kernel: ClassVar[tuple[str, SizeRule] | None] = MARLIN

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        config: dict[str, Any] = {
            **_rule(default),
            "data_type": default.data_type,
            **plan.recorded_settings(),
            "autoround_version": plan.version,
            "block_name_to_quantize": plan.block_prefix(),
            "checkpoint_format": "gptq",
            "damp_percent": 0.01,
            "desc_act": False,
            "lm_head": any(not plan.in_block(name) for name in plan.quantized_layers()),
            "provider": "auto-round",
            "quant_method": "gptq",
            "true_sequential": False,
        }
        if rules := dynamic_rules(plan, default):
            config["dynamic"] = rules
        if any(map(plan.in_block, plan.dense_layers())):
            config["modules_in_block_to_quantize"] = [_quantized_module_names(plan)]
        return config


def dynamic_rules(plan: ExportPlan, default: QuantizationScheme) -> dict[str, Rule]:
    """GPTQModel's `dynamic`: regular expressions of layers that differ from the default, `-:` for unquantized ones; one
    for layers whose names differ only in numbers. Engines look up q, k and v under the name of the fused matrix, so it
    gets one too."""
    rules: dict[str, Rule | None] = {name: _rule(plan.layers[name]) for name in plan.quantized_layers()}
    rules.update(dict.fromkeys(plan.dense_in_blocks()))
    fused: dict[str, list[str]] = {}
    for name in rules:
        parent, _, leaf = name.rpartition(".")
        for joined, (first, *others) in _FUSED.items():
            members = [name, *(f"{parent}.{other}" for other in others)]
            if leaf == first and rules.keys() >= set(members):
                fused[f"{parent}.{joined}"] = members
    for name in rules:
        if match := _EXPERT.match(name):
            fused.setdefault(match[1], []).append(name)
    rules |= {name: rules[parts[0]] for name, parts in fused.items() if all(rules[p] == rules[parts[0]] for p in parts)}
    written: dict[str, Rule] = {}
    done: set[str] = set()
    for pattern_of in (number_pattern, partial(number_pattern, after="experts"), re.escape):
        alike: dict[str, list[str]] = {}
        for name in rules:
            alike.setdefault(pattern_of(name), []).append(name)
        for pattern, names in alike.items():
            rule = rules[names[0]]
            if names[0] in done or any(rules[n] != rule for n in names):
                continue
            done.update(names)
            if rule is None:
                written[f"-:^{pattern}$"] = {}
            elif rule != _rule(default):
                written[f"+:^{pattern}$"] = rule
    return written


def _rule(scheme: QuantizationScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": stored_group_size(scheme), "sym": scheme.sym}


def _quantized_module_names(plan: ExportPlan) -> list[str]:
    """Names of the quantized layers: those within a block where all blocks agree, else full names."""
    quantized: dict[str, set[bool]] = {}
    for name, scheme in plan.layers.items():
        block = next((block for block in plan.block_names if name.startswith(f"{block}.")), None)
        if block is not None:
            quantized.setdefault(name.removeprefix(f"{block}."), set()).add(scheme.quantizes_weights)
    if any(len(values) > 1 for values in quantized.values()):
        return plan.quantized_layers()
    outside = [name for name in plan.quantized_layers() if not plan.in_block(name)]
    return [name for name, values in quantized.items() if True in values] + outside


@register_format("auto_awq")
class AutoAwqFormat(AutoRoundAwqFormat):
    """AWQ, version gemm, 4 bits; zero points are stored unchanged. Readers take every linear layer that
    `modules_to_not_convert` does not match, by substring, regular expression or suffix, for packed, so full names are
    written. A packed output head cannot be described: Transformers and AutoAWQ always leave it unquantized."""

    cache_scale_tail: ClassVar[tuple[int, ...] | None] = None
    requires_full_groups: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, SizeRule]] = {"int": SizeRule(32, 32, group_multiple=32, outputs_by_group=True)}
    fast_kernel: ClassVar[tuple[str, SizeRule] | None] = MARLIN

    def check_plan(self, plan: ExportPlan) -> str | None:
        packed = plan.quantized_layers()
        sizes = sorted({stored_group_size(plan.layers[name]) for name in packed})
        if len(sizes) > 1:
            return f"an AWQ checkpoint has one group size, not {' and '.join(map(str, sizes))}"
        for name in packed:
            if not plan.in_block(name):
                return f"readers of AWQ treat {name} as unquantized, and it is quantized here"
        for dense in _awq_unquantized(plan):
            hit = next((name for name in packed if _awq_matches(dense, name)), None)
            if hit is not None:
                return f"listing {dense} in modules_to_not_convert would leave out {hit} too, which is quantized"
        return None

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        symmetric = all(plan.layers[name].sym for name in plan.quantized_layers())
        config: dict[str, Any] = {
            "bits": default.bits,
            "data_type": default.data_type,
            "group_size": stored_group_size(default),
            "sym": symmetric,
            **plan.recorded_settings(),
            "autoround_version": plan.version,
            "modules_to_not_convert": _awq_unquantized(plan),
            "provider": "auto-round",
            "quant_method": "awq",
            "to_quant_block_names": plan.block_prefix(),
            "version": "gemm",
            "zero_point": not symmetric,
        }
        # GPTQModel's own loader finds unquantized layers only here, and computes wrong results without it.
        rules = dynamic_rules(plan, default)
        return config | {"dynamic": rules} if rules else config


def _awq_unquantized(plan: ExportPlan) -> list[str]:
    """Unquantized linear layers, and routers whose names match no packed layer."""
    packed = plan.quantized_layers()
    routers = (name for name in plan.dense_in_blocks() if name not in plan.layers)
    return plan.dense_layers() + [n for n in routers if not any(_awq_matches(n, other) for other in packed)]


def _awq_matches(entry: str, name: str) -> bool:
    """Whether any reader would match the layer `name` with `entry`."""
    return entry in name or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None
