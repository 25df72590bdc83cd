"""`Layout`: how the tensors of one quantized linear layer are stored; one class packs and unpacks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer, group_count
from auto_round.schemes import QuantizationScheme

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]
SCALE_DTYPE = torch.float16  # of integer layers: codes were chosen with float16 scales


class Layout(ABC):
    """One way to store a layer. Tensors have local names (`qweight`, not `name.qweight`); the bias is not included.

    Attributes:
        leaves: names of all tensors that a layer may have, the codes first; needed by `auto_round.inference`.
    """

    leaves: ClassVar[tuple[str, ...]]

    @abstractmethod
    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int,
        model_dtype: torch.dtype = torch.bfloat16,
    ) -> TensorSpecs:  # fmt: skip
        """Shape and dtype of every tensor, the codes first. `model_dtype`: dtype of static input scales."""

    @abstractmethod
    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """The layer's tensors, as `specs` describes them."""

    @abstractmethod
    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        """The inverse of `pack`, without the bias: the layer `name`. Raises ModelError for damaged tensors."""

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be packed, or None."""
        return None


def stored_group_size(scheme: QuantizationScheme) -> int:
    """`group_size` of integers as written: per tensor (0) becomes per channel (-1), with the scale repeated."""
    assert isinstance(scheme.group_size, int)
    return scheme.group_size if scheme.group_size > 0 else -1


def integer_arrays(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [out, in], scales [out, groups], zero points uint8 [out, groups]) of an integer layer."""
    own = layer.codes_as(IntCodes)
    shape = (layer.out_features, group_count(layer.in_features, stored_group_size(layer.scheme)))
    zeros = torch.as_tensor(own.zero_point, device=own.codes.device).to(torch.uint8)
    return own.codes, own.scale.expand(shape).to(SCALE_DTYPE), zeros.expand(shape)
