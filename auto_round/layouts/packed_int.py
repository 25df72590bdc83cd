"""The integer layouts of compressed-tensors: packed int32 rows for 2 to 8 bits, and plain int8 values.

    weight_packed      int32 [out, ceil(in*bits/32)]       codes along the input (`bit_stream.py`), zero-padded
    weight_shape       int64 [2]                           (out, in)
    weight_zero_point  int32 [ceil(out*bits/32), groups]   zero points along the output, for asymmetric layers
    weight_scale       float16 [out, groups]

Packed tensors hold unsigned values 0 .. 2**bits - 1: the library's signed integers plus 2**(bits-1), which are our
codes. The plain layout has `weight` and `weight_zero_point` as signed int8 instead. Static inputs add `input_scale`
[1] in the model's dtype and, when asymmetric, `input_zero_point` int8 [1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer, group_count
from auto_round.layouts.base import SCALE_DTYPE, IntegerLayout, TensorSpecs, integer_arrays, stored_group_size
from auto_round.layouts.bit_stream import pack_rows, padded_words, unpack_rows
from auto_round.schemes import QuantizationScheme


def signed_values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes 0 .. 2**bits - 1 as int8 values less 2**(bits-1), contiguous."""
    return (codes - 2 ** (bits - 1)).view(torch.int8).contiguous()  # bytes wrap


def stored_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `signed_values`."""
    return values.view(torch.uint8) + 2 ** (bits - 1)


class PlainIntLayout(IntegerLayout):
    """One signed byte per weight (`int-quantized`)."""

    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    activations: ClassVar[bool] = True

    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int,
        model_dtype: torch.dtype = torch.bfloat16,
    ) -> TensorSpecs:  # fmt: skip
        groups = group_count(in_features, stored_group_size(scheme))
        codes, zeros = self._code_specs(in_features, out_features, groups, scheme.bits)
        specs = codes | {"weight_scale": ((out_features, groups), SCALE_DTYPE)}
        if not scheme.sym:
            specs["weight_zero_point"] = zeros
        activations = scheme.activations
        if activations is not None and not activations.dynamic:
            specs["input_scale"] = ((1,), model_dtype)
            if not activations.sym:
                specs["input_zero_point"] = ((1,), torch.int8)
        return specs

    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        codes, scales, zeros = integer_arrays(layer)
        tensors, stored_zeros = self._pack_codes(codes, zeros, layer.scheme.bits)
        tensors["weight_scale"] = scales.contiguous()
        if not layer.scheme.sym:
            tensors["weight_zero_point"] = stored_zeros
        if layer.act_scale is not None:
            tensors["input_scale"] = layer.act_scale.reshape(1).to(model_dtype)
        if layer.act_zero_point is not None:
            tensors["input_zero_point"] = torch.tensor([layer.act_zero_point], dtype=torch.int8)
        return tensors

    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        codes, zeros = self._unpack_codes(tensors, scheme.bits)
        act_scale, act_zero = tensors.get("input_scale"), tensors.get("input_zero_point")
        return QuantizedLayer(
            name, scheme, codec_of(scheme).codes(codes, tensors["weight_scale"], zeros),
            act_scale=None if act_scale is None else torch.tensor(float(act_scale)),
            act_zero_point=None if act_zero is None else int(act_zero),
        )  # fmt: skip

    def _code_specs(
        self, in_features: int, out_features: int, groups: int, bits: int
    ) -> tuple[TensorSpecs, tuple[tuple[int, ...], torch.dtype]]:
        """Specs of the codes, and that of the zero points."""
        return {"weight": ((out_features, in_features), torch.int8)}, ((out_features, groups), torch.int8)

    def _pack_codes(
        self, codes: torch.Tensor, zeros: torch.Tensor, bits: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"weight": signed_values(codes, bits)}, signed_values(zeros, bits)

    def _unpack_codes(self, tensors: Mapping[str, torch.Tensor], bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        zeros = tensors.get("weight_zero_point")
        return stored_codes(tensors["weight"], bits), None if zeros is None else stored_codes(zeros, bits)


class PackedIntLayout(PlainIntLayout):
    """Codes packed in int32 words (`pack-quantized`)."""

    def _code_specs(
        self, in_features: int, out_features: int, groups: int, bits: int
    ) -> tuple[TensorSpecs, tuple[tuple[int, ...], torch.dtype]]:
        specs: TensorSpecs = {
            "weight_packed": ((out_features, padded_words(in_features, bits)), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
        return specs, ((padded_words(out_features, bits), groups), torch.int32)

    def _pack_codes(
        self, codes: torch.Tensor, zeros: torch.Tensor, bits: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        shape = torch.tensor(codes.shape, dtype=torch.int64)
        tensors = {"weight_packed": pack_rows(codes, bits), "weight_shape": shape}
        return tensors, pack_rows(zeros.T, bits).T.contiguous()

    def _unpack_codes(self, tensors: Mapping[str, torch.Tensor], bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, columns = tensors["weight_shape"].tolist()  # the file's own width, as other readers take it
        zeros = tensors.get("weight_zero_point")
        zeros = None if zeros is None else unpack_rows(zeros.T, bits, out).T.contiguous()
        return unpack_rows(tensors["weight_packed"], bits, columns), zeros


PLAIN_INT, PACKED_INT = PlainIntLayout(), PackedIntLayout()
