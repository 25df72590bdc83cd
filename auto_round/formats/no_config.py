"""Formats without a `quantization_config`: `gguf:*`, one GGUF file, and `fake`, dequantized weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from auto_round.codecs.ggml.types import GGML_TYPES, GgmlType
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import UnsupportedError
from auto_round.formats.base import OutputFormat, TensorSpecs, register_format
from auto_round.gguf.file_types import FILE_TYPES
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme


class GgufFormat(OutputFormat):
    """A GGUF file of one file type, for llama.cpp and programs built on it; `GgufPlan` decides each tensor's type."""

    loadable_here: ClassVar[bool] = False
    opens_in_transformers: ClassVar[bool] = False
    has_packed_layers: ClassVar[bool] = False
    checkpoint_names: ClassVar[bool] = False
    fusing_runtimes: ClassVar[tuple[str, ...]] = ()
    scale_dtype: ClassVar[torch.dtype | None] = None  # part of the blocks
    stores_activation_scheme: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()

    def __init__(self, file_type: str) -> None:
        """`file_type`: a key of `FILE_TYPES`, such as `q4_k_m`."""
        self.file_type, self.preset = file_type, f"GGUF:{file_type.upper()}"
        self.scheme = PRESET_SCHEMES[self.preset]  # of most layers

    def _type_of(self, scheme: QuantizationScheme) -> GgmlType:
        if (kind := codec_of(scheme).ggml_type) is None:
            names = ", ".join(GGML_TYPES)
            raise UnsupportedError(f"no GGUF type stores it; the types are {names}, such as scheme {self.preset}")
        return kind

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        self._type_of(scheme)
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        kind = self._type_of(scheme)
        if in_features % kind.block:
            return f"{in_features} inputs do not fill blocks of {kind.block}, which {kind.name} needs"
        return None

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, **dense: Any
    ) -> TensorSpecs:
        return {f"{name}.weight": ((out_features, self._type_of(scheme).row_bytes(in_features)), torch.uint8)}

    def suggested_for(self, scheme: QuantizationScheme) -> bool:
        return scheme == self.scheme

    @property
    def support_schemes(self) -> tuple[str, ...]:
        return (self.preset,)


for _file_type in FILE_TYPES:
    register_format(f"gguf:{_file_type}", _file_type)(GgufFormat)


@register_format("fake")
class FakeFormat(OutputFormat):
    """Dequantized weights of any scheme in the model's own dtype, without quantization of activations; for research."""

    has_packed_layers: ClassVar[bool] = False
    scale_dtype: ClassVar[torch.dtype | None] = None
    casts_to_model_dtype: ClassVar[bool] = True
    stores_activation_scheme: ClassVar[bool] = False
    fusing_runtimes: ClassVar[tuple[str, ...]] = ()  # fusing dequantized weights needs no common scale

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        return None

    @property
    def support_schemes(self) -> tuple[str, ...]:
        return tuple(PRESET_SCHEMES)

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        bias: TensorSpecs = {} if bias_dtype is None else {f"{name}.bias": ((out_features,), bias_dtype)}
        return {f"{name}.weight": (shape, model_dtype), **bias}

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        weight = layer.dequantize(model_dtype)
        bias = {} if layer.bias is None else {f"{layer.name}.bias": layer.bias}
        return {f"{layer.name}.weight": (weight.T if layer.transposed else weight).contiguous(), **bias}
