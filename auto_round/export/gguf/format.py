"""The formats `gguf:q4_k_m` and its like: one file for llama.cpp and what is built on it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from auto_round.data_type.gguf.packing import pack_blocks
from auto_round.data_type.gguf.types import GGML_TYPES, ggml_scheme, ggml_type_of
from auto_round.export.formats import OutputFormat, TensorSpecs, register_format
from auto_round.export.gguf.file_types import FILE_TYPES
from auto_round.export.plan import ExportPlan
from auto_round.quantized_layer import QuantizedLayer
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

# Bits alone, in a layer configuration, mean these.
TYPE_OF_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}


class GgufFormat(OutputFormat):
    """A GGUF file of one file type. Which tensor gets which type is decided by `GgufPlan`, not by the scheme alone."""

    loads_here: ClassVar[bool] = False
    checkpoint_names: ClassVar[bool] = False
    fused_by: ClassVar[tuple[str, ...]] = ()
    scale_dtype: ClassVar[torch.dtype | None] = None  # a part of the types
    holds_activations: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()
    file_type: ClassVar[str] = ""

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if not scheme.quantizes_weights or ggml_type_of(scheme) is not None:
            return None
        return f"no GGUF type stores it; the types are {', '.join(GGML_TYPES)}, such as scheme GGUF:{self.preset}"

    def offered_for(self, scheme: QuantizationScheme) -> bool:
        return scheme == self.scheme

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        kind = ggml_type_of(scheme)
        if kind is not None and in_features % kind.block:
            return f"{in_features} inputs do not fill blocks of {kind.block}, as {kind.name} needs them"
        return None

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        kind = ggml_type_of(scheme)
        assert kind is not None
        return {f"{name}.weight": ((out_features, kind.row_bytes(in_features)), torch.uint8)}

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        assert layer.blocks is not None
        return {f"{layer.name}.weight": pack_blocks(layer.blocks)}

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return None

    @property
    def preset(self) -> str:
        """`Q4_K_M`"""
        return self.file_type.upper()

    @property
    def scheme(self) -> QuantizationScheme:
        """The scheme of most layers of such a file."""
        return PRESET_SCHEMES[f"GGUF:{self.preset}"]


def scheme_of_type(kind: str, default: QuantizationScheme) -> QuantizationScheme:
    """The scheme of a tensor of type `kind`: 16 bits for the dense types."""
    if kind in GGML_TYPES:
        return ggml_scheme(kind)
    return default.with_overrides({"bits": 16, "act_bits": 16})


def _register(file_type: str) -> None:
    body = {
        "file_type": file_type, "support_schemes": (f"GGUF:{file_type.upper()}",),
        "__doc__": f"A GGUF file of type {file_type.upper()}.",
    }  # fmt: skip
    register_format(f"gguf:{file_type}")(type(f"Gguf_{file_type}", (GgufFormat,), body))


for _file_type in FILE_TYPES:
    _register(_file_type)
