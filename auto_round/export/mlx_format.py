"""The formats `mlx`, for mlx-lm, and `auto_round:mlx`, the same tensors for Transformers with this package.

| tensor | dtype | holds |
|---|---|---|
| weight | uint32 [out, in*bits/32] | codes, see `packing.mlx` |
| scales | float16 [out, groups] | as tuned |
| biases | float16 or float32 [out, groups] | -scales * zero point, exactly: float32 for asymmetric layers |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from auto_round.errors import ModelError
from auto_round.export.auto_round_format import AutoRoundFormat
from auto_round.export.formats import Grid, OutputFormat, TensorSpecs, register_format
from auto_round.export.mlx_families import mlx_rules
from auto_round.export.model_rules import PLAIN, ModelRules
from auto_round.export.packing.mlx import (
    MLX_BITS,
    bias_storage_dtype,
    mlx_biases,
    mlx_words,
    mlx_zero_points,
    pack_mlx,
    unpack_mlx,
)
from auto_round.export.plan import ExportPlan
from auto_round.export.rope import with_legacy_rope
from auto_round.export.size_rules import MLX
from auto_round.quantized_layer import QuantizedLayer, group_count
from auto_round.schemes import QuantizationScheme

MLX_PACKING = "mlx"
SCALE_DTYPE = torch.float16
_SCHEMES = ("W2A16", "W2A16G64", "W2A16G32", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16", "W4A16_MIXED", "BF16")


class _MlxTensors(OutputFormat):
    """What both formats share: which layers fit, and their tensors."""

    holds_cache_scales: ClassVar[bool] = False
    support_schemes: ClassVar[tuple[str, ...]] = _SCHEMES
    fused_by: ClassVar[tuple[str, ...]] = ()

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if not scheme.quantizes_weights:
            return None
        if scheme.data_type != "int":
            return f"data type {scheme.data_type!r} is not written by this version, only int"
        if scheme.quantizes_activations:
            return "activations are quantized, and MLX layers hold weights only"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if scheme.bits not in MLX_BITS:
            return f"MLX has no {scheme.bits}-bit weights, only {', '.join(map(str, MLX_BITS))} bits"
        if scheme.group_size not in MLX.groups:
            allowed = ", ".join(map(str, MLX.groups))
            return f"MLX has no group size {scheme.group_size}, only {allowed}; set group_size"
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        return MLX.problem(in_features, out_features, _size(scheme)) if scheme.quantizes_weights else None

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        groups = group_count(in_features, _size(scheme))
        specs: TensorSpecs = {
            f"{name}.weight": ((out_features, mlx_words(in_features, scheme.bits)), torch.uint32),
            f"{name}.scales": ((out_features, groups), SCALE_DTYPE),
            f"{name}.biases": ((out_features, groups), bias_storage_dtype(scheme.sym, SCALE_DTYPE)),
        }
        if bias_dtype is not None:
            specs[f"{name}.bias"] = ((out_features,), bias_dtype)
        return specs

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        assert layer.codes is not None and layer.scale is not None and layer.zero_point is not None
        scales = layer.scale.to(SCALE_DTYPE).contiguous()
        dtype = bias_storage_dtype(layer.scheme.sym, SCALE_DTYPE)
        tensors = {
            f"{layer.name}.weight": pack_mlx(layer.codes, layer.scheme.bits),
            f"{layer.name}.scales": scales,
            f"{layer.name}.biases": mlx_biases(scales, layer.zero_point, dtype, layer.name),
        }
        if layer.bias is not None:
            tensors[f"{layer.name}.bias"] = layer.bias
        return tensors

    def read_back(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> Grid:  # fmt: skip
        scales, biases = tensors[f"{name}.scales"], tensors[f"{name}.biases"]
        zeros = mlx_zero_points(scales, biases)
        if not torch.equal(biases, mlx_biases(scales, zeros, biases.dtype, name)):
            raise ModelError(f"layer {name}: its biases are not its scales times whole zero points")
        return unpack_mlx(tensors[f"{name}.weight"], scheme.bits), scales, zeros


_PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")


def _size(scheme: QuantizationScheme) -> int:
    assert isinstance(scheme.group_size, int)
    return scheme.group_size


def mlx_quantization(plan: ExportPlan, rules: ModelRules) -> dict[str, Any] | None:
    """The `quantization` object of an MLX config.json: the commonest bits and group size, then every linear layer and
    embedding by its module's name: its own values, or false where it is dense. None without a quantized layer."""
    names = plan.quantized_layers()
    if not names:
        return None
    values = Counter((plan.layers[n].group_size, plan.layers[n].bits) for n in names)
    default = (plan.scheme.group_size, plan.scheme.bits)
    size, bits = default if default in values else values.most_common(1)[0][0]
    result: dict[str, Any] = {"group_size": size, "bits": bits}
    result |= {rules.module_name(name): False for name in plan.embeddings}
    for name, scheme in plan.layers.items():
        entry = {"group_size": scheme.group_size, "bits": scheme.bits} if scheme.quantizes_weights else False
        result[rules.module_name(name)] = entry
    return result


def without_prediction_layers(values: dict[str, Any]) -> dict[str, Any]:
    """config.json's values without the layers for multi-token prediction, which these files do not hold: mlx-lm has no
    modules for them, and refuses tensors that it does not know."""
    cut = {key: 0 for key in _PREDICTION_LAYERS if values.get(key)}
    parts = {k: without_prediction_layers(v) for k, v in values.items() if k == "text_config" and isinstance(v, dict)}
    return {**values, **parts, **cut}


@register_format("mlx")
class MlxFormat(_MlxTensors):
    """A folder that mlx-lm opens: its names, stacked experts, and the rotary settings where it looks for them."""

    loads_here: ClassVar[bool] = False
    checkpoint_names: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()

    def rules(self, model_type: str) -> ModelRules:
        return mlx_rules(model_type)

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return mlx_quantization(plan, self.rules(plan.model_type))

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        quantization = self.config(plan)
        values = self.rules(plan.model_type).with_config(with_legacy_rope(values))
        if plan.spare:
            values = without_prediction_layers(values)
        if quantization is None:
            return values
        return values | {"quantization": quantization, "quantization_config": quantization}


@register_format("auto_round:mlx")
class AutoRoundMlxFormat(_MlxTensors, AutoRoundFormat):
    """MLX tensors under Transformers' names, with AutoRound's `quantization_config`, which this package's loader reads.

    The `quantization` object is there too, so that mlx-lm opens it wherever its names are those of Transformers.
    """

    def packing(self, scheme: QuantizationScheme) -> str:
        return MLX_PACKING

    # Experts whose packed tensor would be called w1.weight have the modules' names.
    refuses_joined: ClassVar[bool] = False

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return AutoRoundFormat.config(self, plan)

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        values = with_legacy_rope(super().model_config(values, plan))
        quantization = mlx_quantization(plan, PLAIN)
        return values if quantization is None else values | {"quantization": quantization}
