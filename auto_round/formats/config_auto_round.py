"""The `auto_round` formats: `quant_method: "auto-round"`, with a packing chosen per layer.

The packing follows from the layer's own scheme, so tensors and config cannot disagree; a layer whose packing differs
from the default's is listed in `extra_config`. The packings: docs/files.md; the sizes of groups: docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.formats.base import ExportPlan, OutputFormat, SizeRule, register_format
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import AUTO_ROUND_FLOATS, has_input_scale
from auto_round.layouts.integers import AWQ, GPTQ_V1, GPTQ_V2, stored_group_size
from auto_round.schemes import ACTIVATION_KEYS, QuantizationScheme

GPTQ_PACKING, AWQ_PACKING, PLAIN_PACKING = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"
LLM_COMPRESSOR, FP8_STATIC, FP8 = "auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8"
_INTEGERS = {GPTQ_PACKING: GPTQ_V1, AWQ_PACKING: AWQ, PLAIN_PACKING: GPTQ_V2}
_FLOATS = {"mx_fp": LLM_COMPRESSOR, "nv_fp": LLM_COMPRESSOR, "mx_int": PLAIN_PACKING, "fp": FP8}  # by codec family
# Kernels of every runtime that reads AutoRound's files work on tiles of 32, and 3-bit words need it.
_SIZES = MappingProxyType({"int": SizeRule(32, 32, whole_groups=False)})


def flip_zero_zero_points(layer: QuantizedLayer) -> QuantizedLayer:
    """The same weights without zero points of 0, for files that store zero points minus one, where readers disagree
    about it. Negating the scale of such a group is exact: with M = 2**bits - 1, s * (c - 0) = -s * ((M - c) - M)."""
    own = layer.codes_as(IntCodes)
    zero = own.zero_point
    if not isinstance(zero, torch.Tensor) or bool(zero.all()):
        return layer
    size = stored_group_size(layer.scheme)
    top = (1 << layer.scheme.bits) - 1
    flipped = zero == 0
    columns = flipped.repeat_interleave(size if size > 0 else layer.in_features, 1)[:, : layer.in_features]
    flipped_codes = replace(
        own,
        codes=torch.where(columns.expand_as(own.codes), top - own.codes, own.codes),
        scale=torch.where(flipped, -own.scale, own.scale),
        zero_point=torch.where(flipped, torch.full_like(zero, top), zero),
    )
    return replace(layer, codes=flipped_codes)


@register_format("auto_round")
class AutoRoundFormat(OutputFormat):
    """Chooses the packing of each layer by its scheme."""

    cache_scale_tail: ClassVar[tuple[int, ...] | None] = ()
    rejects_fused_layers: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES

    def packing(self, scheme: QuantizationScheme) -> str:
        """The `packing_format` of a layer of `scheme`. Integers store their zero points unchanged, except in GPTQ's."""
        if floats := _FLOATS.get(codec_of(scheme).family):
            return FP8_STATIC if has_input_scale(scheme) else floats
        return GPTQ_PACKING if scheme.sym else AWQ_PACKING if scheme.bits == 4 else PLAIN_PACKING

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return AUTO_ROUND_FLOATS if codec_of(scheme).family in _FLOATS else _INTEGERS[self.packing(scheme)]

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        packing, values = self.packing(default), self._values(default)
        size, config = values["group_size"], dict(values)
        # Transformers' class takes the columns of a block as `group_size`, and -1 for a whole tensor.
        config["group_size"] = size[1] if isinstance(size, list) else size or -1
        if packing in (FP8, FP8_STATIC):
            config["activation_scheme"] = "static" if packing == FP8_STATIC else "dynamic"
            config["fmt"] = codec_of(default).element
        if isinstance(size, list):
            config["weight_block_size"] = size
        elif size == 0:
            config["weight_strategy"] = "tensor"
        config |= {
            **plan.recorded_settings(),
            "autoround_version": plan.version,
            "block_name_to_quantize": plan.block_prefix(),
            "quant_method": "auto-round",
            "packing_format": packing,
        }
        dense = plan.dense_in_blocks()
        extra = {name: entry for name in (*plan.layers, *dense) if (entry := self._extra(plan, name, default, dense))}
        # Entries for the user's patterns, for scripts that look these up. Readers use the layers' entries; a pattern is
        # written only if all layers that it matches have the same entry.
        patterns: dict[str, dict[str, Any]] = {}
        for pattern in plan.patterns:
            names = (name for name in (*plan.layers, *plan.other_matrices, *plan.spare) if re.search(pattern, name))
            first, *others = [extra.get(name, {}) for name in names] or [{}]
            if first and all(entry == first for entry in others):
                patterns[pattern] = first
        return config | ({"extra_config": {**patterns, **extra}} if extra else {})

    def file_config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """With both sizes of a block as `group_size`, which vLLM's loader requires and Transformers' config rejects."""
        config = self.config(plan)
        return config and config | {"group_size": self._values(plan.default_scheme())["group_size"]}

    def _values(self, scheme: QuantizationScheme) -> dict[str, Any]:
        """The config's keys for one scheme, with those of its activations."""
        size, inputs = self.layout(scheme).group_size(scheme), scheme.activations
        found = {
            "bits": scheme.bits, "data_type": scheme.data_type, "sym": scheme.sym,
            "group_size": list(size) if isinstance(size, tuple) else size,
        }  # fmt: skip
        if inputs is None:
            return found
        return found | {key: getattr(inputs, key.removeprefix("act_")) for key in ACTIVATION_KEYS}

    def _extra(
        self, plan: ExportPlan, name: str, default: QuantizationScheme, dense: Container[str]
    ) -> dict[str, Any]:  # fmt: skip
        """The `extra_config` entry of one layer, empty when the rest of the config implies it."""
        if name in dense:
            # Without `act_bits` auto-round quantizes the activations by default, and has no kernel for such a layer.
            return {"bits": 16, "act_bits": 16} if default.quantizes_activations else {"bits": 16}
        scheme = plan.layers[name]
        if not scheme.quantizes_weights:
            return {}
        entry, usual = self._values(scheme), {"act_bits": 16, **self._values(default)}
        if plan.in_block(name):
            entry |= {} if scheme.quantizes_activations else {"act_bits": 16}
            entry = {key: value for key, value in entry.items() if value != usual.get(key)}
        else:
            entry = {**scheme, **entry}
        if self.packing(scheme) != self.packing(default):
            entry["packing_format"] = self.packing(scheme)
        # vLLM treats a layer whose entry has no bits as unquantized.
        return {"bits": scheme.bits, **entry} if entry else {}


class LayoutFormat(AutoRoundFormat):
    """Base class of a format with one `Layout` for all layers, described by AutoRound's `quantization_config` as
    `packing_format`. Transformers opens a plugin's files when the layout is registered too (`register_layout` of
    `auto_round.inference.table`)."""

    stored_layout: ClassVar[Layout]
    packing_format: ClassVar[str]
    sizes: ClassVar[Mapping[str, SizeRule]] = MappingProxyType({})

    def packing(self, scheme: QuantizationScheme) -> str:
        return self.packing_format

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return self.stored_layout


@register_format("auto_round:gptqmodel")  # the name that GPTQModel's users know
@register_format("auto_round:auto_gptq")
class AutoRoundGptqFormat(LayoutFormat):
    """Always GPTQ v1 packing: zero points are stored minus one."""

    stored_layout: ClassVar[Layout] = GPTQ_V1
    packing_format: ClassVar[str] = GPTQ_PACKING
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES

    def normalize_for_format(self, layer: QuantizedLayer) -> QuantizedLayer:
        return flip_zero_zero_points(layer)


@register_format("auto_round:auto_awq")
class AutoRoundAwqFormat(LayoutFormat):
    """Always AWQ packing, 4 bits only."""

    stored_layout: ClassVar[Layout] = AWQ
    packing_format: ClassVar[str] = AWQ_PACKING
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES


@register_format("auto_round:fp8")
class AutoRoundFp8Format(AutoRoundFormat):
    """FP8 in two-dimensional blocks only."""

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        if not isinstance(scheme.group_size, tuple) or self.packing(scheme) not in (FP8, FP8_STATIC):
            return "it holds FP8 weights in two-dimensional blocks only"
        reason = super().scheme_problem(scheme)
        return reason or (None if self.packing(scheme) == FP8 else "its activations are quantized dynamically")
