"""The `fp8` format: FP8 weights in two-dimensional blocks under `quant_method: "fp8"`, the layout of DeepSeek-V3.

Transformers, vLLM and SGLang read it with their own FP8 layers; none of them needs this package. They find unquantized
layers by name; every other linear layer is FP8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.formats.base import ExportPlan, OutputFormat, register_format
from auto_round.formats.config_auto_round import AutoRoundFormat
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import AUTO_ROUND_FLOATS
from auto_round.schemes import QuantizationScheme


@register_format("fp8")
class Fp8Format(OutputFormat):
    """One block size for all layers; activations are quantized dynamically, in groups as wide as a block."""

    loadable_here: ClassVar[bool] = False
    experts_by_name: ClassVar[bool] = True
    supports_conv1d: ClassVar[bool] = False
    scale_dtype: ClassVar[torch.dtype | None] = None

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        size, inputs, codec = scheme.group_size, scheme.activations, codec_of(scheme)
        if (codec.family, codec.element) != ("fp", "e4m3"):
            return f"it holds 8-bit e4m3 weights, not {scheme.bits}-bit {scheme.data_type}"
        if not isinstance(size, tuple) or not scheme.sym:
            return "it holds symmetric two-dimensional blocks only, such as group_size (128, 128)"
        if inputs is None:
            return "its readers quantize activations too; use act_bits 8"
        if inputs != replace(inputs, dynamic=True, group_size=size[1], data_type=scheme.data_type):
            return f"its readers quantize activations dynamically in groups of {size[1]}, with the weights' data type"
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        assert isinstance(scheme.group_size, tuple)
        rows, columns = scheme.group_size
        if in_features % columns:
            return f"in_features={in_features} is not a multiple of the block's {columns}, which its readers require"
        if out_features % rows and out_features > rows:
            return f"out_features={out_features} is not a multiple of the block's {rows}, which Transformers requires"
        return None

    def check_plan(self, plan: ExportPlan) -> str | None:
        schemes = {plan.layers[name] for name in plan.quantized_layers()}
        if len(schemes) > 1:
            return f"it has one scheme for all layers, and this recipe has {len(schemes)}"
        for experts, names in _experts(plan).items():
            if len({plan.layers[name].quantizes_weights for name in names}) > 1:
                return f"readers expect all experts of a block to be quantized or none, and in {experts} only some are"
        return None

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return AUTO_ROUND_FLOATS

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        """The keys that Transformers and vLLM read, and AutoRound's record of the run's settings."""
        own = AutoRoundFormat().quantization_config(plan, default) or {}
        names = plan.unquantized_modules()
        # Transformers holds all experts of a block in one module.
        names += [experts for experts, members in _experts(plan).items() if set(names).issuperset(members)]
        assert isinstance(default.group_size, tuple)
        return {
            **{key: own[key] for key in own if key not in ("packing_format", "extra_config", "group_size")},
            "group_size": list(default.group_size),
            "quant_method": "fp8",
            "modules_to_not_convert": list(dict.fromkeys(names)),
        }


def _experts(plan: ExportPlan) -> dict[str, list[str]]:
    """Layers of each block's experts, by the module that holds the experts."""
    found: dict[str, list[str]] = {}
    for name in plan.layers:
        front, middle, _ = name.partition(".experts.")
        if middle:
            found.setdefault(f"{front}.experts", []).append(name)
    return found
