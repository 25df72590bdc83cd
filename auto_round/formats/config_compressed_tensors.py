"""The `llm_compressor` format: checkpoints and `quantization_config` of the compressed-tensors library.

| scheme | format | weights | inputs |
|---|---|---|---|
| integers, weights alone, 2 to 8 bits | pack-quantized | `weight_packed`, `weight_scale`, `weight_shape` | none |
| integers, weights and activations | int-quantized | `weight` int8, `weight_scale` | int, static or dynamic |
| MXFP4 | mxfp4-pack-quantized | float 4, group 32, E8M0 bytes | the same, dynamic |
| MXFP8 | mxfp8-quantized | float 8, group 32, E8M0 bytes | the same, dynamic |
| NVFP4 | nvfp4-pack-quantized | float 4, tensor_group 16, e4m3 scales | the same, dynamic "local" |
| FPW8A16 | naive-quantized | float 8, tensor | none |
| FP8_STATIC | float-quantized | float 8, channel | float 8, tensor, static |
| FP8_BLOCK | float-quantized | float 8, block | float 8, group 128, dynamic |

Asymmetric integer weights add `weight_zero_point`, packed in the first layout and int8 in the second. Static
activations add `input_scale` (and `input_zero_point` int8 when asymmetric), one value per layer. "local": group
scales are computed from each input, below a fixed scale of the whole input. The keys are those of the library's
`QuantizationArgs` (0.20), which rejects any other. `layouts.floats` packs the small float types.

The config writes one scheme for all layers as the class `Linear` with exceptions in `ignore`, which every runtime
knows. With several schemes each group names its layers: a runtime that fuses layers (vLLM's q, k and v) would
otherwise match the class before the names. Layers whose names differ only in numbers share one regular expression
where all of them, in the whole model, belong to one group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer, group_count
from auto_round.formats.base import CodesAndParams, ExportPlan, OutputFormat, TensorSpecs, register_format
from auto_round.formats.cache_scales import kv_cache_scheme
from auto_round.formats.config_auto_round import AutoRoundFormat, stored_group_size
from auto_round.formats.table import COMPRESSED_TENSORS_SIZES as RULE
from auto_round.layouts.floats import (
    COMPRESSED_TENSORS_FLOATS,
    float_family_of,
    float_problem,
    group_size_mismatch,
    has_input_global_scale,
    is_float,
)
from auto_round.layouts.packed_int import pack_rows, packed_words, signed_values, stored_codes, unpack_rows
from auto_round.schemes import ActivationScheme, GroupSize, QuantizationScheme

MX_GROUP, NV_GROUP = 32, 16
_SCALE_DTYPES = {"mx_fp": "torch.uint8", "nv_fp": "torch.float8_e4m3fn"}
_GROUPS = {"mx_fp": MX_GROUP, "nv_fp": NV_GROUP}


def float_format(scheme: QuantizationScheme) -> str:
    """The library's name of a layer's layout."""
    family = float_family_of(scheme.data_type)
    if family == "mx_fp":
        return "mxfp4-pack-quantized" if scheme.bits == 4 else "mxfp8-quantized"
    if family == "nv_fp":
        return "nvfp4-pack-quantized"
    return "float-quantized" if scheme.quantizes_activations else "naive-quantized"


def float_weights(scheme: QuantizationScheme) -> dict[str, Any]:
    """The group's `weights`."""
    return _arguments(scheme.data_type, scheme.bits, scheme.group_size) | {"dynamic": False}


def float_inputs(scheme: QuantizationScheme) -> dict[str, Any] | None:
    """The group's `input_activations`."""
    activations = scheme.activations
    if activations is None:
        return None
    added: dict[str, Any] = {"dynamic": activations.dynamic}
    if float_family_of(activations.data_type) == "nv_fp":
        added = {"dynamic": "local", "observer": "static_minmax"}
    size = activations.group_size if activations.dynamic else 0
    found = _arguments(activations.data_type, activations.bits, size) | added
    if found["strategy"] == "channel":
        found["strategy"] = "token"
    return found


def _arguments(data_type: str, bits: int, size: GroupSize) -> dict[str, Any]:
    family = float_family_of(data_type)
    found: dict[str, Any] = {"group_size": None, "num_bits": bits, "symmetric": True, "type": "float"}
    if isinstance(size, tuple):
        return found | {"strategy": "block", "block_structure": list(size)}
    if family in _SCALE_DTYPES:
        strategy = "tensor_group" if family == "nv_fp" else "group"
        return found | {"strategy": strategy, "group_size": size, "scale_dtype": _SCALE_DTYPES[family]}
    if size > 0:
        return found | {"strategy": "group", "group_size": size}
    return found | {"strategy": "tensor" if size == 0 else "channel"}


def float_scheme_problem(scheme: QuantizationScheme) -> str | None:
    """Why the library cannot say a float scheme, or None."""
    problem = float_problem(scheme)
    if problem is not None:
        return problem
    problem = _type_problem("weights", scheme.data_type, scheme.group_size)
    activations = scheme.activations
    if problem is not None or activations is None:
        return problem
    return _type_problem("activations", activations.data_type, activations.group_size) or _inputs_problem(
        scheme, activations
    )


def _type_problem(what: str, data_type: str, size: GroupSize) -> str | None:
    family = float_family_of(data_type)
    if family == "mx_int":
        return f"compressed-tensors has no {what} of data type {data_type!r}"
    if "e5m2" in data_type:
        return f"compressed-tensors has no e5m2 {what}, only e4m3"
    wanted = _GROUPS.get(str(family))
    if wanted is not None and size != wanted:
        return f"{what} of data type {data_type!r} need groups of {wanted} in compressed-tensors, not {size}"
    return None


def _inputs_problem(scheme: QuantizationScheme, activations: ActivationScheme) -> str | None:
    if not isinstance(activations.group_size, int):
        return f"activations have scales for groups along the input, not blocks of {activations.group_size}"
    if float_family_of(activations.data_type) == "nv_fp" and not has_input_global_scale(scheme):
        return (
            "its readers need a global scale of the inputs that is fixed: use act_data_type nv_fp4_with_static_gs, not "
            f"{activations.data_type}"
        )
    return None


def float_layer_problem(scheme: QuantizationScheme, in_features: int) -> str | None:
    """Why the library's readers do not take a layer of this width, or None. Blocks may be short of rows only."""
    reason = group_size_mismatch(scheme, in_features)
    if reason is not None:
        return reason
    sizes = [("group size", scheme.group_size if isinstance(scheme.group_size, int) else scheme.group_size[1])]
    activations = scheme.activations
    if activations is not None and activations.dynamic and isinstance(activations.group_size, int):
        sizes.append(("activation group size", activations.group_size))
    for what, size in sizes:
        if size > 0 and in_features % size:
            return f"in_features={in_features} is not a multiple of the {what} {size}, which its readers ask for"
    return None


# `quantization_config` of compressed-tensors: which layers belong to which group, and which are left alone.
#
# One scheme for all layers is written as the class `Linear` with exceptions in `ignore`, as every runtime knows it.
# With several schemes each group names its layers: a runtime that joins layers (vLLM's q, k and v) would otherwise
# take the class before the names. Layers whose names differ in numbers only share one regular expression where all of
# them, in the whole model, belong together.

PACK_QUANTIZED, INT_QUANTIZED, MIXED_PRECISION = "pack-quantized", "int-quantized", "mixed-precision"


def format_of(scheme: QuantizationScheme) -> str:
    """The library's name of a layer's layout: packed words for weights alone, int8 next to quantized activations."""
    if is_float(scheme):
        return float_format(scheme)
    return INT_QUANTIZED if scheme.quantizes_activations else PACK_QUANTIZED


def weight_arguments(scheme: QuantizationScheme) -> dict[str, Any]:
    """The group's `weights`. Per-tensor scales of integers are written per channel, repeated."""
    if is_float(scheme):
        return float_weights(scheme)
    assert isinstance(scheme.group_size, int)
    grouped = scheme.group_size > 0
    return {
        "dynamic": False,
        "group_size": scheme.group_size if grouped else None,
        "num_bits": scheme.bits,
        "strategy": "group" if grouped else "channel",
        "symmetric": scheme.sym,
        "type": "int",
    }


def input_arguments(scheme: QuantizationScheme) -> dict[str, Any] | None:
    """The group's `input_activations`."""
    activations = scheme.activations
    if activations is None:
        return None
    if is_float(scheme):
        return float_inputs(scheme)
    size = activations.group_size
    assert isinstance(size, int)
    grouped = activations.dynamic and size > 0
    strategy = "group" if grouped else "token" if activations.dynamic and size == -1 else "tensor"
    return {
        "dynamic": activations.dynamic,
        "group_size": size if grouped else None,
        "num_bits": activations.bits,
        "strategy": strategy,
        "symmetric": activations.sym,
        "type": "int",
    }


def compressed_config(plan: ExportPlan) -> dict[str, Any] | None:
    """The whole `quantization_config`, None when no layer is quantized."""
    names = plan.quantized_layers()
    if not names:
        return None
    groups: dict[str, list[str]] = defaultdict(list)
    arguments: dict[str, dict[str, Any]] = {}
    for name in names:
        scheme = plan.layers[name]
        group = {
            "format": format_of(scheme), "input_activations": input_arguments(scheme), "output_activations": None,
            "weights": weight_arguments(scheme),
        }  # fmt: skip
        key = repr(group)
        arguments[key] = group
        groups[key].append(name)
    dense = [name for name in plan.layers if name not in set(names)] + [
        name for name in (*plan.other_matrices, *plan.spare) if name not in plan.layers
    ]
    everything = [*plan.layers, *dense]
    single = len(groups) == 1
    # The most common group comes first.
    order = sorted(groups, key=lambda key: -len(groups[key]))
    formats = {arguments[key]["format"] for key in order}
    return {
        "config_groups": {
            f"group_{i}": {
                **arguments[key],
                "targets": ["Linear"] if single else name_patterns(groups[key], everything),
            }
            for i, key in enumerate(order)
        },
        "format": formats.pop() if len(formats) == 1 else MIXED_PRECISION,
        "global_compression_ratio": None,
        "ignore": name_patterns(dense, everything),
        "kv_cache_scheme": kv_cache_scheme(plan.settings),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def name_patterns(names: Iterable[str], everything: Collection[str]) -> list[str]:
    """Exact names, and `re:` patterns for those that differ in numbers only and have no other member in `everything`.

    A pattern starts with `.*`: wrappers of other programs put words in front of a model's names.
    """
    wanted = list(dict.fromkeys(names))
    chosen = set(wanted)
    families: dict[str, set[str]] = defaultdict(set)
    for name in everything:
        families[_number_pattern(name)].add(name)
    result: dict[str, None] = {}
    for name in wanted:
        family = families[_number_pattern(name)]
        whole = len(family) > 1 and family <= chosen
        result["re:.*" + _number_pattern(name) + "$" if whole else name] = None
    return list(result)


def _number_pattern(name: str) -> str:
    """A regular expression for the name with any numbers in it."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


# The `llm_compressor` format: checkpoints of the compressed-tensors library.
#
# Small float types are described in `compressed_tensors_float` and laid out by `float_layouts`; integers here:
#
# | scheme | layout | tensors of a layer |
# |---|---|---|
# | weights alone, 2 to 8 bits | pack-quantized | `weight_packed`, `weight_scale`, `weight_shape` |
# | weights and activations | int-quantized | `weight` int8, `weight_scale` |
#
# Asymmetric weights add `weight_zero_point`, packed in the first layout and int8 in the second. Static
# activations add `input_scale` (and `input_zero_point` int8 when asymmetric), one value a layer.

# The library casts scales to the model's dtype as it reads them; the file holds what the codes were decided with.
SCALE_DTYPE = torch.float16


@register_format("llm_compressor")
class CompressedTensorsFormat(OutputFormat):
    """Opens in Transformers with compressed-tensors installed, and in vLLM."""

    loadable_here: ClassVar[bool] = False
    experts_by_name: ClassVar[bool] = True
    supports_conv1d: ClassVar[bool] = False
    # One `kv_cache_scheme` describes them, and the library's own tensors are [heads, 1, 1].
    stores_cache_scales: ClassVar[bool] = True
    single_cache_granularity: ClassVar[bool] = True
    cache_scale_tail: ClassVar[tuple[int, ...]] = (1, 1)
    support_schemes: ClassVar[tuple[str, ...]] = (
        "W4A16", "W2A16", "W3A16", "W5A16", "W6A16", "W8A16", "W2A16G64", "W2A16G32", "W4A16_MIXED", "INT8",
        "INT8_W8A8", "INT4", "MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "NVFP4", "FPW8A16", "FP8_STATIC",
        "FP8_BLOCK", "BF16",
    )  # fmt: skip

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if not scheme.quantizes_weights:
            return None
        if is_float(scheme):
            return float_scheme_problem(scheme)
        if scheme.data_type != "int":
            return f"data type {scheme.data_type!r} is not written by this version, only int"
        activations = scheme.activations
        if activations is not None and (activations.data_type != "int" or not isinstance(activations.group_size, int)):
            return f"activations of data type {activations.data_type!r} next to integer weights have no layout here"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if not isinstance(scheme.group_size, int):
            return f"group_size {scheme.group_size} is a block, and the layout has groups along the input only"
        if not 2 <= scheme.bits <= 8:
            return f"{scheme.bits} bits have no layout here, only 2 to 8"
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        if is_float(scheme):
            return float_layer_problem(scheme, in_features)
        problem = RULE.problem(in_features, out_features, stored_group_size(scheme))
        activations = scheme.activations
        if problem is None and activations is not None and activations.dynamic:
            size = activations.group_size
            problem = RULE.problem(in_features, out_features, size) if isinstance(size, int) else None
            problem = problem and f"activations: {problem}"
        return problem

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        if is_float(scheme):
            return COMPRESSED_TENSORS_FLOATS.named_specs(
                name, scheme, in_features, out_features, bias_dtype, model_dtype
            )
        groups = group_count(in_features, stored_group_size(scheme))
        specs: TensorSpecs = {}
        if format_of(scheme) == PACK_QUANTIZED:
            specs[f"{name}.weight_packed"] = ((out_features, packed_words(in_features, scheme.bits)), torch.int32)
            specs[f"{name}.weight_shape"] = ((2,), torch.int64)
            zeros = ((packed_words(out_features, scheme.bits), groups), torch.int32)
        else:
            specs[f"{name}.weight"] = ((out_features, in_features), torch.int8)
            zeros = ((out_features, groups), torch.int8)
        specs[f"{name}.weight_scale"] = ((out_features, groups), SCALE_DTYPE)
        if not scheme.sym:
            specs[f"{name}.weight_zero_point"] = zeros
        activations = scheme.activations
        if activations is not None and not activations.dynamic:
            specs[f"{name}.input_scale"] = ((1,), model_dtype)
            if not activations.sym:
                specs[f"{name}.input_zero_point"] = ((1,), torch.int8)
        if bias_dtype is not None:
            specs[f"{name}.bias"] = ((out_features,), bias_dtype)
        return specs

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        if layer.element is not None:
            return COMPRESSED_TENSORS_FLOATS.named_tensors(layer, model_dtype)
        assert layer.codes is not None and layer.scale is not None and layer.zero_point is not None
        scheme, out = layer.scheme, layer.out_features
        groups = group_count(layer.in_features, stored_group_size(scheme))
        zero = torch.as_tensor(layer.zero_point).to(torch.uint8).expand(out, groups)
        tensors: dict[str, torch.Tensor] = {}
        if format_of(scheme) == PACK_QUANTIZED:
            tensors["weight_packed"] = pack_rows(layer.codes, scheme.bits)
            tensors["weight_shape"] = torch.tensor([out, layer.in_features], dtype=torch.int64)
            zeros = pack_rows(zero.T.contiguous(), scheme.bits).T.contiguous()
        else:
            tensors["weight"] = signed_values(layer.codes, scheme.bits)
            zeros = signed_values(zero, scheme.bits)
        tensors["weight_scale"] = layer.scale.expand(out, groups).to(SCALE_DTYPE).contiguous()
        if not scheme.sym:
            tensors["weight_zero_point"] = zeros
        if layer.act_scale is not None:
            tensors["input_scale"] = layer.act_scale.reshape(1).to(model_dtype)
        if layer.act_zero_point is not None:
            tensors["input_zero_point"] = torch.tensor([layer.act_zero_point], dtype=torch.int8)
        if layer.bias is not None:
            tensors["bias"] = layer.bias
        return {f"{layer.name}.{leaf}": tensor for leaf, tensor in tensors.items()}

    def unpack_integers(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> CodesAndParams:  # fmt: skip
        """Takes the width from the file's own `weight_shape`, as a reader does."""
        found = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        scale = found["weight_scale"]
        middle: torch.Tensor | int = 2 ** (scheme.bits - 1)
        zeros = found.get("weight_zero_point")
        if "weight_packed" in found:
            out, columns = found["weight_shape"].tolist()
            codes = unpack_rows(found["weight_packed"], scheme.bits, columns)
            zero = middle if zeros is None else unpack_rows(zeros.T, scheme.bits, out).T.contiguous()
        else:
            codes = stored_codes(found["weight"], scheme.bits)
            zero = middle if zeros is None else stored_codes(zeros, scheme.bits)
        return codes, scale, zero

    def unpack_layer(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        if not is_float(scheme):
            return super().unpack_layer(name, scheme, tensors, in_features, out_features)
        found = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        return COMPRESSED_TENSORS_FLOATS.read(name, scheme, found, in_features, out_features)

    def unpack_input_scales(self, name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[float | None, int | None]:
        scale, zero = (tensors.get(f"{name}.{leaf}") for leaf in ("input_scale", "input_zero_point"))
        return None if scale is None else float(scale), None if zero is None else int(zero)

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return compressed_config(plan)


@register_format("auto_round:llm_compressor")
class AutoRoundLlmCompressorFormat(CompressedTensorsFormat):
    """The same files under the name in the guide's examples: plain compressed-tensors, as auto-round writes."""

    support_schemes: ClassVar[tuple[str, ...]] = (
        "INT8", "INT8_W8A8", "MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "NVFP4", "FPW8A16", "FP8_STATIC",
        "FP8_BLOCK",
    )  # fmt: skip


class PackedInt8Format(AutoRoundFormat):
    """The tensors of compressed-tensors with an `auto-round` config, which this package's own loader opens.

    Earlier versions wrote it as `auto_round:llm_compressor`. It is not registered: the model that `quantize()` returns
    describes its int8 layers by it.
    """

    supports_conv1d: ClassVar[bool] = False
    # Experts whose int8 tensor would be called w1.weight have the modules' names.
    rejects_fused_layers: ClassVar[bool] = False
    tensors: ClassVar[CompressedTensorsFormat] = CompressedTensorsFormat()

    def packing(self, scheme: QuantizationScheme) -> str:
        return "auto_round:llm_compressor"

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        return self.tensors.check_scheme(scheme)

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        return self.tensors.check_layer(scheme, in_features, out_features)

    def tensor_specs(self, *args: Any, **kwargs: Any) -> TensorSpecs:
        return self.tensors.tensor_specs(*args, **kwargs)

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return self.tensors.pack(layer, model_dtype=model_dtype)
