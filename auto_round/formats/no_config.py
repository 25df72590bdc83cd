"""Formats without a `quantization_config`: `gguf:*`, one GGUF file, and `fake`, dequantized weights.

A GGUF file of one file type (`gguf:q4_k_m`) is for llama.cpp and programs built on it; `gguf.plan` decides the
type of each tensor. `fake` writes an ordinary checkpoint in the model's own dtype, for research.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from auto_round.codecs.ggml.types import GGML_TYPES, ggml_type_of
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.formats.base import OutputFormat, TensorSpecs, add_format, register_format
from auto_round.gguf.file_types import FILE_TYPES
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme


class GgufFormat(OutputFormat):
    """A GGUF file of one file type; `GgufPlan` decides the type of each tensor."""

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
        self.file_type = file_type

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        if ggml_type_of(scheme) is not None:
            return None
        return f"no GGUF type stores it; the types are {', '.join(GGML_TYPES)}, such as scheme GGUF:{self.preset}"

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        kind = ggml_type_of(scheme)
        if kind is not None and in_features % kind.block:
            return f"{in_features} inputs do not fill blocks of {kind.block}, which {kind.name} needs"
        return None

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        kind = ggml_type_of(scheme)
        assert kind is not None
        return {f"{name}.weight": ((out_features, kind.row_bytes(in_features)), torch.uint8)}

    def suggested_for(self, scheme: QuantizationScheme) -> bool:
        return scheme == self.scheme

    @property
    def support_schemes(self) -> tuple[str, ...]:
        return (f"GGUF:{self.preset}",)

    @property
    def preset(self) -> str:
        """The file type in upper case, such as `Q4_K_M`."""
        return self.file_type.upper()

    @property
    def scheme(self) -> QuantizationScheme:
        """The scheme of most layers of such a file."""
        return PRESET_SCHEMES[f"GGUF:{self.preset}"]


for _file_type in FILE_TYPES:
    add_format(f"gguf:{_file_type}", GgufFormat(_file_type))


@register_format("fake")
class FakeFormat(OutputFormat):
    """Dequantized weights of any scheme, without quantization of activations."""

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
