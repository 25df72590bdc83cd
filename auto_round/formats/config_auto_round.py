"""The `auto_round` formats: `quant_method: "auto-round"`, GPTQ, AWQ, plain or small-float packing per layer.

| layer | packing_format | zero points in the file |
|---|---|---|
| symmetric integers | auto_round:auto_gptq | 2**(bits-1) - 1 |
| asymmetric integers, 4 bits | auto_round:auto_awq | unchanged |
| asymmetric integers, 2, 3 or 8 bits | auto_round | unchanged, GPTQ layout |
| mx_fp, nv_fp | auto_round:llm_compressor | none |
| mx_int | auto_round | none |
| fp with static activations | auto_round:fp8_static | none |
| fp otherwise | auto_round:fp8 | none |

The packing follows from the layer's own scheme, so tensors and config cannot disagree: a layer whose packing
differs from the default's is listed in `extra_config`. `layouts.floats` packs the small float types.

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

from auto_round.codecs.quantized_layer import QuantizedLayer, group_count
from auto_round.formats.base import ExportPlan, OutputFormat, TensorSpecs, register_format
from auto_round.layouts.awq import pack_awq
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import (
    AUTO_ROUND_FLOATS,
    float_family_of,
    float_problem,
    group_size_mismatch,
    is_float,
    minifloat_name,
)
from auto_round.layouts.gptq import pack_gptq, words_needed
from auto_round.schemes import QuantizationScheme

LLM_COMPRESSOR, FP8_STATIC, FP8, PLAIN_FLOAT_PACKING = (
    "auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8", "auto_round"
)  # fmt: skip


def float_packing(scheme: QuantizationScheme) -> str:
    """The `packing_format` in which a float layer is written."""
    family, activations = float_family_of(scheme.data_type), scheme.activations
    if family == "fp":
        return FP8_STATIC if activations is not None and not activations.dynamic else FP8
    return PLAIN_FLOAT_PACKING if family == "mx_int" else LLM_COMPRESSOR


def group_size_as_list(scheme: QuantizationScheme) -> int | list[int]:
    """`group_size` as it is."""
    return list(scheme.group_size) if isinstance(scheme.group_size, tuple) else scheme.group_size


def transformers_group_size(scheme: QuantizationScheme) -> int:
    """`group_size` as Transformers' config class takes it: columns of a block, -1 for a whole tensor."""
    size = scheme.group_size
    return size[1] if isinstance(size, tuple) else size or -1


def float_values(scheme: QuantizationScheme) -> dict[str, Any]:
    """Keys beside the usual ones when the default scheme is a float one."""
    if not is_float(scheme):
        return {}
    found: dict[str, Any] = {}
    if float_family_of(scheme.data_type) == "fp":
        activations = scheme.activations
        static = activations is not None and not activations.dynamic
        found = {"activation_scheme": "static" if static else "dynamic"}
        found["fmt"] = minifloat_name(scheme.data_type, scheme.bits)
    if isinstance(scheme.group_size, tuple):
        found["weight_block_size"] = list(scheme.group_size)
    elif scheme.group_size == 0:
        found["weight_strategy"] = "tensor"
    return found


# The `auto_round` format: `quant_method: "auto-round"`, with GPTQ, AWQ or plain packing of integers.
#
# | integers | packing_format | zero points in the file |
# |---|---|---|
# | symmetric | auto_round:auto_gptq | 2**(bits-1) - 1 |
# | asymmetric, 4 bits | auto_round:auto_awq | as they are |
# | asymmetric, 2, 3 or 8 bits | auto_round | as they are, GPTQ layout |
#
# Small float types are laid out by `float_layouts` and described by `auto_round_float`.
#
# The packing is a function of the layer's own scheme, so tensors and config cannot disagree: a layer whose packing is
# not the default's says so in `extra_config`.

GPTQ_PACKING, AWQ_PACKING, PLAIN_PACKING = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"
INT_BITS = (2, 3, 4, 8)
# Kernels of every runtime that reads these files work on tiles of 32, and 3-bit words need it.
SIZE_MULTIPLE = 32
SCALE_DTYPE = torch.float16
ACTIVATION_KEYS = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")


def packing_of(scheme: QuantizationScheme) -> str:
    """The `packing_format` in which a layer of `scheme` is written."""
    if is_float(scheme):
        return float_packing(scheme)
    if scheme.sym:
        return GPTQ_PACKING
    return AWQ_PACKING if scheme.bits == 4 else PLAIN_PACKING


def stored_group_size(scheme: QuantizationScheme) -> int:
    """`group_size` of integers as written: per tensor (0) becomes per channel (-1), with the scale repeated."""
    assert isinstance(scheme.group_size, int)
    return scheme.group_size if scheme.group_size > 0 else -1


def default_scheme(plan: ExportPlan) -> QuantizationScheme:
    """The scheme to write as the default: the run's own, or the commonest when no layer has that (16 bits, say, which
    no reader takes as a default)."""
    counts = Counter(plan.layers[name] for name in plan.quantized_layers())
    return plan.scheme if plan.scheme in counts else counts.most_common(1)[0][0]


def flip_zero_zero_points(layer: QuantizedLayer) -> QuantizedLayer:
    """The same weights with no zero point of 0, for files that store zero points less one.

    0 - 1 wraps to 2**bits - 1, and readers that add 1 to a whole word carry into the next zero point, others read
    2**bits. Turning such a group around costs nothing: with M = 2**bits - 1 and every c, s * (c - 0) is exactly
    -s * ((M - c) - M).
    """
    zero, codes, scale = layer.zero_point, layer.codes, layer.scale
    if not isinstance(zero, torch.Tensor) or codes is None or scale is None or bool(zero.all()):
        return layer
    size = stored_group_size(layer.scheme)
    top = (1 << layer.scheme.bits) - 1
    turned = zero == 0
    columns = turned.repeat_interleave(size if size > 0 else layer.in_features, 1)[:, : layer.in_features]
    return replace(
        layer,
        codes=torch.where(columns.expand_as(codes), top - codes, codes),
        scale=torch.where(turned, -scale, scale),
        zero_point=torch.where(turned, torch.full_like(zero, top), zero),
    )


@register_format("auto_round")
class AutoRoundFormat(OutputFormat):
    """Picks the packing of each layer by its scheme."""

    stores_cache_scales: ClassVar[bool] = True
    rejects_fused_layers: ClassVar[bool] = True
    support_schemes: ClassVar[tuple[str, ...]] = (
        "W4A16", "W2A16", "W3A16", "W8A16", "W2A16G64", "W2A16G32", "W4A16_MIXED", "MXFP4", "MXFP4_RCEIL", "MXFP8",
        "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK", "BF16",
    )  # fmt: skip

    # Whether it takes small float types.
    supports_floats: ClassVar[bool] = True

    def packing(self, scheme: QuantizationScheme) -> str:
        return packing_of(scheme)

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

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        if is_float(scheme):
            return AUTO_ROUND_FLOATS.named_specs(name, scheme, in_features, out_features, bias_dtype, model_dtype)
        groups = group_count(in_features, stored_group_size(scheme))
        out_words = words_needed(out_features, scheme.bits)
        if self.packing(scheme) == AWQ_PACKING:
            weight = (in_features, out_words)
        else:
            weight = (words_needed(in_features, scheme.bits), out_features)
        specs: TensorSpecs = {
            f"{name}.qweight": (weight, torch.int32),
            f"{name}.qzeros": ((groups, out_words), torch.int32),
            f"{name}.scales": ((groups, out_features), SCALE_DTYPE),
        }
        if bias_dtype is not None:
            specs[f"{name}.bias"] = ((out_features,), bias_dtype)
        return specs

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        if layer.element is not None:
            return AUTO_ROUND_FLOATS.named_tensors(layer, model_dtype)
        assert layer.codes is not None and layer.scale is not None and layer.zero_point is not None
        scheme = layer.scheme
        groups = group_count(layer.in_features, stored_group_size(scheme))
        zero = layer.zero_point
        if isinstance(zero, torch.Tensor):
            zero = zero.expand(layer.out_features, groups)
        packing = self.packing(scheme)
        if packing == AWQ_PACKING:
            qweight, qzeros = pack_awq(layer.codes, zero, scheme.bits, groups)
        else:
            offset = 1 if packing == GPTQ_PACKING else 0
            qweight, qzeros = pack_gptq(layer.codes, zero, scheme.bits, offset, groups)
        scales = layer.scale.expand(layer.out_features, groups).to(SCALE_DTYPE)
        tensors = {
            f"{layer.name}.qweight": qweight,
            f"{layer.name}.qzeros": qzeros,
            f"{layer.name}.scales": scales.T.contiguous(),
        }
        if layer.bias is not None:
            tensors[f"{layer.name}.bias"] = layer.bias
        return tensors

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        names = plan.quantized_layers()
        if not names:
            return None
        default = default_scheme(plan)
        config: dict[str, Any] = {
            **_values(default),
            "group_size": transformers_group_size(default) if is_float(default) else stored_group_size(default),
            **float_values(default),
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
        """Entries of the user's patterns, for people and scripts that look them up as they were given. Readers take the
        layers' own entries; a pattern is there only if it says the same of every layer that its expression finds."""
        found: dict[str, dict[str, Any]] = {}
        for pattern in plan.patterns:
            names = [name for name in (*plan.layers, *plan.other_matrices, *plan.spare) if re.search(pattern, name)]
            entries = [extra.get(name, {}) for name in names]
            if entries and entries[0] and all(entry == entries[0] for entry in entries):
                found[pattern] = entries[0]
        return found

    def file_config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """With the group size of blocks as it is, which vLLM's loader asks for and Transformers' refuses."""
        config = self.config(plan)
        if config is None or not is_float(default := default_scheme(plan)):
            return config
        return config | {"group_size": group_size_as_list(default)}

    def _extra(
        self, plan: ExportPlan, name: str, default: QuantizationScheme, dense: Container[str]
    ) -> dict[str, Any]:  # fmt: skip
        """The `extra_config` entry of one layer, empty when it follows from the rest of the config."""
        if name in dense:
            # Without `act_bits` auto-round takes the activations from the default, and has no kernel for such a layer.
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
        # vLLM takes an entry without bits for a dense layer.
        return {"bits": scheme.bits, **entry} if entry else {}


def _values(scheme: QuantizationScheme) -> dict[str, Any]:
    """What a config says of one scheme, with the defaults of its activations filled in."""
    found = {
        "bits": scheme.bits, "data_type": scheme.data_type, "sym": scheme.sym,
        "group_size": group_size_as_list(scheme) if is_float(scheme) else stored_group_size(scheme),
    }  # fmt: skip
    activations = scheme.activations
    if activations is not None:
        found |= {key: getattr(activations, key.removeprefix("act_")) for key in ACTIVATION_KEYS}
    return found


@register_format("auto_round:auto_gptq")
class AutoRoundGptqFormat(AutoRoundFormat):
    """Always GPTQ v1 packing: zero points are stored less one."""

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
    """The same files under another name, as the guide's table has it."""


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
        layout: packs a layer.
        packing_format: name of the layout in the config.
    """

    layout: ClassVar[Layout]
    packing_format: ClassVar[str]

    @abstractmethod
    def check_scheme(self, scheme: QuantizationScheme) -> str | None: ...

    def packing(self, scheme: QuantizationScheme) -> str:
        return self.packing_format

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        return self.layout.mismatch(scheme, in_features, out_features)

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        return self.layout.named_specs(name, scheme, in_features, out_features, bias_dtype, model_dtype)

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return self.layout.named_tensors(layer, model_dtype)


@register_format("auto_round:fp8")
class AutoRoundFp8Format(AutoRoundFormat):
    """FP8 in two-dimensional blocks, and nothing else."""

    support_schemes: ClassVar[tuple[str, ...]] = ("FP8_BLOCK",)

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if scheme.quantizes_weights and not (is_float(scheme) and isinstance(scheme.group_size, tuple)):
            return "it holds FP8 weights in two-dimensional blocks only"
        reason = super().check_scheme(scheme)
        if reason is None and scheme.quantizes_weights and self.packing(scheme) != FP8:
            return "its activations are quantized dynamically"
        return reason
