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

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from auto_round.codecs.kinds import codec_of
from auto_round.formats.base import ExportPlan, OutputFormat, number_pattern, register_format
from auto_round.formats.cache_scales import kv_cache_scheme
from auto_round.formats.config_auto_round import LLM_COMPRESSOR, LayoutFormat
from auto_round.formats.table import COMPRESSED_TENSORS_SIZES, SizeRule
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import COMPRESSED_TENSORS_FLOATS
from auto_round.layouts.packed_int import PACKED_INT, PLAIN_INT
from auto_round.schemes import ActivationScheme, GroupSize, QuantizationScheme

_SIZES = dict.fromkeys(("int", "mx_fp", "nv_fp", "fp"), COMPRESSED_TENSORS_SIZES)


@dataclass(frozen=True)
class _NumberType:
    """One type of numbers in the library's words.

    Attributes:
        formats: the library's names of the layout of weights alone, and of weights with quantized inputs.
        kind, strategy, scale_dtype: values of its `QuantizationArgs`; the strategy of groups.
        group: the only group size, or None for any.
        layouts: the same two, as this package packs them.
    """

    formats: tuple[str, str]
    kind: str = "float"
    strategy: str = "group"
    scale_dtype: str | None = None
    group: int | None = None
    layouts: tuple[Layout, Layout] = (COMPRESSED_TENSORS_FLOATS, COMPRESSED_TENSORS_FLOATS)


# By codec family and element.
_TYPES = {
    ("int", None): _NumberType(("pack-quantized", "int-quantized"), "int", layouts=(PACKED_INT, PLAIN_INT)),
    ("mx_fp", "e2m1"): _NumberType(("mxfp4-pack-quantized",) * 2, scale_dtype="torch.uint8", group=32),
    ("mx_fp", "e4m3"): _NumberType(("mxfp8-quantized",) * 2, scale_dtype="torch.uint8", group=32),
    ("nv_fp", "e2m1"): _NumberType(
        ("nvfp4-pack-quantized",) * 2, strategy="tensor_group", scale_dtype="torch.float8_e4m3fn", group=16
    ),
    ("fp", "e4m3"): _NumberType(("naive-quantized", "float-quantized")),
}


def _type_of(part: QuantizationScheme | ActivationScheme) -> _NumberType | None:
    """The library's type of weights or activations, or None where it has none."""
    codec = codec_of(part)
    return _TYPES.get((codec.family, codec.element))


def _arguments(part: QuantizationScheme | ActivationScheme, size: GroupSize) -> dict[str, Any]:
    """The library's `QuantizationArgs` of weights."""
    kind = _type_of(part)
    assert kind is not None
    found: dict[str, Any] = {
        "dynamic": False, "group_size": None, "num_bits": part.bits, "symmetric": part.sym, "type": kind.kind,
    }  # fmt: skip
    if isinstance(size, tuple):
        return found | {"strategy": "block", "block_structure": list(size)}
    if size > 0:
        found |= {"strategy": kind.strategy, "group_size": size}
        return found | ({} if kind.scale_dtype is None else {"scale_dtype": kind.scale_dtype})
    return found | {"strategy": "tensor" if size == 0 else "channel"}


def _input_arguments(inputs: ActivationScheme | None) -> dict[str, Any] | None:
    """The group's `input_activations`."""
    if inputs is None:
        return None
    found = _arguments(inputs, inputs.group_size if inputs.dynamic else 0)
    if found["strategy"] == "channel":
        found["strategy"] = "token"
    if inputs.has_global_scale:
        return found | {"dynamic": "local", "observer": "static_minmax"}
    return found | {"dynamic": inputs.dynamic}


def name_patterns(names: Iterable[str], everything: Collection[str]) -> list[str]:
    """Exact names, or one `re:` pattern for names that differ only in numbers, if it matches no others in `everything`.

    A pattern starts with `.*`, because other programs' wrappers prefix a model's names.
    """
    wanted = list(dict.fromkeys(names))
    chosen = set(wanted)
    alike: dict[str, set[str]] = defaultdict(set)
    for name in everything:
        alike[number_pattern(name)].add(name)
    result: dict[str, None] = {}
    for name in wanted:
        same = alike[number_pattern(name)]
        whole = len(same) > 1 and same <= chosen
        result["re:.*" + number_pattern(name) + "$" if whole else name] = None
    return list(result)


@register_format("auto_round:llm_compressor")  # the name in the guide's examples, as auto-round writes it
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
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES

    def layout(self, scheme: QuantizationScheme) -> Layout:
        kind = _type_of(scheme)
        return PACKED_INT if kind is None else kind.layouts[scheme.quantizes_activations]

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        inputs = scheme.activations
        parts: list[tuple[str, QuantizationScheme | ActivationScheme]] = [
            ("weights", scheme),
            *([] if inputs is None else [("activations", inputs)]),
        ]
        for what, part in parts:
            if _type_of(part) is None:
                return (
                    f"compressed-tensors has no {what} of data type {part.data_type!r} in groups of {part.group_size}"
                )
        if (reason := super().scheme_problem(scheme)) is not None:
            return reason
        for what, part in parts:
            kind = _type_of(part)
            if kind is not None and kind.group not in (None, part.group_size):
                return (
                    f"{what} of data type {part.data_type!r} need groups of {kind.group} in compressed-tensors, not "
                    f"{part.group_size}"
                )
        if inputs is not None and isinstance(inputs.group_size, tuple):
            return f"activations have scales for groups along the input, not blocks of {inputs.group_size}"
        if inputs is not None and codec_of(inputs).has_global_scale and not inputs.has_global_scale:
            return (
                "its readers need a fixed global scale of the inputs: use act_data_type nv_fp4_with_static_gs, not "
                f"{inputs.data_type}"
            )
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        problem, inputs = super().check_layer(scheme, in_features, out_features), scheme.activations
        if problem is None and inputs is not None and inputs.dynamic:
            problem = COMPRESSED_TENSORS_SIZES.problem(in_features, out_features, inputs.group_size)
            problem = problem and f"activations: {problem}"
        return problem

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        groups: dict[str, list[str]] = defaultdict(list)
        arguments: dict[str, dict[str, Any]] = {}
        for name in plan.quantized_layers():
            scheme = plan.layers[name]
            kind = _type_of(scheme)
            assert kind is not None
            group = {
                "format": kind.formats[scheme.quantizes_activations],
                "input_activations": _input_arguments(scheme.activations), "output_activations": None,
                "weights": _arguments(scheme, self.layout(scheme).group_size(scheme)),
            }  # fmt: skip
            key = repr(group)
            arguments[key] = group
            groups[key].append(name)
        unquantized = plan.unquantized_modules()
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


class PackedInt8Format(LayoutFormat):
    """The int8 tensors of compressed-tensors with an `auto-round` config, which this package's own loader opens.

    Earlier versions wrote it as `auto_round:llm_compressor`. It is not registered; the model that `quantize()` returns
    describes its int8 layers with it.
    """

    stored_layout: ClassVar[Layout] = PLAIN_INT
    packing_format: ClassVar[str] = LLM_COMPRESSOR
    supports_conv1d: ClassVar[bool] = False
    rejects_fused_layers: ClassVar[bool] = False  # experts' int8 tensors have the modules' names
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES
