"""The `auto_awq` format: `quant_method: "awq"`, version gemm, 4 bits.

An AWQ config has one group size and a list of unquantized layers, `modules_to_not_convert`; readers take every other
linear layer of the model for packed. vLLM and SGLang match that list by substring, Transformers by regular expression
or suffix, so full names are written, and a plan is refused where an entry would also match a packed layer. The config
cannot describe a packed output head: Transformers and AutoAWQ always leave it unquantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from auto_round.formats.base import ExportPlan, register_format
from auto_round.formats.config_auto_round import AutoRoundAwqFormat
from auto_round.formats.config_gptq import dynamic_rules
from auto_round.formats.table import AWQ_SIZES, SizeRule
from auto_round.layouts.base import stored_group_size
from auto_round.schemes import QuantizationScheme


@register_format("auto_awq")
class AutoAwqFormat(AutoRoundAwqFormat):
    """Symmetric and asymmetric; zero points are stored unchanged, 8 for every group of a symmetric layer."""

    stores_cache_scales: ClassVar[bool] = False
    requires_full_groups: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, SizeRule]] = {"int": AWQ_SIZES}

    def check_plan(self, plan: ExportPlan) -> str | None:
        packed = plan.quantized_layers()
        sizes = sorted({stored_group_size(plan.layers[name]) for name in packed})
        if len(sizes) > 1:
            return f"an AWQ checkpoint has one group size, not {' and '.join(map(str, sizes))}"
        outside = [name for name in packed if not plan.in_block(name)]
        if outside:
            return f"readers of AWQ treat {outside[0]} as unquantized, and it is quantized here"
        for dense in _unquantized_layers(plan):
            hit = next((name for name in packed if _matches(dense, name)), None)
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
            "modules_to_not_convert": _unquantized_layers(plan),
            "provider": "auto-round",
            "quant_method": "awq",
            "to_quant_block_names": plan.block_prefix(),
            "version": "gemm",
            "zero_point": not symmetric,
        }
        # GPTQModel's own loader finds unquantized layers only here, and computes wrong results without it.
        rules = dynamic_rules(plan, default)
        return config | {"dynamic": rules} if rules else config


def _unquantized_layers(plan: ExportPlan) -> list[str]:
    """Unquantized linear layers, and routers whose names match no packed layer."""
    dense = [name for name, scheme in plan.layers.items() if not scheme.quantizes_weights]
    packed = plan.quantized_layers()
    routers = (name for name in plan.dense_in_blocks() if name not in plan.layers)
    return dense + [name for name in routers if not any(_matches(name, other) for other in packed)]


def _matches(entry: str, name: str) -> bool:
    """Whether any reader would match the layer `name` with `entry`."""
    return entry in name or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None
