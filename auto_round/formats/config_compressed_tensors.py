"""The `llm_compressor` format: checkpoints and `quantization_config` of the compressed-tensors library.

docs/formats.md has its tensors. The keys are those of the library's `QuantizationArgs` (0.20), which rejects any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from auto_round.codecs.kinds import codec_of
from auto_round.formats.base import CacheScheme, ExportPlan, OutputFormat, SizeRule, number_pattern, register_format
from auto_round.formats.config_auto_round import LLM_COMPRESSOR, LayoutFormat
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import COMPRESSED_TENSORS_FLOATS
from auto_round.layouts.integers import PACKED_INT, PLAIN_INT
from auto_round.schemes import ActivationScheme, GroupSize, QuantizationScheme

_WHOLE_GROUPS = SizeRule()
_SIZES = dict.fromkeys(("int", "mx_fp", "nv_fp", "fp"), _WHOLE_GROUPS)


@dataclass(frozen=True)
class _NumberType:
    """One type of numbers in the library's words: its formats of weights alone and with quantized inputs, and the
    layouts here; values of its `QuantizationArgs`; the only group size, or None for any."""

    formats: tuple[str, str]
    kind: str = "float"
    strategy: str = "group"
    scale_dtype: str | None = None
    group: int | None = None
    layouts: tuple[Layout, Layout] = (COMPRESSED_TENSORS_FLOATS, COMPRESSED_TENSORS_FLOATS)

    def arguments(self, part: QuantizationScheme | ActivationScheme, size: GroupSize) -> dict[str, Any]:
        """The library's `QuantizationArgs` of weights."""
        found: dict[str, Any] = {
            "dynamic": False, "group_size": None, "num_bits": part.bits, "symmetric": part.sym, "type": self.kind,
        }  # fmt: skip
        if isinstance(size, tuple):
            return found | {"strategy": "block", "block_structure": list(size)}
        if size > 0:
            found |= {"strategy": self.strategy, "group_size": size}
            return found | ({} if self.scale_dtype is None else {"scale_dtype": self.scale_dtype})
        return found | {"strategy": "tensor" if size == 0 else "channel"}


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


def _key(part: QuantizationScheme | ActivationScheme) -> tuple[str, str | None]:
    codec = codec_of(part)
    return codec.family, codec.element


def name_patterns(names: Iterable[str], everything: Collection[str]) -> list[str]:
    """Exact names, or one `re:` pattern for names that differ only in numbers, if it matches no others in `everything`.
    A pattern starts with `.*`, because other programs' wrappers prefix a model's names."""
    wanted = dict.fromkeys(names)
    alike: dict[str, set[str]] = defaultdict(set)
    for name in everything:
        alike[number_pattern(name)].add(name)
    result: dict[str, None] = {}
    for name in wanted:
        same = alike[number_pattern(name)]
        whole = len(same) > 1 and same <= wanted.keys()
        result["re:.*" + number_pattern(name) + "$" if whole else name] = None
    return list(result)


@register_format("auto_round:llm_compressor")  # the name in the guide's examples, as auto-round writes it
@register_format("llm_compressor")
class CompressedTensorsFormat(OutputFormat):
    """Opens in Transformers with compressed-tensors installed, and in vLLM."""

    loadable_here: ClassVar[bool] = False
    experts_by_name: ClassVar[bool] = True
    supports_conv1d: ClassVar[bool] = False
    cache_scale_tail: ClassVar[tuple[int, ...] | None] = (1, 1)  # of the library's own tensors
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return _TYPES[_key(scheme)].layouts[scheme.quantizes_activations]

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        inputs = scheme.activations
        parts: list[tuple[str, QuantizationScheme | ActivationScheme]] = [("weights", scheme)]
        parts += [] if inputs is None else [("activations", inputs)]
        groups = []
        for what, part in parts:
            if (kind := _TYPES.get(_key(part))) is None:
                return (
                    f"compressed-tensors has no {what} of data type {part.data_type!r} in groups of {part.group_size}"
                )
            if kind.group not in (None, part.group_size):
                groups.append(
                    f"{what} of data type {part.data_type!r} need groups of {kind.group} in compressed-tensors, not "
                    f"{part.group_size}"
                )
        if (reason := super().scheme_problem(scheme)) is not None or groups:
            return reason or groups[0]
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
            problem = _WHOLE_GROUPS.problem(in_features, out_features, inputs.group_size)
            problem = problem and f"activations: {problem}"
        return problem

    def check_cache(self, cache: CacheScheme) -> str | None:
        # One `kv_cache_scheme` describes all three.
        one = cache.queries in (None, cache.keys_values)
        return None if one else "its readers expect one granularity for all three"

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        """One scheme for all layers is the class `Linear` with exceptions in `ignore`, which every runtime knows. With
        several, each group names its layers: a runtime that fuses layers would match the class before the names."""
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name in plan.quantized_layers():
            scheme = plan.layers[name]
            kind, inputs = _TYPES[_key(scheme)], scheme.activations
            arguments: dict[str, Any] | None = None
            if inputs is not None:
                arguments = _TYPES[_key(inputs)].arguments(inputs, inputs.group_size if inputs.dynamic else 0)
                arguments |= {"strategy": "token"} if arguments["strategy"] == "channel" else {}
                # With a fixed global scale the groups' scales are computed from each input, relative to it.
                local = {"dynamic": "local", "observer": "static_minmax"}
                arguments |= local if inputs.has_global_scale else {"dynamic": inputs.dynamic}
            group = {
                "format": kind.formats[inputs is not None], "input_activations": arguments, "output_activations": None,
                "weights": kind.arguments(scheme, self.layout(scheme).group_size(scheme)),
            }  # fmt: skip
            groups.setdefault(repr(group), (group, []))[1].append(name)
        unquantized = plan.unquantized_modules()
        everything = [*plan.layers, *unquantized]
        order = sorted(groups.values(), key=lambda group: -len(group[1]))  # the most common group first
        formats = {group["format"] for group, _ in order}
        targets = lambda names: ["Linear"] if len(groups) == 1 else name_patterns(names, everything)
        cache = plan.cache
        return {
            "config_groups": {f"group_{i}": {**group, "targets": targets(n)} for i, (group, n) in enumerate(order)},
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": name_patterns(unquantized, everything),
            "kv_cache_scheme": None if cache is None else {
                "dynamic": False, "group_size": None, "num_bits": 8,
                "strategy": "attn_head" if cache.keys_values == "head" else "tensor", "symmetric": True,
                "type": "float",
            },
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }  # fmt: skip


class PackedInt8Format(LayoutFormat):
    """compressed-tensors' int8 with an `auto-round` config, for int8 layers of the model that `quantize()` returns."""

    stored_layout: ClassVar[Layout] = PLAIN_INT
    packing_format: ClassVar[str] = LLM_COMPRESSOR
    supports_conv1d: ClassVar[bool] = False
    rejects_fused_layers: ClassVar[bool] = False  # experts' int8 tensors have the modules' names
    sizes: ClassVar[Mapping[str, SizeRule]] = _SIZES
