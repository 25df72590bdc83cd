"""The `auto_round` formats: `quant_method: "auto-round"`, with a packing chosen per layer.

| layer | packing_format | zero points in the file |
|---|---|---|
| symmetric integers | auto_round:auto_gptq | 2**(bits-1) - 1 |
| asymmetric integers, 4 bits | auto_round:auto_awq | unchanged |
| asymmetric integers, 2, 3 or 8 bits | auto_round | unchanged, GPTQ layout |
| mx_fp, nv_fp | auto_round:llm_compressor | none |
| mx_int | auto_round | none |
| fp with static activations | auto_round:fp8_static | none |
| fp otherwise | auto_round:fp8 | none |

The packing follows from the layer's own scheme, so tensors and config cannot disagree; a layer whose packing differs
from the default's is listed in `extra_config`.

Transformers 5.23 accepts a config only when `group_size` is -1 or positive, so block and per-tensor scales have
keys of their own: `weight_block_size` [rows, columns] and `weight_strategy` "tensor". vLLM's loader wants
`group_size` [128, 128] for blocks, and finds it in `quantization_config.json`. Neither checks the entries of
`extra_config`, which hold the scheme unchanged.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.formats.base import ExportPlan, OutputFormat, register_format
from auto_round.layouts.awq import AWQ
from auto_round.layouts.base import Layout, stored_group_size
from auto_round.layouts.floats import (
    AUTO_ROUND_FLOATS,
    float_family_of,
    float_problem,
    group_size_mismatch,
    is_float,
    minifloat_name,
)
from auto_round.layouts.gptq import GPTQ_V1, GPTQ_V2
from auto_round.schemes import QuantizationScheme

GPTQ_PACKING, AWQ_PACKING, PLAIN_PACKING = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"
LLM_COMPRESSOR, FP8_STATIC, FP8 = "auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8"
_LAYOUTS = {GPTQ_PACKING: GPTQ_V1, AWQ_PACKING: AWQ, PLAIN_PACKING: GPTQ_V2}
INT_BITS = (2, 3, 4, 8)
# Kernels of every runtime that reads these files work on tiles of 32, and 3-bit words need it.
SIZE_MULTIPLE = 32
_ACTIVATION_KEYS = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")


def _group_size(scheme: QuantizationScheme) -> int | list[int]:
    """`group_size` as JSON; per-tensor scales of integers are stored per channel."""
    if not is_float(scheme):
        return stored_group_size(scheme)
    return list(scheme.group_size) if isinstance(scheme.group_size, tuple) else scheme.group_size


def _float_values(scheme: QuantizationScheme) -> dict[str, Any]:
    """Keys of the config for a default scheme of a small float type, in place of an integer's `group_size`."""
    size, activations = scheme.group_size, scheme.activations
    # Transformers' config class takes the columns of a block, and -1 for a whole tensor.
    found: dict[str, Any] = {"group_size": size[1] if isinstance(size, tuple) else size or -1}
    if float_family_of(scheme.data_type) == "fp":
        static = activations is not None and not activations.dynamic
        found["activation_scheme"] = "static" if static else "dynamic"
        found["fmt"] = minifloat_name(scheme.data_type, scheme.bits)
    if isinstance(size, tuple):
        found["weight_block_size"] = list(size)
    elif size == 0:
        found["weight_strategy"] = "tensor"
    return found


def default_scheme(plan: ExportPlan) -> QuantizationScheme:
    """The default scheme to write: the run's own, or the most common one when no quantized layer has that."""
    counts = Counter(plan.layers[name] for name in plan.quantized_layers())
    return plan.scheme if plan.scheme in counts else counts.most_common(1)[0][0]


def flip_zero_zero_points(layer: QuantizedLayer) -> QuantizedLayer:
    """The same weights without zero points of 0, for files that store zero points minus one.

    0 - 1 wraps to 2**bits - 1: readers that add 1 to a whole word carry into the next zero point, others read 2**bits.
    Negating the scale of such a group is exact: with M = 2**bits - 1, s * (c - 0) = -s * ((M - c) - M).
    """
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

    stores_cache_scales: ClassVar[bool] = True
    rejects_fused_layers: ClassVar[bool] = True
    support_schemes: ClassVar[tuple[str, ...]] = (
        "W4A16", "W2A16", "W3A16", "W8A16", "W2A16G64", "W2A16G32", "W4A16_MIXED", "MXFP4", "MXFP4_RCEIL", "MXFP8",
        "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK", "BF16",
    )  # fmt: skip

    supports_floats: ClassVar[bool] = True

    def packing(self, scheme: QuantizationScheme) -> str:
        """The `packing_format` of a layer of `scheme`."""
        if not is_float(scheme):
            return GPTQ_PACKING if scheme.sym else AWQ_PACKING if scheme.bits == 4 else PLAIN_PACKING
        family, activations = float_family_of(scheme.data_type), scheme.activations
        if family == "fp":
            return FP8_STATIC if activations is not None and not activations.dynamic else FP8
        return PLAIN_PACKING if family == "mx_int" else LLM_COMPRESSOR

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return AUTO_ROUND_FLOATS if is_float(scheme) else _LAYOUTS[self.packing(scheme)]

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if not scheme.quantizes_weights:
            return None
        if is_float(scheme):
            return float_problem(scheme) if self.supports_floats else "it holds integers only"
        if scheme.data_type != "int":
            return f"data type {scheme.data_type!r} has no layout here"
        if scheme.quantizes_activations:
            return "activations are quantized, and the integer layouts hold weights only"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if not isinstance(scheme.group_size, int):
            return f"group_size {scheme.group_size} is a block, and the layout has groups along the input only"
        if scheme.bits not in INT_BITS:
            return f"{scheme.bits} bits have no packing here, only {', '.join(map(str, INT_BITS))}"
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        if is_float(scheme):
            return group_size_mismatch(scheme, in_features)
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % SIZE_MULTIPLE:
                return f"{what}={size} is not a multiple of {SIZE_MULTIPLE}"
        return None

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        names = plan.quantized_layers()
        if not names:
            return None
        default = default_scheme(plan)
        config: dict[str, Any] = {
            **_values(default),
            **(_float_values(default) if is_float(default) else {}),
            **plan.recorded_settings(),
            "autoround_version": plan.version,
            "block_name_to_quantize": plan.block_prefix(),
            "quant_method": "auto-round",
            "packing_format": self.packing(default),
        }
        dense = plan.dense_in_blocks()
        extra = {name: entry for name in (*plan.layers, *dense) if (entry := self._extra(plan, name, default, dense))}
        if extra:
            config["extra_config"] = {**self._patterns(plan, extra), **extra}
        return config

    def _patterns(self, plan: ExportPlan, extra: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Entries for the user's patterns, for scripts that look these up. Readers use the layers' entries; a pattern
        is written only if all layers that it matches have the same entry."""
        found: dict[str, dict[str, Any]] = {}
        for pattern in plan.patterns:
            names = [name for name in (*plan.layers, *plan.other_matrices, *plan.spare) if re.search(pattern, name)]
            entries = [extra.get(name, {}) for name in names]
            if entries and entries[0] and all(entry == entries[0] for entry in entries):
                found[pattern] = entries[0]
        return found

    def file_config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """With both sizes of a block as `group_size`, which vLLM's loader requires and Transformers' config rejects."""
        config = self.config(plan)
        if config is None or not is_float(default := default_scheme(plan)):
            return config
        return config | {"group_size": _group_size(default)}

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
        entry, usual = _values(scheme), {"act_bits": 16, **_values(default)}
        if plan.in_block(name):
            if not scheme.quantizes_activations:
                entry["act_bits"] = 16
            entry = {key: value for key, value in entry.items() if value != usual.get(key)}
        else:
            entry = {key: scheme[key] for key in scheme.get_attributes()} | entry
        if self.packing(scheme) != self.packing(default):
            entry["packing_format"] = self.packing(scheme)
        # vLLM treats a layer whose entry has no bits as unquantized.
        return {"bits": scheme.bits, **entry} if entry else {}


def _values(scheme: QuantizationScheme) -> dict[str, Any]:
    """The config's keys for one scheme, with those of its activations."""
    found = {
        "bits": scheme.bits, "data_type": scheme.data_type, "sym": scheme.sym, "group_size": _group_size(scheme),
    }  # fmt: skip
    activations = scheme.activations
    if activations is not None:
        found |= {key: getattr(activations, key.removeprefix("act_")) for key in _ACTIVATION_KEYS}
    return found


@register_format("auto_round:auto_gptq")
class AutoRoundGptqFormat(AutoRoundFormat):
    """Always GPTQ v1 packing: zero points are stored minus one."""

    supports_floats: ClassVar[bool] = False
    support_schemes: ClassVar[tuple[str, ...]] = (
        "W4A16", "W2A16", "W3A16", "W8A16", "W2A16G64", "W2A16G32", "W4A16_MIXED", "BF16",
    )  # fmt: skip

    def normalize_for_format(self, layer: QuantizedLayer) -> QuantizedLayer:
        return flip_zero_zero_points(layer)

    def packing(self, scheme: QuantizationScheme) -> str:
        return GPTQ_PACKING


@register_format("auto_round:gptqmodel")
class AutoRoundGptqModelFormat(AutoRoundGptqFormat):
    """The same files under the name that GPTQModel's users know."""


@register_format("auto_round:auto_awq")
class AutoRoundAwqFormat(AutoRoundFormat):
    """Always AWQ packing, 4 bits only."""

    supports_floats: ClassVar[bool] = False
    support_schemes: ClassVar[tuple[str, ...]] = ("W4A16", "BF16")

    def packing(self, scheme: QuantizationScheme) -> str:
        return AWQ_PACKING

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        reason = super().check_scheme(scheme)
        if reason is None and scheme.quantizes_weights and scheme.bits != 4:
            return f"the AWQ layout holds 4-bit weights, not {scheme.bits}-bit ones"
        return reason


class LayoutFormat(AutoRoundFormat):
    """Base class of a plugin's format: one `Layout`, described by AutoRound's `quantization_config`.

    Transformers opens the files when the layout is registered too (`auto_round.inference.table.register_layout`).

    Attributes:
        stored_layout: packs a layer.
        packing_format: name of the layout in the config.
    """

    stored_layout: ClassVar[Layout]
    packing_format: ClassVar[str]

    @abstractmethod
    def check_scheme(self, scheme: QuantizationScheme) -> str | None: ...

    def packing(self, scheme: QuantizationScheme) -> str:
        return self.packing_format

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        return self.stored_layout.mismatch(scheme, in_features, out_features)

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return self.stored_layout


@register_format("auto_round:fp8")
class AutoRoundFp8Format(AutoRoundFormat):
    """FP8 in two-dimensional blocks only."""

    support_schemes: ClassVar[tuple[str, ...]] = ("FP8_BLOCK",)

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if scheme.quantizes_weights and not (is_float(scheme) and isinstance(scheme.group_size, tuple)):
            return "it holds FP8 weights in two-dimensional blocks only"
        reason = super().check_scheme(scheme)
        if reason is None and scheme.quantizes_weights and self.packing(scheme) != FP8:
            return "its activations are quantized dynamically"
        return reason
