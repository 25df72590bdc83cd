"""The kinds of codecs, and `codec_of`, the one function that tells which of them a scheme means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import auto_round.codecs.int as integers
from auto_round.codecs.activation import activation_function
from auto_round.codecs.base import CODECS, Codec, Grid, Scheme, StartOptions, TunedParameters, register_codec
from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, effective_scale, encode, search_scales, spec_for_bits
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType, assign_codes, divisor_of
from auto_round.codecs.minifloat import block_shape
from auto_round.codecs.quantized_layer import DenseWeight, FloatCodes, IntCodes
from auto_round.codecs.registry import clamp_to_float16, get_quant_func, reshape_pad_tensor_by_group_size
from auto_round.codecs.tunable import FloatGrid, FloatStart, GgmlGrid, IntGrid
from auto_round.schemes import QuantizationScheme

# Weights rounded at once: few enough for a shared cache, without a float32 copy of a whole layer; many enough to hide
# the cost of PyTorch calls.
_ROWS = 1 << 20
_GPU_ROWS = 1 << 26


def codec_of(scheme: Scheme, ggml: str | None = None, in_features: int | None = None) -> Codec:
    """The codec of a scheme; for a layer of that width, where a type needs whole blocks, and stored in the ggml type of
    that name, if a plan says so. Raises UnsupportedError when there is no such data type, or not with that many
    bits."""
    if scheme.bits >= 16:
        return Unquantized(scheme)
    if ggml is not None:
        return GgmlCodec(scheme, GGML_TYPES[ggml])
    usual = FloatCodec if scheme.data_type in BLOCK_FLOAT_SPECS else FunctionCodec
    return CODECS.get(scheme.data_type, usual)(scheme).for_width(in_features)


class IntCodec(Codec):
    """Integers in groups along the input, symmetric or with zero points."""

    family = "int"
    head_searches: ClassVar[tuple[str, ...]] = ("descent",)
    tunes_scales: ClassVar[bool] = True

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        assert isinstance(scheme.group_size, int)
        self.group_size, self.rows_independent = scheme.group_size, scheme.group_size != 0

    @property
    def label(self) -> str:
        scheme, size = self.scheme, self.group_size
        assert isinstance(scheme, QuantizationScheme)
        if scheme.quantizes_activations:
            return scheme.describe()
        return f"W{scheme.bits}A16{f'G{size}' if size > 0 else ''}{'' if scheme.sym else ' asymmetric'}"

    def problem(self) -> str | None:
        if not 2 <= self.scheme.bits <= 8:
            return f"bits={self.scheme.bits}; integers of 2 to 8 bits are available"
        return None

    def start(self, weight: Tensor, options: StartOptions) -> integers.QuantParams:
        """Scales [out, groups, 1], or [1, 1, 1] per tensor."""
        scheme, groups = self.scheme, self.groups(weight)
        if not options.searched:
            return integers.integer_qparams(groups, scheme.bits, scheme.sym, scale_dtype=options.scale_dtype)
        importance = options.importance
        if importance is not None and self.group_size == 0:
            importance = importance.repeat(weight.shape[0]).view(1, -1)
        elif importance is not None:  # padding has zero importance
            importance, _ = reshape_pad_tensor_by_group_size(importance.view(1, -1), self.group_size)
        return integers.search_qparams(groups, scheme.bits, scheme.sym, importance, options.scale_dtype)

    def encode(self, weight: Tensor, start: integers.QuantParams, delta: Tensor | None = None) -> IntCodes:
        """`delta`: in units of one code, [out, groups, group_size] or per tensor [1, 1, out * in], in any shape."""
        groups = self.groups(weight)
        delta = None if delta is None else delta.reshape(groups.shape)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        for rows in _row_chunks(groups):
            numbers = integers.to_codes(groups[rows], start.select(rows), 0.0 if delta is None else delta[rows])
            codes[rows] = integers.stored_codes(numbers, start.bits)
        return self._stored(start, codes, weight.shape)

    def quantize(self, weight: Tensor, options: StartOptions) -> IntCodes:
        if options.searched:
            return self.encode(weight, self.start(weight, options))
        # The same in half the passes over the weight.
        scheme, groups, found = self.scheme, self.groups(weight), []
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        for rows in _row_chunks(groups):
            part, codes[rows] = integers.round_groups(groups[rows], scheme.bits, scheme.sym, options.scale_dtype)
            found.append(part)
        return self._stored(integers.concat_qparams(found), codes, weight.shape)

    def grid(self, start: integers.QuantParams, shape: tuple[int, int]) -> Grid:
        zero = start.zero.squeeze(-1).expand(shape[0], -1) if isinstance(start.zero, Tensor) else start.zero
        scale = start.scale.squeeze(-1).expand(shape[0], -1)
        return Grid(scale, self.group_size if self.group_size > 0 else shape[1], 0, 2**start.bits - 1, zero)

    def with_codes(self, start: integers.QuantParams, codes: Tensor) -> IntCodes:
        return self._stored(start, codes, codes.shape)

    def codes(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, global_scale: Tensor | None = None
    ) -> IntCodes:
        middle = 2 ** (self.scheme.bits - 1)
        return IntCodes(codes, scale, middle if zero_point is None else zero_point, self.group_size)

    def tunable(self, starts: Sequence[integers.QuantParams]) -> IntGrid:
        return IntGrid(starts, self.group_size)

    def tuned(self, in_features: int) -> TunedParameters:
        size = self.group_size if self.group_size > 0 else in_features
        return TunedParameters(size, 3 if self.scheme.sym else 4, snapshot=1)

    def groups(self, weight: Tensor) -> Tensor:
        """[out, in] as [out, groups, group_size], zero-padded; per tensor as [1, 1, out * in]."""
        groups, _ = reshape_pad_tensor_by_group_size(weight, self.group_size)
        return groups.view(1 if self.group_size == 0 else weight.shape[0], -1, groups.shape[-1])

    def _stored(self, start: integers.QuantParams, codes: Tensor, shape: tuple[int, ...]) -> IntCodes:
        """Codes [out, in] or in the shape of the groups, with one scale a row also where the tensor has one."""
        out, columns = shape
        codes = codes.view(out, -1)[:, :columns]
        scale = start.scale.squeeze(-1).to(start.scale_dtype).expand(out, -1)
        zero: Tensor | int = int(start.zero) if not isinstance(start.zero, Tensor) else 0
        if isinstance(start.zero, Tensor):
            zero = start.zero.squeeze(-1).to(torch.uint8).expand(out, -1)
        return IntCodes(codes, scale, zero, self.group_size).map(Tensor.contiguous)


def _row_chunks(groups: Tensor) -> Iterator[slice]:
    most = _ROWS if groups.device.type == "cpu" else _GPU_ROWS
    step = max(1, most // max(1, groups.shape[1] * groups.shape[2]))
    for start in range(0, groups.shape[0], step):
        yield slice(start, start + step)


class FloatCodec(Codec):
    """Small floats in blocks that share a scale: MXFP, NVFP4, FP8 and types of `register_float`."""

    symmetric_only = True
    input_scale_dtype = torch.bfloat16

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.spec = spec = spec_for_bits(BLOCK_FLOAT_SPECS[scheme.data_type], scheme.data_type, scheme.bits)
        self.family, self.element, self.has_global_scale = spec.family, spec.element.name, spec.has_global_scale
        self.rows_independent = scheme.group_size != 0 and not spec.has_global_scale

    def start(self, weight: Tensor, options: StartOptions) -> FloatStart:
        size, shared = self.scheme.group_size, self.spec.global_scale(weight, options.global_scale)
        if options.searched:
            return FloatStart(search_scales(weight, self.spec, size, options.importance, shared), shared)
        return FloatStart(encode(weight, self.spec, size, global_scale=shared).scale, shared)

    def encode(self, weight: Tensor, start: FloatStart, delta: Tensor | None = None) -> FloatCodes:
        """`delta`: in units of the element's step, [R, M, C, N]."""
        size = self.scheme.group_size
        return encode(weight, self.spec, size, scale=start.scale, v=delta, global_scale=start.global_scale)

    def grid(self, start: FloatStart, shape: tuple[int, int]) -> Grid:
        element, (r, m, c, n) = self.spec.element, block_shape(shape, self.scheme.group_size)
        scale = effective_scale(start.scale.float(), start.global_scale).view(r, c)
        scale = divisor_of(scale.repeat_interleave(m, 0)[: shape[0]])
        limits = -element.maximum, element.maximum
        return Grid(scale, n, *limits, mantissa=element.mantissa, smallest=2.0**element.lowest, encode=element.encode)

    def with_codes(self, start: FloatStart, codes: Tensor) -> FloatCodes:
        return self.codes(codes, start.scale, None, start.global_scale)

    def codes(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, global_scale: Tensor | None = None
    ) -> FloatCodes:
        return FloatCodes(codes, scale, self.spec.element.name, self.scheme.group_size, global_scale)

    def tunable(self, starts: Sequence[FloatStart]) -> FloatGrid:
        return FloatGrid(starts, self.spec, self.scheme.group_size)

    def tuned(self, in_features: int) -> TunedParameters:
        size = self.scheme.group_size
        return TunedParameters(size if isinstance(size, int) and size > 0 else in_features, 3, snapshot=4)


class GgmlCodec(Codec):
    """A ggml block type: `start` is blocks whose codes do not count. Scales are float16, so weights beyond are cut."""

    family = "ggml"
    head_searches: ClassVar[tuple[str, ...]] = ("descent", "plain")
    rows_independent = True

    def __init__(self, scheme: Scheme, kind: GgmlType) -> None:
        super().__init__(scheme)
        self.kind = kind

    def uses_feedback(self, asked: bool) -> bool:
        return True

    def for_width(self, in_features: int | None) -> Codec:
        return self if in_features is None or in_features % self.kind.block == 0 else FunctionCodec(self.scheme)

    def limited(self, weight: Tensor) -> Tensor:
        return clamp_to_float16(weight)

    def start(self, weight: Tensor, options: StartOptions) -> GgmlBlocks:
        weight = self.limited(weight)
        if not options.searched:
            return plain_blocks(weight, self.kind.name)
        return search_blocks(weight, self.kind.name, options.importance, options.quick, codes=not options.quick)

    def encode(self, weight: Tensor, start: GgmlBlocks, delta: Tensor | None = None) -> GgmlBlocks:
        """`delta`: in units of one code, [out, in] or in groups."""
        return assign_codes(weight, start, delta)

    def quantize(self, weight: Tensor, options: StartOptions) -> GgmlBlocks:
        return self.start(weight, options)

    def grid(self, start: GgmlBlocks, shape: tuple[int, int]) -> Grid:
        kind, bottom = self.kind, 1 if self.kind.bits == 8 else 0
        return Grid(divisor_of(start.step()), kind.group, bottom, kind.codes - 1, kind.zero, start.minimum())

    def with_codes(self, start: GgmlBlocks, codes: Tensor) -> GgmlBlocks:
        return replace(start, codes=codes)

    def tunable(self, starts: Sequence[GgmlBlocks]) -> GgmlGrid:
        return GgmlGrid(starts)

    def tuned(self, in_features: int) -> TunedParameters:
        return TunedParameters(self.kind.group, 4, snapshot=4)


class FunctionCodec(Codec):
    """A data type that is a registered function from weights to dequantized weights, without codes."""

    family = "function"

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        if isinstance(scheme, QuantizationScheme):
            self.function = get_quant_func(scheme.data_type, scheme.bits, scheme.sym)
        else:
            self.function = activation_function(scheme)

    def uses_feedback(self, asked: bool) -> bool:
        return False

    def start(self, weight: Tensor, options: StartOptions) -> StartOptions:
        return options

    def call(self, weight: Tensor, start: StartOptions, **learned: Tensor) -> tuple[Any, Any, Any]:
        """What the function makes of a weight: dequantized values, scale, zero point. `learned`: `v` and factors."""
        scheme = self.scheme
        return self.function(
            weight, bits=scheme.bits, group_size=scheme.group_size, scale_dtype=start.scale_dtype,
            imatrix=start.importance, data_type=scheme.data_type, **learned,
        )  # fmt: skip

    @torch.no_grad()
    def encode(
        self, weight: Tensor, start: StartOptions, delta: Tensor | None = None, **learned: Tensor
    ) -> DenseWeight:
        """`delta`: added to the weight before it is rounded; `learned`: other arguments of the function."""
        qdq, _, _ = self.call(weight.float(), start, **(learned if delta is None else {"v": delta, **learned}))
        return DenseWeight(qdq.to(weight.dtype), self.scheme.data_type)

    def tuned(self, in_features: int) -> None:
        return None


class IntBlocksCodec(FunctionCodec):
    """Integers in blocks of rows and columns, which the function can do, and no run takes."""

    def problem(self) -> str:
        return (
            f"group_size={self.scheme.group_size}: blocks of rows and columns are for data type fp (scheme "
            "FP8_BLOCK); give integers one number"
        )


class Unquantized(FunctionCodec):
    """A layer in full precision."""

    family = "none"

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def encode(self, weight: Tensor, start: Any, delta: Tensor | None = None, **_: Any) -> DenseWeight:
        return DenseWeight(weight, self.scheme.data_type)


@register_codec("int")
def int_codec(scheme: Scheme) -> Codec:
    """The codec of integers in groups along the input, or in blocks."""
    return IntBlocksCodec(scheme) if isinstance(scheme.group_size, tuple) else IntCodec(scheme)


@register_codec("int_asym_dq", "int_sym_dq", "int_asym_float_zp")
def ggml_codec(scheme: Scheme) -> Codec:
    """The codec of the ggml type that a scheme describes exactly, else of its function."""
    function = FunctionCodec(scheme)
    return function if function.ggml_type is None else GgmlCodec(scheme, function.ggml_type)
