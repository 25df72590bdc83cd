"""The `auto_gptq` format (`gptqmodel` is its other name): `quant_method: "gptq"`, GPTQ v1 tensors with `g_idx`.

How readers of these files learn about single layers:

| what | GPTQModel, vLLM, SGLang | Transformers with optimum |
|---|---|---|
| other bits, group size, symmetry | `dynamic`, `+:regex` | not at all |
| an unquantized layer in a block | `dynamic`, `-:regex` | `modules_in_block_to_quantize` |
| a packed output head | `lm_head: true` | not at all |
| unquantized layers outside blocks | follows from `lm_head` | follows from the blocks |

Serving engines look up q, k and v under the name of the fused matrix, such as `qkv_proj`, so rules that hold for all
members are written for that name too.

The config has no `meta.quantizer`. GPTQModel's own loader opens asymmetric v1 files only when that key names
gptqmodel >= 0.9.0, which would be untrue, and Transformers' AutoRoundConfig refuses every GPTQ file that has `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from auto_round.formats.base import ExportPlan, number_pattern, register_format
from auto_round.formats.config_auto_round import AutoRoundGptqFormat
from auto_round.formats.table import GPTQ_SIZES, SizeRule
from auto_round.layouts.base import Layout, stored_group_size
from auto_round.layouts.gptq import GptqLayout
from auto_round.schemes import QuantizationScheme

Rule = Mapping[str, Any]
# Layers that engines fuse, and the name of the fused layer.
_FUSED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
)
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.[^.]+$")


@register_format("gptqmodel")  # the same files under GPTQModel's name
@register_format("auto_gptq")
class AutoGptqFormat(AutoRoundGptqFormat):
    """GPTQ v1: 2, 3, 4 and 8 bits, zero points stored minus one, groups in order (`desc_act: false`)."""

    stores_cache_scales: ClassVar[bool] = False
    requires_full_groups: ClassVar[bool] = True
    config_files: ClassVar[tuple[str, ...]] = ("quantization_config.json", "quantize_config.json")
    stored_layout: ClassVar[Layout] = GptqLayout(1, g_idx=True)
    sizes: ClassVar[Mapping[str, SizeRule]] = {"int": GPTQ_SIZES}

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
        rules = dynamic_rules(plan, default)
        if rules:
            config["dynamic"] = rules
        if any(plan.in_block(n) and not s.quantizes_weights for n, s in plan.layers.items()):
            config["modules_in_block_to_quantize"] = [_quantized_module_names(plan)]
        return config


def dynamic_rules(plan: ExportPlan, default: QuantizationScheme) -> dict[str, Rule]:
    """GPTQModel's `dynamic`: regular expressions of layers that differ from the default, `-:` for unquantized ones.

    Layers whose names differ only in numbers (of blocks, of experts) share one rule where all of them agree.
    """
    rules: dict[str, Rule | None] = {name: _rule(plan.layers[name]) for name in plan.quantized_layers()}
    rules.update(dict.fromkeys(plan.dense_in_blocks()))
    rules |= _fused_rules(rules)
    usual = _rule(default)
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
            elif rule != usual:
                written[f"+:^{pattern}$"] = rule
    return written


def _rule(scheme: QuantizationScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": stored_group_size(scheme), "sym": scheme.sym}


def _fused_rules(rules: Mapping[str, Rule | None]) -> dict[str, Rule | None]:
    """Rules for fused layers whose members agree."""
    found: dict[str, Rule | None] = {}
    for name in rules:
        parent, _, leaf = name.rpartition(".")
        for leaves, fused in _FUSED:
            members = [f"{parent}.{other}" for other in leaves]
            if leaf == leaves[0] and all(m in rules and rules[m] == rules[name] for m in members):
                found[f"{parent}.{fused}"] = rules[name]
    experts: dict[str, list[Rule | None]] = {}
    for name, rule in rules.items():
        if match := _EXPERT.match(name):
            experts.setdefault(match[1], []).append(rule)
    return found | {parent: own[0] for parent, own in experts.items() if all(rule == own[0] for rule in own)}


def _quantized_module_names(plan: ExportPlan) -> list[str]:
    """Names of the quantized layers: those within a block where all blocks agree, else full names."""
    quantized: dict[str, set[bool]] = {}
    for name, scheme in plan.layers.items():
        for block in plan.block_names:
            if name.startswith(f"{block}."):
                quantized.setdefault(name.removeprefix(f"{block}."), set()).add(scheme.quantizes_weights)
                break
    if any(len(values) > 1 for values in quantized.values()):
        return plan.quantized_layers()
    outside = [name for name in plan.quantized_layers() if not plan.in_block(name)]
    return [name for name, values in quantized.items() if True in values] + outside
