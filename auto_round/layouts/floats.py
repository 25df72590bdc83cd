"""The layouts of the small float types: MXFP4, MXFP8, MXINT4, NVFP4 and FP8; docs/formats.md lists their tensors.

Two 4-bit codes are a byte, the even column in the low nibble. E8M0 scales are one byte, 2**(byte - 127); 255 is NaN
(OCP MX v1.0, 5.4.1). 8-bit codes are the bytes of `torch.float8_e4m3fn` and `torch.float8_e5m2`. Packing rounds
nothing: a scale that its dtype cannot hold raises an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.minifloat import MINIFLOATS, MinifloatType
from auto_round.codecs.quantized_layer import FloatCodes, QuantizedLayer, group_count
from auto_round.errors import NumericsError
from auto_round.layouts.base import Layout, Tensors, TensorSpecs
from auto_round.schemes import QuantizationScheme

_MANTISSA_BITS = 23  # of float32, whose exponent has the bias of E8M0
_SMALLEST = 1 << 22  # bits of 2**-127, the one scale that float32 holds as a subnormal
_NAN = 0x7FC00000
FP8_SCALE = torch.bfloat16
# Dtypes of the scales by codec family; uint8 is E8M0. All but those of FP8 are for whole groups of inputs only.
SCALES = {"mx_fp": torch.uint8, "mx_int": torch.uint8, "nv_fp": torch.float8_e4m3fn, "fp": FP8_SCALE}


def pack_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """float32 powers of two from 2**-127 to 2**127 as uint8 bytes. Raises NumericsError for any other value."""
    bits = scale.float().contiguous().view(torch.int32)
    stored = (bits >> _MANTISSA_BITS).to(torch.uint8)  # the exponent's field; that of 2**-127 is zero
    if not torch.equal(unpack_e8m0(stored).view(torch.int32), bits) or bool((stored == 255).any()):
        raise NumericsError("a scale is no power of two from 2**-127 to 2**127; E8M0 bytes hold no other values")
    return stored


def unpack_e8m0(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_e8m0`, float32. 255 becomes NaN."""
    bits = stored.to(torch.int32) << _MANTISSA_BITS
    bits = torch.where(stored == 0, _SMALLEST, torch.where(stored == 255, _NAN, bits))
    return bits.to(torch.int32).view(torch.float32)


def cast_exactly(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` cast to `dtype`. Raises NumericsError when one of them is not exactly representable."""
    stored = values.to(dtype)
    if not torch.equal(stored.float(), values.float()):
        raise NumericsError(f"a scale is not exactly representable in {dtype}, its stored dtype")
    return stored


def pack_codes(codes: torch.Tensor, element: str) -> torch.Tensor:
    """uint8 codes [out, in] as stored: two 4-bit codes a byte, or a tensor of PyTorch's float8 dtype."""
    dtype = MINIFLOATS[element].dtype
    if dtype is not None:
        return codes.contiguous().view(dtype)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 1::2].bitwise_left_shift(4).bitwise_or_(codes[:, 0::2])


def unpack_codes(stored: torch.Tensor, element: str, columns: int) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    if MINIFLOATS[element].dtype is not None:
        return stored.view(torch.uint8)
    codes = torch.empty(stored.shape[0], 2 * stored.shape[1], dtype=torch.uint8, device=stored.device)
    codes[:, 0::2] = stored & 15
    codes[:, 1::2] = stored >> 4
    return codes[:, :columns]


def has_input_scale(scheme: QuantizationScheme) -> bool:
    """Whether the inputs have one calibrated scale (static activations)."""
    activations = scheme.activations
    return activations is not None and not activations.dynamic and not activations.has_global_scale


def float_family_of(data_type: str) -> str | None:
    """`mx_fp`, `mx_int`, `nv_fp` or `fp` for names of small float types, else None."""
    name = data_type.replace("_", "")
    if name == "fp" or name.startswith("fp8"):
        return "fp"
    return next((family for family in ("mx_fp", "mx_int", "nv_fp") if name.startswith(family.replace("_", ""))), None)


@dataclass(frozen=True)
class FloatLayout(Layout):
    """Tensors of a small float layer; the attributes say how readers of FP8 layers differ. `channel_columns`:
    per-channel scales are [out, 1] rather than [out]; `block_scale`: name of the scales of two-dimensional blocks;
    `tensor_scale`: dtype of the per-tensor scale [1]."""

    channel_columns: bool
    block_scale: str
    tensor_scale: torch.dtype
    leaves: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight", "weight_scale", "weight_scale_inv", "weight_global_scale", "input_global_scale",
        "input_scale",
    )  # fmt: skip

    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int, model_dtype: torch.dtype = torch.bfloat16
    ) -> TensorSpecs:
        dtype, inputs = _element(scheme).dtype, scheme.activations
        name, shape, scale_dtype = self._scale(scheme, in_features, out_features)
        specs: TensorSpecs = {"weight_packed": ((out_features, -(-in_features // 2)), torch.uint8)}
        if dtype is not None:
            specs = {"weight": ((out_features, in_features), dtype)}
        specs[name] = (shape, scale_dtype)
        if codec_of(scheme).has_global_scale:
            specs["weight_global_scale"] = ((1,), torch.float32)
        if inputs is not None and inputs.has_global_scale:
            specs["input_global_scale"] = ((1,), torch.float32)
        if has_input_scale(scheme):
            specs["input_scale"] = ((1,), model_dtype)
        return specs

    def problem(self, scheme: QuantizationScheme) -> str | None:
        codec, size, inputs = codec_of(scheme), scheme.group_size, scheme.activations
        element, scales = MINIFLOATS.get(str(codec.element)), SCALES.get(codec.family)
        if scales is None or element is None or (element.dtype is None and element.bits != 4):
            return f"data type {scheme.data_type!r} has no layout with {scheme.bits} bits"
        if not scheme.sym:
            return f"data type {scheme.data_type!r} has no zero points, and the scheme is asymmetric"
        if scales != FP8_SCALE and not (isinstance(size, int) and size > 0):
            return f"data type {scheme.data_type!r} has scales for groups along the input, not group_size {size}"
        if inputs is None:
            return None
        scales = SCALES.get(codec_of(inputs).family)
        if scales is None:
            return f"activations of data type {inputs.data_type!r} with {inputs.bits} bits have no layout here"
        if scales != FP8_SCALE and not inputs.dynamic:
            return f"activations of data type {inputs.data_type!r} have no static scales"
        return None

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """4-bit and MX types need whole groups."""
        size = scheme.group_size
        if SCALES[codec_of(scheme).family] == FP8_SCALE or not isinstance(size, int) or in_features % size == 0:
            return None
        return f"in_features={in_features} is not a multiple of the group size {size}"

    def is_finite(self, scale: torch.Tensor) -> bool:
        return bool((scale != 255).all()) if scale.dtype == torch.uint8 else super().is_finite(scale)

    def _scale(self, scheme: QuantizationScheme, columns: int, rows: int) -> tuple[str, tuple[int, ...], torch.dtype]:
        """Name, shape and dtype of the scales."""
        size, dtype = scheme.group_size, SCALES[codec_of(scheme).family]
        if isinstance(size, tuple):
            return self.block_scale, (-(-rows // size[0]), -(-columns // size[1])), dtype
        if size == 0:
            return "weight_scale", (1,), self.tensor_scale
        if size == -1 and not self.channel_columns:
            return "weight_scale", (rows,), dtype
        return "weight_scale", (rows, group_count(columns, size)), dtype

    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """The layer's tensors. Raises NumericsError when a scale is not exactly representable in its stored dtype."""
        own = layer.codes_as(FloatCodes)
        (codes, _), *others = self.specs(layer.scheme, layer.in_features, layer.out_features, model_dtype).items()
        tensors = {codes: pack_codes(own.codes, own.element)}
        scalars = {
            "weight_global_scale": own.global_scale, "input_scale": layer.act_scale,
            "input_global_scale": layer.act_global_scale,
        }  # fmt: skip
        for leaf, (shape, dtype) in others:
            value = scalars.get(leaf, own.scale)
            assert value is not None, f"{layer.name}: no value for {leaf}"
            value = value.float().reshape(shape)
            tensors[leaf] = pack_e8m0(value) if dtype == torch.uint8 else cast_exactly(value, dtype)
        return tensors

    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int
    ) -> QuantizedLayer:
        element, (leaf, shape, _) = _element(scheme), self._scale(scheme, in_features, out_features)
        scale = unpack_e8m0(tensors[leaf]) if tensors[leaf].dtype == torch.uint8 else tensors[leaf].float()
        codes = unpack_codes(tensors["weight_packed" if element.dtype is None else "weight"], element.name, in_features)
        scalar = lambda key: None if tensors.get(key) is None else tensors[key].detach().float().reshape(())
        own = codec_of(scheme).codes(codes, scale.reshape(shape[0], -1), global_scale=scalar("weight_global_scale"))
        return QuantizedLayer(
            name, scheme, own, act_scale=scalar("input_scale"), act_global_scale=scalar("input_global_scale")
        )


AUTO_ROUND_FLOATS = FloatLayout(False, "weight_scale_inv", FP8_SCALE)
COMPRESSED_TENSORS_FLOATS = FloatLayout(True, "weight_scale", torch.float32)


def _element(scheme: QuantizationScheme) -> MinifloatType:
    name = codec_of(scheme).element
    assert name is not None, scheme
    return MINIFLOATS[name]


def layout_name(scheme: QuantizationScheme) -> str:
    """Short name of the layout: mxfp4, nvfp4, fp8_static, fp8_block, ..."""
    family = codec_of(scheme).family
    if SCALES[family] != FP8_SCALE:
        return f"{family.replace('_', '')}{scheme.bits}"
    if isinstance(scheme.group_size, tuple):
        return "fp8_block"
    return "fp8_static" if has_input_scale(scheme) else "fp8"
