"""The layouts of integers in groups along the input: GPTQ, AWQ, MLX and those of compressed-tensors (docs/formats.md).

Words are those of `bit_stream.py`: along the input for codes, along the output for zero points. AWQ packs both along
the output, nibble i of word w for output 8w + AWQ_ORDER[i]. MLX stores `biases`, -scale * zero point. int-quantized
stores bytes less 2**(bits-1); it and pack-quantized store zero points only of asymmetric layers.

GPTQ "v1" files (AutoGPTQ, `auto_round:auto_gptq`) hold zero points less 1, modulo 2**bits: 0 is stored as 2**bits - 1
and read back as 0. Readers that add 1 without wrapping see 2**bits there, so asymmetric layers use other layouts by
default. "v2" and plain `auto_round` files hold them unchanged.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer, group_count
from auto_round.errors import ModelError, NumericsError
from auto_round.layouts.base import Layout, Tensors, TensorSpecs
from auto_round.layouts.bit_stream import pack_rows, pack_words, padded_words, period, unpack_rows, words_needed
from auto_round.schemes import GroupSize, QuantizationScheme

SCALE_DTYPE = torch.float16  # codes were chosen with float16 scales
# Weights dequantized at once, on CPUs and on other devices: bounds the temporary copies.
CHUNK, DEVICE_CHUNK = 1 << 20, 1 << 25
Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes uint8 [out, in], scales and zero points [out, groups]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stored_group_size(scheme: QuantizationScheme) -> int:
    """`group_size` of integers as written: per tensor (0) becomes per channel (-1), with the scale repeated."""
    assert isinstance(scheme.group_size, int)
    return scheme.group_size if scheme.group_size > 0 else -1


def chunks_of_rows(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Slices of rows that are dequantized at once."""
    step = max(1, (CHUNK if device.type == "cpu" else DEVICE_CHUNK) // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def dequantize_chunked(codes: IntCodes, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`."""
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.codes.device)
    for rows in chunks_of_rows(*codes.shape, dense.device):
        dense[rows] = codes.rows(rows).dequantize()
    return dense


class IntegerLayout(Layout):
    """A layout of integers in groups along the input. `bits`: widths that it holds; `group_sizes`: the sizes it holds;
    empty for any; `activations`: whether readers of the files quantize inputs to integers, where the scheme does."""

    bits: ClassVar[tuple[int, ...]]
    families: ClassVar[tuple[str, ...]] = ("int",)
    group_sizes: ClassVar[tuple[int, ...]] = ()
    activations: ClassVar[bool] = False

    def problem(self, scheme: QuantizationScheme) -> str | None:
        inputs = scheme.activations
        if self.group_sizes and scheme.group_size not in self.group_sizes:
            return f"it holds groups of {_choice(self.group_sizes)}, not group_size {scheme.group_size}; set group_size"
        if isinstance(scheme.group_size, tuple):
            return f"group_size {scheme.group_size} is a block, and the layout has groups along the input only"
        if codec_of(scheme).family not in self.families:
            return f"data type {scheme.data_type!r} has no layout here"
        if inputs is not None and not self.activations:
            return "activations are quantized, and the integer layouts hold weights only"
        if inputs is not None and (
            codec_of(inputs).family not in self.families or isinstance(inputs.group_size, tuple)
        ):
            return f"activations of data type {inputs.data_type!r} with integer weights have no layout here"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if scheme.bits not in self.bits:
            return f"it holds {_choice(self.bits)}-bit weights, not {scheme.bits}-bit ones"
        return None

    def group_size(self, scheme: QuantizationScheme) -> GroupSize:
        return stored_group_size(scheme)

    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        own = layer.codes_as(IntCodes)
        shape = (layer.out_features, group_count(layer.in_features, stored_group_size(layer.scheme)))
        zeros = torch.as_tensor(own.zero_point, device=own.codes.device).to(torch.uint8)
        return self._pack(layer, (own.codes, own.scale.expand(shape).to(SCALE_DTYPE), zeros.expand(shape)), model_dtype)

    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int
    ) -> QuantizedLayer:
        return QuantizedLayer(name, scheme, codec_of(scheme).codes(*self._unpack(name, scheme.bits, tensors)))

    def dequantize(
        self, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        layer = self.unpack("", scheme, tensors, in_features, out_features)
        return dequantize_chunked(layer.codes_as(IntCodes), dtype)

    @abstractmethod
    def _pack(self, layer: QuantizedLayer, arrays: Arrays, model_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of a layer with these codes, scales and zero points."""

    @abstractmethod
    def _unpack(self, name: str, bits: int, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scales and zero points, contiguous; None for zero points in the middle."""


def _choice(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


@dataclass(frozen=True)
class GptqLayout(IntegerLayout):
    """GPTQ tensors with zero points stored minus `zero_offset`; `g_idx`, the group of each input, if AutoGPTQ's."""

    zero_offset: int
    g_idx: bool = False
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int, model_dtype: torch.dtype = torch.bfloat16
    ) -> TensorSpecs:
        groups = group_count(in_features, stored_group_size(scheme))
        specs: TensorSpecs = {
            "qweight": (self._weight_shape(in_features, out_features, scheme.bits), torch.int32),
            "qzeros": ((groups, words_needed(out_features, scheme.bits)), torch.int32),
            "scales": ((groups, out_features), SCALE_DTYPE),
        }
        return specs | {"g_idx": ((in_features,), torch.int32)} if self.g_idx else specs

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        unit = period(scheme.bits)[0]
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % unit:
                return f"{what}={size} is not a multiple of {unit}"
        return None

    def words(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`qweight` and `qzeros` of codes and zero points. Raises UnsupportedError when these fill no whole words."""
        stored = (zeros.to(torch.int16) - self.zero_offset).bitwise_and_((1 << bits) - 1).to(torch.uint8)
        return pack_words(codes.T, bits), pack_words(stored, bits).T.contiguous()

    def codes(self, qweight: torch.Tensor, bits: int) -> torch.Tensor:
        return unpack_rows(qweight.T, bits)

    def zeros(self, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
        """Zero points uint8 [out, groups], contiguous; adding the offset wraps modulo 2**bits."""
        stored = unpack_rows(qzeros, bits).to(torch.int16)
        return (stored + self.zero_offset).bitwise_and_((1 << bits) - 1).to(torch.uint8).T.contiguous()

    def _weight_shape(self, in_features: int, out_features: int, bits: int) -> tuple[int, int]:
        return words_needed(in_features, bits), out_features

    def _pack(self, layer: QuantizedLayer, arrays: Arrays, model_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        codes, scales, zeros = arrays
        qweight, qzeros = self.words(codes, zeros, layer.scheme.bits)
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.contiguous()}
        if self.g_idx:
            size = stored_group_size(layer.scheme)
            columns = torch.arange(layer.in_features, dtype=torch.int32)
            tensors["g_idx"] = columns // (size if size > 0 else layer.in_features)
        return tensors

    def _unpack(self, name: str, bits: int, tensors: Tensors) -> Arrays:
        scales = tensors["scales"].T.contiguous()
        return self.codes(tensors["qweight"], bits), scales, self.zeros(tensors["qzeros"], bits)


class AwqLayout(GptqLayout):
    """AutoAWQ's "gemm" version: the tensors of GPTQ with AWQ's words."""

    bits: ClassVar[tuple[int, ...]] = (4,)

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        if scheme.bits != 4:
            return f"the AWQ layout has no {scheme.bits}-bit form"
        return f"out_features={out_features} is not a multiple of 8" if out_features % 8 else None

    def words(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._words(codes), self._words(zeros)

    def codes(self, qweight: torch.Tensor, bits: int) -> torch.Tensor:
        natural = unpack_rows(qweight, 4).T.contiguous()
        order = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()
        return natural.index_select(
            0, (torch.arange(0, len(natural), 8, device=order.device)[:, None] + order).view(-1)
        )

    def zeros(self, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
        return self.codes(qzeros, bits)

    def _weight_shape(self, in_features: int, out_features: int, bits: int) -> tuple[int, int]:
        return in_features, words_needed(out_features, bits)

    def _words(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 [out, n] to int32 [n, out/8]."""
        words = torch.zeros(words_needed(len(values), 4), values.shape[1], dtype=torch.int32, device=values.device)
        for byte in range(4):
            low, high = (values[column::8] for column in AWQ_ORDER[2 * byte : 2 * byte + 2])
            words.bitwise_or_((low | (high << 4)).to(torch.int32) << (8 * byte))
        return words.T.contiguous()


def bias_storage_dtype(sym: bool, scale_dtype: torch.dtype) -> torch.dtype:
    """The narrowest dtype of exact MLX biases: symmetric zero points are powers of two, others have 8 bits more."""
    return scale_dtype if sym else torch.float32


def mlx_biases(scale: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype, layer: str = "a layer") -> torch.Tensor:
    """-scale * zero point, [out, groups]. Raises NumericsError, which names the layer, when `dtype` cannot hold one."""
    biases = (0.0 - scale.float() * zeros.float()).to(dtype)
    if not bool(torch.isfinite(biases).all()):
        raise NumericsError(
            f"{layer}: the MLX layout stores scale times zero point, here beyond {dtype}: weights above 65504 in "
            "magnitude; leave the layer in full precision with ignore_layers, or use sym=False (float32 biases)"
        )
    return biases


def mlx_zero_points(scale: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """uint8 [out, groups]: the integer zero points nearest to -biases / scale."""
    return (-biases.float() / scale.float()).round_().clamp_(0, 255).to(torch.uint8)


class MlxLayout(IntegerLayout):
    """The tensors that MLX's quantized matrix product reads (`mlx/ops.cpp`, `quantize`): w = scale * code + bias."""

    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8)
    group_sizes: ClassVar[tuple[int, ...]] = (32, 64, 128)

    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int, model_dtype: torch.dtype = torch.bfloat16
    ) -> TensorSpecs:
        shape = (out_features, group_count(in_features, stored_group_size(scheme)))
        return {
            "weight": ((out_features, words_needed(in_features, scheme.bits)), torch.uint32),
            "scales": (shape, SCALE_DTYPE),
            "biases": (shape, bias_storage_dtype(scheme.sym, SCALE_DTYPE)),
        }

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        size = stored_group_size(scheme)
        if size <= 0 or in_features % size:
            return f"in_features={in_features} is not a multiple of the group size {size}"
        return None if in_features * scheme.bits % 32 == 0 else f"in_features={in_features} does not fill whole words"

    def dequantize(
        self, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """scale * code + bias: other programs store biases that are not scales times integers."""
        weight, scales, biases = tensors["weight"], tensors["scales"].float(), tensors["biases"].float()
        dense = torch.empty(out_features, in_features, dtype=dtype, device=weight.device)
        for rows in chunks_of_rows(out_features, in_features, weight.device):
            values = unpack_rows(weight[rows], scheme.bits).view(-1, scales.shape[1], in_features // scales.shape[1])
            values = values.float().mul_(scales[rows].unsqueeze(-1)).add_(biases[rows].unsqueeze(-1))
            dense[rows] = values.view(-1, in_features)
        return dense

    def _pack(self, layer: QuantizedLayer, arrays: Arrays, model_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        codes, scales, zeros = arrays
        dtype = bias_storage_dtype(layer.scheme.sym, SCALE_DTYPE)
        return {
            "weight": pack_rows(codes, layer.scheme.bits).view(torch.uint32),
            "scales": scales.contiguous(),
            "biases": mlx_biases(scales, zeros, dtype, layer.name),
        }

    def _unpack(self, name: str, bits: int, tensors: Tensors) -> Arrays:
        scales, biases = tensors["scales"], tensors["biases"]
        zeros = mlx_zero_points(scales, biases)
        if not torch.equal(biases, mlx_biases(scales, zeros, biases.dtype, name)):
            raise ModelError(f"layer {name}: its biases are not its scales times integer zero points")
        return unpack_rows(tensors["weight"], bits), scales, zeros


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
        self, scheme: QuantizationScheme, in_features: int, out_features: int, model_dtype: torch.dtype = torch.bfloat16
    ) -> TensorSpecs:
        groups, inputs = group_count(in_features, stored_group_size(scheme)), scheme.activations
        specs = self._code_specs(in_features, out_features, groups, scheme.bits)
        zeros = specs.pop("weight_zero_point")
        specs["weight_scale"] = ((out_features, groups), SCALE_DTYPE)
        if not scheme.sym:
            specs["weight_zero_point"] = zeros
        if inputs is not None and not inputs.dynamic:
            specs["input_scale"] = ((1,), model_dtype)
            if not inputs.sym:
                specs["input_zero_point"] = ((1,), torch.int8)
        return specs

    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Tensors, in_features: int, out_features: int
    ) -> QuantizedLayer:
        scale, zero = tensors.get("input_scale"), tensors.get("input_zero_point")
        return replace(
            super().unpack(name, scheme, tensors, in_features, out_features),
            act_scale=None if scale is None else torch.tensor(float(scale)),
            act_zero_point=None if zero is None else int(zero),
        )

    def _pack(self, layer: QuantizedLayer, arrays: Arrays, model_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        codes, scales, zeros = arrays
        tensors = self._pack_codes(codes, zeros, layer.scheme.bits)
        stored_zeros = tensors.pop("weight_zero_point")
        tensors["weight_scale"] = scales.contiguous()
        if not layer.scheme.sym:
            tensors["weight_zero_point"] = stored_zeros
        if layer.act_scale is not None:
            tensors["input_scale"] = layer.act_scale.reshape(1).to(model_dtype)
        if layer.act_zero_point is not None:
            tensors["input_zero_point"] = torch.tensor([layer.act_zero_point], dtype=torch.int8)
        return tensors

    def _unpack(self, name: str, bits: int, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        zeros = tensors.get("weight_zero_point")
        zeros = None if zeros is None else stored_codes(zeros, bits)
        return stored_codes(tensors["weight"], bits), tensors["weight_scale"], zeros

    def _code_specs(self, in_features: int, out_features: int, groups: int, bits: int) -> TensorSpecs:
        zeros = (out_features, groups), torch.int8
        return {"weight": ((out_features, in_features), torch.int8), "weight_zero_point": zeros}

    def _pack_codes(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        return {"weight": signed_values(codes, bits), "weight_zero_point": signed_values(zeros, bits)}


class PackedIntLayout(PlainIntLayout):
    """Codes packed in int32 words (`pack-quantized`)."""

    def _code_specs(self, in_features: int, out_features: int, groups: int, bits: int) -> TensorSpecs:
        return {
            "weight_packed": ((out_features, padded_words(in_features, bits)), torch.int32),
            "weight_shape": ((2,), torch.int64),
            "weight_zero_point": ((padded_words(out_features, bits), groups), torch.int32),
        }

    def _pack_codes(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": pack_rows(codes, bits),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
            "weight_zero_point": pack_rows(zeros.T, bits).T.contiguous(),
        }

    def _unpack(self, name: str, bits: int, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        out, columns = tensors["weight_shape"].tolist()  # the file's own width, as other readers take it
        zeros = tensors.get("weight_zero_point")
        zeros = None if zeros is None else unpack_rows(zeros.T, bits, out).T.contiguous()
        return unpack_rows(tensors["weight_packed"], bits, columns), tensors["weight_scale"], zeros


GPTQ_V1, GPTQ_V2, AWQ, MLX = GptqLayout(1), GptqLayout(0), AwqLayout(0), MlxLayout()
PLAIN_INT, PACKED_INT = PlainIntLayout(), PackedIntLayout()
