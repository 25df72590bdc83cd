"""Block-scaled minifloats (MXFP, NVFP4, FP8): scale rules, exact codes, differentiable fake quantization, types.

A weight w in a block of stored scale s becomes `f * nearest(w / f)` with f = s, or s / global_scale for NVFP4, in
float32. A scale rule turns the largest magnitude of a block into a stored scale; for NaN or Inf that is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from auto_round.codecs.int import quant_tensor_sym
from auto_round.codecs.minifloat import (
    MINIFLOATS,
    MinifloatType,
    as_blocks,
    block_absmax,
    block_chunks,
    block_sum,
    from_blocks,
    tensor_absmax,
)
from auto_round.codecs.quantized_layer import FloatCodes
from auto_round.codecs.registry import ACTIVATION_PREFIX, QuantFunc, normalized_importance, register_dtype
from auto_round.errors import UnsupportedError
from auto_round.schemes import GroupSize

GLOBAL_TOP = 448.0 * 6.0  # largest block scale times largest element
_MANTISSA = 0x7FFFFF
_ROOT_OF_TWO = 0x3504F3  # mantissa bits of sqrt(2)
_SMALLEST_BLOCK = 2.0**-9  # smallest positive e4m3
_BLOCK_OF_ZEROS = 2.0**-3  # with it, a block whose scale rounds to zero is below half the smallest element
_SMALLEST_PLAIN = 2.0**-100  # scale of a block of zeros; 448 / scale and 448 * scale are far from float32's limits
_CHUNK = 1 << 18  # values encoded at once: a few float32 buffers stay in the cache
_GPU_CHUNK = 1 << 26
_SEARCH_CHUNK = 1 << 16
_GPU_SEARCH_CHUNK = 1 << 24


def _powers(exponents: Tensor) -> Tensor:
    """2**e for int32 e clamped to -127 .. 127, exactly."""
    # 2**-127 is subnormal in float32: its bits are the only exception to `(e + 127) << 23`.
    return ((exponents.clamp(-127, 127) + 127) << 23).clamp_(min=1 << 22).view(torch.float32)


@dataclass(frozen=True)
class PowerOfTwo:
    """Scales 2**-127 .. 2**127: `floor(log2(largest)) - emax` (OCP MX v1.0, 6.3), or with `up` none saturates."""

    has_global_scale: ClassVar[bool] = False  # stored scales are relative to one of the whole tensor
    element: MinifloatType
    up: bool = False

    def scale(self, largest: Tensor, global_scale: Tensor | None = None) -> Tensor:
        # largest = m * 2**k and maximum = M * 2**emax with 1 <= m, M < 2: the exponent is k - emax, plus one when
        # m > M, which adding 2 - M to the mantissa carries into the exponent.
        top = int(torch.tensor(self.element.maximum, dtype=torch.float32).view(torch.int32)) & _MANTISSA
        bits = largest.contiguous().view(torch.int32) + (_MANTISSA - top if self.up else 0)
        return torch.where(largest.isfinite(), _powers((bits >> 23).sub_(127 + self.element.exponent)), torch.nan)

    def store(self, scale: Tensor) -> Tensor:
        """Nearest by ratio."""
        bits = scale.contiguous().view(torch.int32)
        powers = _powers(((bits + (_MANTISSA + 1 - _ROOT_OF_TWO)) >> 23).sub_(127))
        powers = torch.where(scale < 2.0**-126.5, 2.0**-127, powers)  # bits of subnormals hold no exponent
        return torch.where(scale.isfinite(), powers, torch.nan)

    def candidates(self, scale: Tensor) -> Iterator[Tensor]:
        yield (scale * 0.5).clamp(min=2.0**-127)
        yield (scale * 2).clamp(max=2.0**127)


@dataclass(frozen=True)
class BlockScale:
    """Positive e4m3 scales under a float32 one of the tensor (NVFP4); groups `of_inputs` that are too small become
    zeros."""

    has_global_scale: ClassVar[bool] = True
    element: MinifloatType
    of_inputs: bool = False

    def scale(self, largest: Tensor, global_scale: Tensor | None = None) -> Tensor:
        assert global_scale is not None
        share = torch.where(largest.isfinite(), largest, torch.nan) * (1 / self.element.maximum) * global_scale
        if self.of_inputs:
            scale = MINIFLOATS["e4m3"].nearest(share)
            return torch.where(scale == 0, _BLOCK_OF_ZEROS, scale)
        return self.store(share)

    def store(self, scale: Tensor) -> Tensor:
        return MINIFLOATS["e4m3"].nearest(scale).clamp_(min=_SMALLEST_BLOCK)

    def candidates(self, scale: Tensor) -> Iterator[Tensor]:
        e4m3 = MINIFLOATS["e4m3"]
        codes = e4m3.encode(scale).int()  # codes of positive values sort like the values
        for offset in (-1, 1, -2, 2, -3, 3, -4, 4, -5, -6):
            yield e4m3.decode((codes + offset).clamp_(1, 126).to(torch.uint8))


@dataclass(frozen=True)
class PlainScale:
    """`largest / maximum`, rounded to bfloat16 if `stored`, else in float32 (dynamic scales of inputs)."""

    has_global_scale: ClassVar[bool] = False
    element: MinifloatType
    stored: bool = True

    def scale(self, largest: Tensor, global_scale: Tensor | None = None) -> Tensor:
        return self.store(torch.where(largest.isfinite(), largest, torch.nan) / self.element.maximum)

    def store(self, scale: Tensor) -> Tensor:
        scale = scale.clamp(min=_SMALLEST_PLAIN)
        return scale.bfloat16().float() if self.stored else scale

    def candidates(self, scale: Tensor) -> Iterator[Tensor]:
        for factor in (0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5):
            yield self.store(scale * factor)


def global_scale_of(largest: Tensor) -> Tensor:
    """float32 scalar 448 * 6 / largest, which gives the largest block the largest scale (NVFP4); 1 for zeros."""
    largest = largest.detach().float().reshape(())
    exact = (torch.full_like(largest, GLOBAL_TOP) / largest).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(largest > 0, exact, torch.where(largest == 0, 1.0, torch.nan))


@dataclass(frozen=True)
class BlockFloatSpec:
    """One small float type: the rule that makes stored scales of the largest magnitudes of blocks (`scale`), rounds
    scales to what can be stored, and gives their neighbours (`candidates`), in float32 of any shape."""

    rule: PowerOfTwo | BlockScale | PlainScale
    family: str = "float"  # what formats that know the type call it: `mx_fp`, `mx_int`, `nv_fp`, `fp`

    @property
    def element(self) -> MinifloatType:
        return self.rule.element

    @property
    def has_global_scale(self) -> bool:
        return self.rule.has_global_scale

    def global_scale(self, tensor: Tensor, given: Tensor | None) -> Tensor | None:
        """`given`, or computed from the tensor; None for types without a global scale."""
        if not self.has_global_scale:
            return None
        if given is not None:
            return given.detach().float().reshape(()).to(tensor.device)
        return global_scale_of(tensor_absmax(tensor))


def effective_scale(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """The factor from element values to weights."""
    return scale if global_scale is None else scale / global_scale


def add_rounding_delta(ratio: Tensor, v: Tensor, element: MinifloatType) -> Tensor:
    """`ratio + v * step`, with the element's step at `ratio`."""
    return element.step(ratio).mul_(v).add_(ratio)


@torch.no_grad()
def encode(
    tensor: Tensor, spec: BlockFloatSpec, group_size: GroupSize, *, scale: Tensor | None = None,
    v: Tensor | None = None, global_scale: Tensor | None = None,
) -> FloatCodes:  # fmt: skip
    """The exact codes of a weight [out, in], computed in float32, a few rows at a time, on stored scales in the
    returned shape, or by default on those of the rule. `v`: rounding deltas [R, M, C, N] in units of the element's
    step."""
    out, columns = int(tensor.shape[0]), int(tensor.shape[1])
    blocks = as_blocks(tensor, group_size)
    r, m, c, n = blocks.shape
    given = spec.global_scale(tensor, global_scale)
    stored = torch.empty(r, 1, c, 1, device=tensor.device) if scale is None else scale.float().view(r, 1, c, 1)
    codes = torch.empty(r, m, c, n, dtype=torch.uint8, device=tensor.device)
    whole = r == c == 1 and m > 1  # one scale for all chunks of rows
    if scale is None and whole:
        stored.copy_(spec.rule.scale(tensor_absmax(blocks).view(1, 1, 1, 1), given))
    for rows, inner in block_chunks(blocks, _CHUNK if tensor.device.type == "cpu" else _GPU_CHUNK):
        part = blocks[rows, inner].float()
        if scale is None and not whole:
            stored[rows] = spec.rule.scale(block_absmax(part), given)
        ratio = part / effective_scale(stored[rows], given)
        if v is not None:
            ratio = add_rounding_delta(ratio, v[rows, inner], spec.element)
        codes[rows, inner] = spec.element.encode(ratio)
    found = from_blocks(codes, (out, columns)).contiguous()
    return FloatCodes(found, stored.view(r, c), spec.element.name, group_size, given)


@torch.no_grad()
def search_scales(
    weight: Tensor, spec: BlockFloatSpec, group_size: GroupSize, importance: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scales float32 [R, C] of a weight, of the rule's and its neighbours those with the least weighted error."""
    blocks = as_blocks(weight, group_size)
    _, _, c, n = blocks.shape
    given = torch.ones(weight.shape[1]) if importance is None else importance
    h = torch.nn.functional.pad(normalized_importance(given.to(weight.device)), (0, c * n - given.shape[0])).view(
        1, 1, c, n
    )
    chunks = block_chunks(blocks, _SEARCH_CHUNK if weight.device.type == "cpu" else _GPU_SEARCH_CHUNK)
    found: list[Tensor] = []

    def error(parts: list[Tensor], scale: Tensor) -> Tensor:
        """[R, 1, C, 1]: the weighted squared error of blocks given in chunks of rows."""
        factor, total = effective_scale(scale, global_scale), torch.zeros_like(scale)
        for part in parts:
            difference = spec.element.nearest(part / factor).mul_(factor).sub_(part)
            total += block_sum(difference.mul_(difference).mul_(h))
        return total

    for rows, group in groupby(chunks, key=lambda chunk: (chunk[0].start, chunk[0].stop)):
        parts = [blocks[slice(*rows), part[1]].float() for part in group]
        best = spec.rule.scale(torch.stack([block_absmax(part) for part in parts]).amax(0), global_scale)
        least = error(parts, best)
        for scale in spec.rule.candidates(best.clone()):
            trial = error(parts, scale)
            better = trial < least
            best, least = torch.where(better, scale, best), torch.where(better, trial, least)
        found.append(best)
    scales = torch.cat(found)
    return scales.view(scales.shape[0], scales.shape[2])


class _StraightThrough(torch.autograd.Function):
    """`f * nearest(x / f)` with the gradients of LSQ (arXiv 1902.08153, equation 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, element: MinifloatType) -> Tensor:
        ratio = x / factor
        values = element.nearest(ratio)
        ctx.element = element
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(ratio, values, factor)
            return values * factor
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(ratio.abs_() < element.saturation)
        return values.mul_(factor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[1]:
            return grad * ctx.saved_tensors[0], None, None
        ratio, values, factor = ctx.saved_tensors
        inside = ratio.abs() < ctx.element.saturation
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        return grad_x, (values - ratio * inside).mul_(grad).sum_to_size(factor.shape), None


def quantize_float(
    tensor: Tensor, spec: BlockFloatSpec, group_size: GroupSize, v: Tensor | float = 0.0,
    min_scale: Tensor | float = 1.0, max_scale: Tensor | float = 1.0, global_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Quantize and dequantize a tensor [..., in], as `register_dtype` demands; returns (dequantized tensor, stored
    scale float32 [rows, groups], None). `v` is added to `tensor`, in its units and shape; `min_scale`, `max_scale`:
    factors on each group's extremes, a number or one a group; `scale`: a scalar to use, for static activations.
    Gradients pass straight through the rounding of values and scales, with the extremes taken as constants."""
    flat = tensor.reshape(-1, tensor.shape[-1]).float()
    blocks = as_blocks(flat, group_size)
    given = spec.global_scale(flat, global_scale)
    if scale is not None:
        stored = scale.detach().to(flat).reshape(1, 1, 1, 1)
        factor = effective_scale(stored, given)
    else:
        largest = _scaled_absmax(blocks.detach(), min_scale, max_scale)
        fixed = largest.detach()
        stored = spec.rule.scale(fixed, given)
        factor = effective_scale(stored, given)
        if largest.requires_grad:  # as if the scale were proportional to the extreme
            factor = factor * torch.where(fixed > 0, largest / fixed, 1.0)
    if isinstance(v, Tensor):
        v = as_blocks(v.reshape(flat.shape).float(), group_size)
    blocks = blocks + v if isinstance(v, Tensor) or v else blocks
    values = _StraightThrough.apply(blocks, factor, spec.element)
    result = from_blocks(values, (flat.shape[0], flat.shape[1])).reshape(tensor.shape).to(tensor.dtype)
    return result, stored.reshape(stored.shape[0], stored.shape[2]), None


def _scaled_absmax(blocks: Tensor, min_scale: Tensor | float, max_scale: Tensor | float) -> Tensor:
    """[R, 1, C, 1]: the larger of maximum * max_scale and -minimum * min_scale."""
    r, _, c, _ = blocks.shape
    factors = [
        f.reshape(r, 1, c, 1).float() if isinstance(f, Tensor) and f.numel() > 1 else f for f in (min_scale, max_scale)
    ]
    if not any(isinstance(f, Tensor) for f in factors) and min_scale == max_scale:
        largest = block_absmax(blocks)
        return largest if min_scale == 1 else largest * min_scale
    low, high = blocks.amin((1, 3), keepdim=True).float(), blocks.amax((1, 3), keepdim=True).float()
    return torch.maximum(high.clamp_(min=0) * factors[1], -low.clamp_(max=0) * factors[0])


BLOCK_FLOAT_SPECS: dict[str, Mapping[int, BlockFloatSpec]] = {}


def register_float(
    names: Sequence[str], specs: Mapping[int, BlockFloatSpec], usual_group_size: GroupSize = 32
) -> QuantFunc:
    """Register small float types, by their number of bits, as a data type of weights; returns its function."""
    BLOCK_FLOAT_SPECS.update(dict.fromkeys(names, specs))
    return register_dtype(names)(float_function(names[0], specs, usual_group_size))


def float_function(name: str, specs: Mapping[int, BlockFloatSpec], usual_group_size: GroupSize) -> QuantFunc:
    """The function of a small float data type, without registering it."""
    only = next(iter(specs)) if len(specs) == 1 else None

    def quant_tensor_float(
        tensor: Tensor, bits: int | None = None, group_size: GroupSize = usual_group_size, v: Tensor | float = 0.0,
        min_scale: Tensor | float = 1.0, max_scale: Tensor | float = 1.0, scale_dtype: torch.dtype | None = None,
        q_scale_thresh: float = 0.0, imatrix: Tensor | None = None, global_scale: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        spec = spec_for_bits(specs, name, bits or only)
        return quantize_float(tensor, spec, group_size, v, min_scale, max_scale, global_scale)

    quant_tensor_float.__doc__ = quantize_float.__doc__
    quant_tensor_float.__qualname__ = f"quant_tensor_float[{name}]"
    return quant_tensor_float


def spec_for_bits(specs: Mapping[int, BlockFloatSpec], name: str, bits: int | None) -> BlockFloatSpec:
    """The type of that many bits. Raises UnsupportedError when there is none."""
    if bits is None or bits not in specs:
        raise UnsupportedError(
            f"data type {name!r} with {bits} bits is not available in this version; available bits: "
            f"{', '.join(map(str, specs))}"
        )
    return specs[bits]


# The built-in types (docs/schemes.md). The scale of an MX group of zeros is 2**-127.
def _mx_spellings(*names: str, suffix: str) -> list[str]:
    return [spelled + suffix for name in names for spelled in (name, name.replace("mx_", "mx"))]


for _up, _suffix in ((False, ""), (True, "_rceil")):
    _four, _eight, _wide = (
        BlockFloatSpec(PowerOfTwo(MINIFLOATS[name], _up), "mx_fp") for name in ("e2m1", "e4m3", "e5m2")
    )
    register_float(_mx_spellings("mx_fp", suffix=_suffix), {4: _four, 8: _eight})
    register_float(_mx_spellings("mx_fp4", "mx_fp4e2m1", suffix=_suffix), {4: _four})
    register_float(_mx_spellings("mx_fp8", "mx_fp8e4m3", suffix=_suffix), {8: _eight})
    register_float(_mx_spellings("mx_fp8e5m2", suffix=_suffix), {8: _wide})
register_float(["mx_int", "mxint", "mx_int4", "mxint4"], {4: BlockFloatSpec(PowerOfTwo(MINIFLOATS["int4"]), "mx_int")})

_NVFP_NAMES = ["nv_fp", "nvfp", "nv_fp4", "nvfp4", "nv_fp_with_static_gs", "nv_fp4_with_static_gs"]
register_float(_NVFP_NAMES, {4: BlockFloatSpec(BlockScale(MINIFLOATS["e2m1"]), "nv_fp")}, usual_group_size=16)
register_dtype([ACTIVATION_PREFIX + name for name in _NVFP_NAMES])(
    float_function("nv_fp", {4: BlockFloatSpec(BlockScale(MINIFLOATS["e2m1"], of_inputs=True))}, usual_group_size=16)
)

_E4M3_NAMES = ["fp", "fp8", "fp8_sym", "fp8_e4m3", "fp8_e4m3fn", "fp8_dynamic", "fp8_block"]
_E4M3_SPEC = BlockFloatSpec(PlainScale(MINIFLOATS["e4m3"]), "fp")
register_float(_E4M3_NAMES, {8: _E4M3_SPEC}, -1)
register_float(["fp8_e5m2"], {8: BlockFloatSpec(PlainScale(MINIFLOATS["e5m2"]), "fp")}, -1)


def _fp8_input_function(element: str) -> QuantFunc:
    spec = BlockFloatSpec(PlainScale(MINIFLOATS[element], stored=False))

    def quant_activation_fp8(
        tensor: Tensor, bits: int = 8, group_size: GroupSize = -1, scale: Tensor | None = None,
        tensor_min: Tensor | None = None, tensor_max: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        """Quantize and dequantize inputs [..., in] to FP8, on `scale`, or on that of the extremes `tensor_min` and
        `tensor_max` (scalars), or on those of each token (`group_size` -1), group of a token or tensor (0)."""
        checked = spec_for_bits({8: spec}, f"fp8_{element}", bits)
        if scale is None and tensor_max is not None:
            high = torch.as_tensor(tensor_max, dtype=torch.float32)
            low = high if tensor_min is None else -torch.as_tensor(tensor_min, dtype=torch.float32)
            scale = checked.rule.scale(torch.maximum(high, low))
        return quantize_float(tensor, checked, group_size if scale is None else 0, scale=scale)

    quant_activation_fp8.__qualname__ = f"quant_activation_fp8[{element}]"
    return quant_activation_fp8


register_dtype([ACTIVATION_PREFIX + name for name in _E4M3_NAMES])(_fp8_input_function("e4m3"))
register_dtype(ACTIVATION_PREFIX + "fp8_e5m2")(_fp8_input_function("e5m2"))


@register_dtype(["fp8_to_int_sym", "w4fp8"])
def quant_tensor_w4fp8(
    tensor: Tensor, bits: int = 4, group_size: GroupSize = 128, v: Tensor | float = 0.0,
    min_scale: Tensor | float = 1.0, max_scale: Tensor | float = 1.0, scale_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
    """Round [out, in] to e4m3 with one scale `s8`, then those values to symmetric integers `q` of 2 to 8 bits in groups
    with bfloat16 scales, `w = s8 * (s * q)`; returns (values like `tensor`, `s8 * s` float32 [out, groups], zero
    point)."""
    values, scale8, _ = quantize_float(tensor.float(), _E4M3_SPEC, 0)
    factor = scale8.reshape(())
    offset = v / factor if isinstance(v, Tensor) else v / float(factor)
    qdq, scale, zero = quant_tensor_sym(
        values / factor, bits, group_size, v=offset, min_scale=min_scale, max_scale=max_scale,
        scale_dtype=torch.bfloat16, q_scale_thresh=2.0**-100,
    )  # fmt: skip
    return (qdq * factor).to(tensor.dtype), scale * factor, zero
