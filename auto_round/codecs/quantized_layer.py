"""`QuantizedLayer`, from a quantizer to an output format, and `Codes`, its weight: a class for each kind of codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from auto_round.codecs.minifloat import MINIFLOATS, dequantize_minifloat
from auto_round.schemes import GroupSize, QuantizationScheme

C = TypeVar("C", bound="Codes")


def group_count(in_features: int, group_size: int) -> int:
    """Groups along the input dimension, the last one possibly partial; -1 and 0 give one group."""
    return 1 if group_size <= 0 else -(-in_features // group_size)


class Codes(ABC):
    """A quantized matrix [out, in], as a frozen dataclass of tensors, numbers and names; each kind is a subclass.
    `ggml` is the ggml type that stores it, or None; `not_finite` what is wrong when `is_finite` is false."""

    codes: Tensor
    not_finite = "NaN or Inf in the weights or their scales; check the layer's weights"

    @property
    def ggml(self) -> str | None:
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @abstractmethod
    def dequantize(self) -> Tensor:
        """float32 [out, in]."""

    @abstractmethod
    def digest_parts(self, layer: QuantizedLayer, dtype: torch.dtype) -> tuple[Tensor | str, ...]:
        """What a file must hold of `layer`, in normal form; without codes, that is the weight in `dtype`."""

    def is_finite(self) -> bool:
        """Whether all scales (without codes, all weights) are finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors().values() if t.is_floating_point())

    def clamped_scales(self, weight: Tensor) -> int:
        """Number of stored scales that were clamped to the range of their dtype. `weight`: the original."""
        return 0

    def map(self: C, change: Callable[[Tensor], Tensor]) -> C:
        """The same with every tensor replaced by `change(tensor)`."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})  # type: ignore[type-var]

    def rows(self: C, wanted: slice) -> C:
        """A slice of the outputs; scales must be per row or per tensor."""
        count = self.shape[0]
        return self.map(lambda t: t[wanted] if t.dim() and t.shape[0] == count else t)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field; those that are None are left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False)
class IntCodes(Codes):
    """Integers on scales and zero points: `scale * (codes - zero_point)` in float32."""

    codes: Tensor  # uint8 [out, in], 0 .. 2**bits - 1 (symmetric: value + 2**(bits-1))
    scale: Tensor  # [out, groups] in its stored dtype; may be negative. One column per channel or tensor
    zero_point: Tensor | int  # uint8 [out, groups], or one for all groups (symmetric: 2**(bits-1))
    group_size: int  # as in a scheme
    not_finite = "a scale is NaN or Inf; check the layer's weights and calibration data"

    def dequantize(self) -> Tensor:
        out, columns = self.shape
        size, groups = self.group_size if self.group_size > 0 else columns, self.scale.shape[-1]
        values = self.codes.float()
        if groups * size != columns:
            values = torch.nn.functional.pad(values, (0, groups * size - columns))
        zero = self.zero_point.float().unsqueeze(-1) if isinstance(self.zero_point, Tensor) else self.zero_point
        values = values.view(out, groups, size).sub_(zero).mul_(self.scale.float().unsqueeze(-1))
        return values.view(out, groups * size)[:, :columns]

    def digest_parts(self, layer: QuantizedLayer, dtype: torch.dtype) -> tuple[Tensor | str, ...]:
        zero = self.zero_point
        zeros = zero if isinstance(zero, Tensor) else torch.full(self.scale.shape, zero)
        act_scale = None if layer.act_scale is None else float(layer.act_scale)
        return self.codes, self.scale, zeros.to(torch.uint8), repr((act_scale, layer.act_zero_point))

    def clamped_scales(self, weight: Tensor) -> int:
        return int((self.scale.abs() == torch.finfo(self.scale.dtype).max).sum())


@dataclass(frozen=True, eq=False)
class FloatCodes(Codes):
    """Small floats in blocks that share a scale, see `dequantize_minifloat`."""

    codes: Tensor  # uint8 [out, in] of `element`
    # Float32 values that the scheme's scale type holds: [out, groups], [1, 1] per tensor, [out/M, in/N] for blocks.
    scale: Tensor
    element: str  # name in `codecs.minifloat.MINIFLOATS`
    group_size: GroupSize  # as in a scheme
    global_scale: Tensor | None = None  # float32 scalar by which stored scales are divided (NVFP4)

    def dequantize(self) -> Tensor:
        element = MINIFLOATS[self.element]
        return dequantize_minifloat(self.codes, element, self.scale, self.group_size, self.global_scale)

    def digest_parts(self, layer: QuantizedLayer, dtype: torch.dtype) -> tuple[Tensor | str, ...]:
        scalars = (layer.act_scale, self.global_scale, layer.act_global_scale)
        found = repr(tuple(None if scalar is None else float(scalar) for scalar in scalars))
        return self.element, self.codes, self.scale.float(), found


@dataclass(frozen=True, eq=False)
class DenseWeight(Codes):
    """What the function of a data type without codes gave: the dequantized weight [out, in]."""

    weight: Tensor
    data_type: str = ""

    @property
    def not_finite(self) -> str:  # type: ignore[override]
        return f"data type {self.data_type!r} gave NaN or Inf"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self) -> Tensor:
        return self.weight.float()

    def digest_parts(self, layer: QuantizedLayer, dtype: torch.dtype) -> tuple[Tensor | str, ...]:
        return (layer.dequantize(dtype),)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One linear layer after quantization."""

    name: str  # the module's full name in the model
    scheme: QuantizationScheme
    codes: Codes
    bias: Tensor | None = None  # [out] in the model's dtype
    transposed: bool = False  # the module stores its weight as [in, out] (Transformers' Conv1D)
    act_scale: Tensor | None = None  # float32 scalar of static activations, exact in the model's dtype
    act_zero_point: int | None = None  # code of 0.0 in the signed range, for static asymmetric activations
    act_global_scale: Tensor | None = None  # float32 scalar by which scales of inputs are divided (NVFP4)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def codes_as(self, kind: type[C]) -> C:
        """The codes of a layer that is known to have this kind, such as `IntCodes`."""
        assert isinstance(self.codes, kind), f"{self.name}: {type(self.codes).__name__}, not {kind.__name__}"
        return self.codes

    def rows(self, wanted: slice) -> QuantizedLayer:
        """A slice of the outputs as a layer; scales must be per row or per tensor."""
        return replace(self, codes=self.codes.rows(wanted), bias=None if self.bias is None else self.bias[wanted])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in], computed in float32 and then cast to `dtype`."""
        return self.codes.dequantize().to(dtype)
