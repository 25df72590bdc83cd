"""`Layout`: how the tensors of one quantized linear layer are stored; one class packs and unpacks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer, group_count
from auto_round.schemes import GroupSize, QuantizationScheme

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

    @abstractmethod
    def problem(self, scheme: QuantizationScheme) -> str | None:
        """Why layers of a scheme that quantizes weights cannot be packed, whatever their shape, or None."""

    def group_size(self, scheme: QuantizationScheme) -> GroupSize:
        """The scheme's `group_size`, as stored."""
        return scheme.group_size

    def dequantize(
        self, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:  # fmt: skip
        """The weight [out, in], computed in float32 and rounded once to `dtype`."""
        return self.unpack("", scheme, tensors, in_features, out_features).dequantize(dtype)

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be packed, or None."""
        return None


class IntegerLayout(Layout):
    """A layout of integers in groups along the input.

    Attributes:
        bits: widths that it holds.
        group_sizes: the sizes it holds; empty for any.
        activations: whether readers of the files quantize inputs to integers, where the scheme does.
    """

    bits: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]] = ()
    activations: ClassVar[bool] = False

    def problem(self, scheme: QuantizationScheme) -> str | None:
        inputs = scheme.activations
        if self.group_sizes and scheme.group_size not in self.group_sizes:
            return f"it holds groups of {_choice(self.group_sizes)}, not group_size {scheme.group_size}; set group_size"
        if isinstance(scheme.group_size, tuple):
            return f"group_size {scheme.group_size} is a block, and the layout has groups along the input only"
        if codec_of(scheme).family != "int":
            return f"data type {scheme.data_type!r} has no layout here"
        if inputs is not None and not self.activations:
            return "activations are quantized, and the integer layouts hold weights only"
        if inputs is not None and (codec_of(inputs).family != "int" or isinstance(inputs.group_size, tuple)):
            return f"activations of data type {inputs.data_type!r} with integer weights have no layout here"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if scheme.bits not in self.bits:
            return f"it holds {_choice(self.bits)}-bit weights, not {scheme.bits}-bit ones"
        return None

    def group_size(self, scheme: QuantizationScheme) -> GroupSize:
        return stored_group_size(scheme)


def _choice(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


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
