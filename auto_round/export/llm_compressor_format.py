"""The `llm_compressor` format: checkpoints of the compressed-tensors library.

Small float types are described in `compressed_tensors_float` and laid out by `float_layouts`; integers here:

| scheme | layout | tensors of a layer |
|---|---|---|
| weights alone, 2 to 8 bits | pack-quantized | `weight_packed`, `weight_scale`, `weight_shape` |
| weights and activations | int-quantized | `weight` int8, `weight_scale` |

Asymmetric weights add `weight_zero_point`, packed in the first layout and int8 in the second. Static
activations add `input_scale` (and `input_zero_point` int8 when asymmetric), one value a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from auto_round.export.auto_round_format import AutoRoundFormat, stored_group_size
from auto_round.export.compressed_tensors_config import PACKED, compressed_config, format_of
from auto_round.export.compressed_tensors_float import float_layer_problem, float_scheme_problem
from auto_round.export.float_layouts import COMPRESSED_TENSORS, is_float
from auto_round.export.formats import Grid, OutputFormat, TensorSpecs, register_format
from auto_round.export.packing.compressed_tensors import (
    pack_rows,
    packed_words,
    signed_values,
    stored_codes,
    unpack_rows,
)
from auto_round.export.plan import ExportPlan
from auto_round.export.size_rules import COMPRESSED_TENSORS as RULE
from auto_round.quantized_layer import QuantizedLayer, group_count
from auto_round.schemes import QuantizationScheme

# The library casts scales to the model's dtype as it reads them; the file holds what the codes were decided with.
SCALE_DTYPE = torch.float16


@register_format("llm_compressor")
class CompressedTensorsFormat(OutputFormat):
    """Opens in Transformers with compressed-tensors installed, and in vLLM."""

    loads_here: ClassVar[bool] = False
    experts_by_name: ClassVar[bool] = True
    takes_conv1d: ClassVar[bool] = False
    # One `kv_cache_scheme` describes them, and the library's own tensors are [heads, 1, 1].
    holds_cache_scales: ClassVar[bool] = True
    one_cache_granularity: ClassVar[bool] = True
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
            return COMPRESSED_TENSORS.file_specs(name, scheme, in_features, out_features, bias_dtype, model_dtype)
        groups = group_count(in_features, stored_group_size(scheme))
        specs: TensorSpecs = {}
        if format_of(scheme) == PACKED:
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
            return COMPRESSED_TENSORS.file_tensors(layer, model_dtype)
        assert layer.codes is not None and layer.scale is not None and layer.zero_point is not None
        scheme, out = layer.scheme, layer.out_features
        groups = group_count(layer.in_features, stored_group_size(scheme))
        zero = torch.as_tensor(layer.zero_point).to(torch.uint8).expand(out, groups)
        tensors: dict[str, torch.Tensor] = {}
        if format_of(scheme) == PACKED:
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

    def read_back(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> Grid:  # fmt: skip
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

    def read_layer(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        if not is_float(scheme):
            return super().read_layer(name, scheme, tensors, in_features, out_features)
        found = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        return COMPRESSED_TENSORS.read(name, scheme, found, in_features, out_features)

    def read_inputs(self, name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[float | None, int | None]:
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

    takes_conv1d: ClassVar[bool] = False
    # Experts whose int8 tensor would be called w1.weight have the modules' names.
    refuses_joined: ClassVar[bool] = False
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
