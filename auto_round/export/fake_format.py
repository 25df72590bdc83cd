"""The `fake` format: dequantized weights in the model's own dtype, an ordinary checkpoint. For research."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from auto_round.export.formats import OutputFormat, TensorSpecs, register_format
from auto_round.export.plan import ExportPlan
from auto_round.quantized_layer import QuantizedLayer
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme


@register_format("fake")
class FakeFormat(OutputFormat):
    """Takes every scheme. Quantization of activations is not stored: the file holds weights alone."""

    scale_dtype: ClassVar[torch.dtype | None] = None
    rounds_weights: ClassVar[bool] = True
    holds_activations: ClassVar[bool] = False
    support_schemes: ClassVar[tuple[str, ...]] = tuple(PRESET_SCHEMES)
    fused_by: ClassVar[tuple[str, ...]] = ()  # dense weights join whatever they were rounded to

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        return None

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        specs: TensorSpecs = {f"{name}.weight": (shape, model_dtype)}
        if bias_dtype is not None:
            specs[f"{name}.bias"] = ((out_features,), bias_dtype)
        return specs

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        weight = layer.dequantize(model_dtype)
        tensors = {f"{layer.name}.weight": (weight.T if layer.transposed else weight).contiguous()}
        if layer.bias is not None:
            tensors[f"{layer.name}.bias"] = layer.bias
        return tensors

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return None
