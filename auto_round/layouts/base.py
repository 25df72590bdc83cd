"""`Layout`: how the codes of one linear layer lie in a file, packing and unpacking in one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.schemes import QuantizationScheme

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Layout(ABC):
    """One packing of a layer, in local names such as `weight_packed`. Shared by the writer and the loader.

    Attributes:
        leaves: local names of all tensors that a layer may have, the bias left out; the first holds the codes.
    """

    leaves: ClassVar[tuple[str, ...]]

    @abstractmethod
    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int,
        model_dtype: torch.dtype = torch.bfloat16,
    ) -> Specs:  # fmt: skip
        """Shape and dtype of every tensor of a layer but its bias, by local name. The codes come first.

        `model_dtype` is that of the fixed scale of inputs.
        """

    @abstractmethod
    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """The layer's tensors, its bias included, by local name. Raises NumericsError for what they cannot hold."""

    @abstractmethod
    def read(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        """The inverse of `pack`: the layer `name` from `tensors` by local name."""

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be packed, or None."""
        return None

    def named_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.bfloat16,
    ) -> Specs:  # fmt: skip
        """`specs` and the bias, by full names for the layer `name`."""
        specs = self.specs(scheme, in_features, out_features, model_dtype)
        if bias_dtype is not None:
            specs["bias"] = ((out_features,), bias_dtype)
        return {f"{name}.{leaf}": spec for leaf, spec in specs.items()}

    def named_tensors(self, layer: QuantizedLayer, model_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """`pack`, by full names."""
        return {f"{layer.name}.{leaf}": tensor for leaf, tensor in self.pack(layer, model_dtype).items()}
