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
scales are computed from each input, relative to a fixed global scale. The keys are those of the library's
`QuantizationArgs` (0.20), which rejects any other.

The config writes one scheme for all layers as the class `Linear` with exceptions in `ignore`, which every runtime
knows. With several schemes each group names its layers: a runtime that fuses layers (vLLM's q, k and v) would
otherwise match the class before the names. Layers whose names differ only in numbers share one regular expression
where all of them, in the whole model, belong to one group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from auto_round.formats.base import ExportPlan, OutputFormat, register_format
from auto_round.formats.cache_scales import kv_cache_scheme
from auto_round.formats.config_auto_round import LLM_COMPRESSOR, AutoRoundFormat
from auto_round.formats.table import COMPRESSED_TENSORS_SIZES as RULE
from auto_round.layouts.base import Layout, stored_group_size
from auto_round.layouts.floats import (
    COMPRESSED_TENSORS_FLOATS,
    float_family_of,
    float_problem,
    group_size_mismatch,
    has_input_global_scale,
    is_float,
)
from auto_round.layouts.packed_int import PACKED_INT, PLAIN_INT
from auto_round.schemes import GroupSize, QuantizationScheme

_SCALE_DTYPES = {"mx_fp": "torch.uint8", "nv_fp": "torch.float8_e4m3fn"}
_GROUPS = {"mx_fp": 32, "nv_fp": 16}


def _format_of(scheme: QuantizationScheme) -> str:
    """The library's name of a layer's layout."""
    if not is_float(scheme):
        return "int-quantized" if scheme.quantizes_activations else "pack-quantized"
    family = float_family_of(scheme.data_type)
    if family == "mx_fp":
        return "mxfp4-pack-quantized" if scheme.bits == 4 else "mxfp8-quantized"
    if family == "nv_fp":
        return "nvfp4-pack-quantized"
    return "float-quantized" if scheme.quantizes_activations else "naive-quantized"


def _arguments(data_type: str, bits: int, size: GroupSize, sym: bool = True) -> dict[str, Any]:
    """The library's `QuantizationArgs` for weights."""
    family = float_family_of(data_type)
    found: dict[str, Any] = {
        "dynamic": False, "group_size": None, "num_bits": bits, "symmetric": sym,
        "type": "int" if family is None else "float",
    }  # fmt: skip
    if isinstance(size, tuple):
        return found | {"strategy": "block", "block_structure": list(size)}
    if family in _SCALE_DTYPES:
        strategy = "tensor_group" if family == "nv_fp" else "group"
        return found | {"strategy": strategy, "group_size": size, "scale_dtype": _SCALE_DTYPES[family]}
    if size > 0:
        return found | {"strategy": "group", "group_size": size}
    return found | {"strategy": "tensor" if size == 0 else "channel"}


def _weight_arguments(scheme: QuantizationScheme) -> dict[str, Any]:
    """The group's `weights`."""
    size = scheme.group_size if is_float(scheme) else stored_group_size(scheme)
    return _arguments(scheme.data_type, scheme.bits, size, scheme.sym)


def _input_arguments(scheme: QuantizationScheme) -> dict[str, Any] | None:
    """The group's `input_activations`."""
    activations = scheme.activations
    if activations is None:
        return None
    size = activations.group_size if activations.dynamic else 0
    found = _arguments(activations.data_type, activations.bits, size, activations.sym)
    if found["strategy"] == "channel":
        found["strategy"] = "token"
    if float_family_of(activations.data_type) == "nv_fp":
        return found | {"dynamic": "local", "observer": "static_minmax"}
    return found | {"dynamic": activations.dynamic}


def _float_scheme_problem(scheme: QuantizationScheme) -> str | None:
    """Why the library cannot describe a float scheme, or None."""
    parts: list[tuple[str, str, GroupSize]] = [("weights", scheme.data_type, scheme.group_size)]
    activations = scheme.activations
    if activations is not None:
        parts.append(("activations", activations.data_type, activations.group_size))
    problem = float_problem(scheme)
    for what, data_type, size in parts:
        problem = problem or _type_problem(what, data_type, size)
    if problem is not None or activations is None:
        return problem
    if not isinstance(activations.group_size, int):
        return f"activations have scales for groups along the input, not blocks of {activations.group_size}"
    if float_family_of(activations.data_type) == "nv_fp" and not has_input_global_scale(scheme):
        return (
            "its readers need a fixed global scale of the inputs: use act_data_type nv_fp4_with_static_gs, not "
            f"{activations.data_type}"
        )
    return None


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


def _float_layer_problem(scheme: QuantizationScheme, in_features: int) -> str | None:
    """Why the library's readers reject a layer of this width, or None. Blocks need not fill the rows' dimension."""
    reason = group_size_mismatch(scheme, in_features)
    if reason is not None:
        return reason
    sizes = [("group size", scheme.group_size if isinstance(scheme.group_size, int) else scheme.group_size[1])]
    activations = scheme.activations
    if activations is not None and activations.dynamic and isinstance(activations.group_size, int):
        sizes.append(("activation group size", activations.group_size))
    for what, size in sizes:
        if size > 0 and in_features % size:
            return f"in_features={in_features} is not a multiple of the {what} {size}, which its readers require"
    return None


def name_patterns(names: Iterable[str], everything: Collection[str]) -> list[str]:
    """Exact names, or one `re:` pattern for names that differ only in numbers, if it matches no others in `everything`.

    A pattern starts with `.*`, because other programs' wrappers prefix a model's names.
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
            return _float_scheme_problem(scheme)
        if scheme.data_type != "int":
            return f"data type {scheme.data_type!r} is not written by this version, only int"
        activations = scheme.activations
        if activations is not None and (activations.data_type != "int" or not isinstance(activations.group_size, int)):
            return f"activations of data type {activations.data_type!r} with integer weights have no layout here"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if not isinstance(scheme.group_size, int):
            return f"group_size {scheme.group_size} is a block, and the layout has groups along the input only"
        if not 2 <= scheme.bits <= 8:
            return f"{scheme.bits} bits have no layout here, only 2 to 8"
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        if is_float(scheme):
            return _float_layer_problem(scheme, in_features)
        problem = RULE.problem(in_features, out_features, stored_group_size(scheme))
        activations = scheme.activations
        if problem is None and activations is not None and activations.dynamic:
            size = activations.group_size
            problem = RULE.problem(in_features, out_features, size) if isinstance(size, int) else None
            problem = problem and f"activations: {problem}"
        return problem

    def layout(self, scheme: QuantizationScheme) -> Layout:
        if is_float(scheme):
            return COMPRESSED_TENSORS_FLOATS
        return PLAIN_INT if scheme.quantizes_activations else PACKED_INT

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        names = plan.quantized_layers()
        if not names:
            return None
        groups: dict[str, list[str]] = defaultdict(list)
        arguments: dict[str, dict[str, Any]] = {}
        for name in names:
            scheme = plan.layers[name]
            group = {
                "format": _format_of(scheme), "input_activations": _input_arguments(scheme),
                "output_activations": None, "weights": _weight_arguments(scheme),
            }  # fmt: skip
            key = repr(group)
            arguments[key] = group
            groups[key].append(name)
        unquantized = [name for name in plan.layers if name not in set(names)] + [
            name for name in (*plan.other_matrices, *plan.spare) if name not in plan.layers
        ]
        everything = [*plan.layers, *unquantized]
        order = sorted(groups, key=lambda key: -len(groups[key]))  # the most common group first
        formats = {arguments[key]["format"] for key in order}
        return {
            "config_groups": {
                f"group_{i}": {
                    **arguments[key],
                    "targets": ["Linear"] if len(groups) == 1 else name_patterns(groups[key], everything),
                }
                for i, key in enumerate(order)
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": name_patterns(unquantized, everything),
            "kv_cache_scheme": kv_cache_scheme(plan.settings),
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }


@register_format("auto_round:llm_compressor")
class AutoRoundLlmCompressorFormat(CompressedTensorsFormat):
    """The same files under the name in the guide's examples: plain compressed-tensors, as auto-round writes."""

    support_schemes: ClassVar[tuple[str, ...]] = (
        "INT8", "INT8_W8A8", "MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "NVFP4", "FPW8A16", "FP8_STATIC",
        "FP8_BLOCK",
    )  # fmt: skip


class PackedInt8Format(AutoRoundFormat):
    """The tensors of compressed-tensors with an `auto-round` config, which this package's own loader opens.

    Earlier versions wrote it as `auto_round:llm_compressor`. It is not registered; the model that `quantize()` returns
    describes its int8 layers with it.
    """

    supports_conv1d: ClassVar[bool] = False
    rejects_fused_layers: ClassVar[bool] = False  # experts' int8 tensors have the modules' names
    _tensors: ClassVar[CompressedTensorsFormat] = CompressedTensorsFormat()

    def packing(self, scheme: QuantizationScheme) -> str:
        return LLM_COMPRESSOR

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return self._tensors.layout(scheme)

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        return self._tensors.check_scheme(scheme)

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        return self._tensors.check_layer(scheme, in_features, out_features)
