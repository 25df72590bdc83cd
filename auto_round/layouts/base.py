"""`Layout`: how the tensors of one quantized linear layer are stored; one class packs and unpacks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.schemes import GroupSize, QuantizationScheme

Tensors = Mapping[str, torch.Tensor]
TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Layout(ABC):
    """One way to store a layer: tensors with local names (`leaves`, the codes first), without the bias."""

    leaves: ClassVar[tuple[str, ...]]

    @abstractmethod
    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int, model_dtype: torch.dtype = torch.bfloat16
    ) -> TensorSpecs:
        """Shape and dtype of every tensor, the codes first. `model_dtype`: dtype of static input scales."""

    @abstractmethod
    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """The layer's tensors, as `specs` describes them."""

    @abstractmethod
    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int
    ) -> QuantizedLayer:
        """The inverse of `pack`, without the bias: the layer `name`. Raises ModelError for damaged tensors."""

    @abstractmethod
    def problem(self, scheme: QuantizationScheme) -> str | None:
        """Why layers of a scheme that quantizes weights cannot be packed, whatever their shape, or None."""

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be packed, or None."""
        return None

    def group_size(self, scheme: QuantizationScheme) -> GroupSize:
        """The scheme's `group_size`, as stored."""
        return scheme.group_size

    def is_finite(self, scale: torch.Tensor) -> bool:
        """Whether all values of a tensor of scales or zero points are finite."""
        return bool(torch.isfinite(scale.float()).all())

    def dequantize(
        self, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [out, in], computed in float32 and rounded once to `dtype`."""
        return self.unpack("", scheme, tensors, in_features, out_features).dequantize(dtype)
