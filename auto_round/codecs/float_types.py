"""The built-in float data types: MXFP4, MXFP8, MXINT4, NVFP4, FP8 and W4FP8, each with its scale rule.

| data type | element | group | scale |
|---|---|---|---|
| `mx_fp` 4 bits, `mx_fp4` | e2m1 | 32 | power of two, floor rule of OCP MX v1.0, 6.3 |
| `mx_fp` 8 bits, `mx_fp8`, `mx_fp8e5m2` | e4m3, e5m2 | 32 | the same |
| each with `_rceil` | the same | 32 | power of two, rounded up, so that no value is clipped |
| `mx_int`, `mx_int4` | sign and magnitude in quarters, no -2 | 32 | power of two, floor rule |
| `nv_fp`, `nv_fp4` | e2m1 | 16 | e4m3 under one float32 scale per tensor, `g = 448 * 6 / largest` |
| `fp`, `fp8`, `fp8_e5m2` | e4m3, e5m2 | any | largest / 448 (57344); bfloat16 for weights, float32 for inputs |
| `w4fp8` | 4-bit integers over e4m3 values | any | bfloat16 per group times one scale per tensor |

Ties round to the even code. The scale of an MX group of zeros is 2**-127. An NVFP4 group so small that its
scale rounds to zero gets the smallest scale for weights (readers multiply with it), and zeros for inputs (as in
the kernels and in compressed-tensors).
"""

from __future__ import annotations

from typing import Any

import torch

from auto_round.codecs.block_float import (
    BlockFloatSpec,
    BlockScale,
    PlainScale,
    PowerOfTwo,
    float_function,
    quantize_float,
    register_float,
    spec_for_bits,
)
from auto_round.codecs.int import quant_tensor_sym
from auto_round.codecs.minifloat import MINIFLOATS
from auto_round.codecs.registry import ACTIVATION_PREFIX, register_dtype
from auto_round.schemes import GroupSize


def _mx_spec(element: str, up: bool) -> BlockFloatSpec:
    return BlockFloatSpec(PowerOfTwo(MINIFLOATS[element], up))


def _mx_spellings(*names: str, suffix: str) -> list[str]:
    return [spelled + suffix for name in names for spelled in (name, name.replace("mx_", "mx"))]


for _up, _suffix in ((False, ""), (True, "_rceil")):
    _four, _eight, _wide = (_mx_spec(element, _up) for element in ("e2m1", "e4m3", "e5m2"))
    register_float(_mx_spellings("mx_fp", suffix=_suffix), {4: _four, 8: _eight})
    register_float(_mx_spellings("mx_fp4", "mx_fp4e2m1", suffix=_suffix), {4: _four})
    register_float(_mx_spellings("mx_fp8", "mx_fp8e4m3", suffix=_suffix), {8: _eight})
    register_float(_mx_spellings("mx_fp8e5m2", suffix=_suffix), {8: _wide})


# Microscaling integers: 4-bit sign and magnitude in quarters, in groups of 32 under a power-of-two scale.
#
# OCP MX v1.0 defines 8-bit integers so (5.3.4: the point after the first bit; here 0 to 1.75 in quarters), and the
# scale by the floor rule of 6.3 with 0 as the exponent of the largest value. The range is symmetric: there is no -2.
# Ties go to the even code.

quant_tensor_mxint = register_float(
    ["mx_int", "mxint", "mx_int4", "mxint4"], {4: BlockFloatSpec(PowerOfTwo(MINIFLOATS["int4"]))}
)


# NVFP4: e2m1 elements in groups of 16 under e4m3 scales, and those under one float32 scale of the whole tensor.
#
# With `g = 448 * 6 / largest of the tensor`, a group's scale is the e4m3 nearest to `g * (largest of the group / 6)`,
# and a value is `element * (scale / g)`. The global scale is given (`global_scale`: for inputs fixed by calibration,
# for weights shared by layers that runtimes join) or computed from the tensor. Ties of elements and of scales go to the
# even code.
#
# A group so small that its scale rounds to zero: weights get the smallest scale there is, since files hold it and every
# reader multiplies with it. Inputs become zeros, as in the kernels and in compressed-tensors that quantize them.

_NVFP_NAMES = ["nv_fp", "nvfp", "nv_fp4", "nvfp4", "nv_fp_with_static_gs", "nv_fp4_with_static_gs"]

quant_tensor_nvfp = register_float(
    _NVFP_NAMES, {4: BlockFloatSpec(BlockScale(MINIFLOATS["e2m1"]))}, usual_group_size=16
)
quant_activation_nvfp = register_dtype([ACTIVATION_PREFIX + name for name in _NVFP_NAMES])(
    float_function("nv_fp", {4: BlockFloatSpec(BlockScale(MINIFLOATS["e2m1"], of_inputs=True))}, usual_group_size=16)
)


# FP8: e4m3 or e5m2 under one scale a tensor, row, group or block (OCP 8-bit Floating Point v1.0).
#
# The scale is `largest / 448` (57344 for e5m2). For weights it is rounded to bfloat16 before any code is chosen, so
# that files with bfloat16 and with float32 scales hold the same numbers; what the rounding leaves above the largest
# element is cut, never rounded to the next power. Scales of inputs that are computed on the way stay float32; a fixed
# one is a value of the model's dtype. Ties go to the even code.

_E4M3_NAMES = ["fp", "fp8", "fp8_sym", "fp8_e4m3", "fp8_e4m3fn", "fp8_dynamic", "fp8_block"]

quant_tensor_fp8 = register_float(_E4M3_NAMES, {8: BlockFloatSpec(PlainScale(MINIFLOATS["e4m3"]))}, -1)
quant_tensor_fp8_e5m2 = register_float(["fp8_e5m2"], {8: BlockFloatSpec(PlainScale(MINIFLOATS["e5m2"]))}, -1)

_INPUT_SPECS = {name: {8: BlockFloatSpec(PlainScale(MINIFLOATS[name], stored=False))} for name in ("e4m3", "e5m2")}


def _quantize_fp8_inputs(
    element: str, tensor: torch.Tensor, bits: int, group_size: GroupSize, scale: torch.Tensor | None,
    tensor_min: torch.Tensor | None, tensor_max: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    family = spec_for_bits(_INPUT_SPECS[element], f"fp8_{element}", bits)
    if scale is None and tensor_max is not None:
        high = torch.as_tensor(tensor_max, dtype=torch.float32)
        low = high if tensor_min is None else -torch.as_tensor(tensor_min, dtype=torch.float32)
        scale = family.rule.scale(torch.maximum(high, low))
    return quantize_float(tensor, family, group_size if scale is None else 0, scale=scale)


@register_dtype([f"act_{name}" for name in _E4M3_NAMES])
def quant_activation_fp8(
    tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    """Quantize and dequantize inputs to e4m3.

    Args:
        tensor: [..., in].
        bits: 8.
        group_size: -1 one scale a token; >0 one for that many of its values; 0 one for the tensor.
        scale: the scale to use, for static activations.
        tensor_min, tensor_max: known extremes, scalars; used when no scale is given.

    Returns:
        (fake-quantized tensor of the same shape and dtype, scale float32, None). Gradients pass to `tensor` where it is
        inside the range.
    """
    return _quantize_fp8_inputs("e4m3", tensor, bits, group_size, scale, tensor_min, tensor_max)


@register_dtype("act_fp8_e5m2")
def quant_activation_fp8_e5m2(
    tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    """Quantize and dequantize inputs to e5m2; as `quant_activation_fp8`."""
    return _quantize_fp8_inputs("e5m2", tensor, bits, group_size, scale, tensor_min, tensor_max)


# W4FP8: 4-bit integers that stand for FP8 values, for hardware that multiplies in FP8 and stores 4 bits.
#
# A weight is first rounded to e4m3 under one scale for the tensor, and those values then to symmetric integers in
# groups with bfloat16 scales: `w = s8 * (s * q)`.

_E4M3_SPEC = BlockFloatSpec(PlainScale(MINIFLOATS["e4m3"]))


@register_dtype(["fp8_to_int_sym", "w4fp8"])
def quant_tensor_w4fp8(
    tensor: torch.Tensor, bits: int = 4, group_size: GroupSize = 128, v: torch.Tensor | float = 0.0,
    min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
    scale_dtype: torch.dtype | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:  # fmt: skip
    """Quantize and dequantize.

    Args:
        tensor: [out, in].
        bits: of the integers, 2 to 8.
        group_size: of the integers.
        v: added to `tensor` before the integers are chosen, in its units and shape.
        min_scale, max_scale: factors on each group's minimum and maximum; a number or one value a group.
        scale_dtype: not used: the groups' scales are bfloat16.

    Returns:
        (dequantized tensor of the same shape and dtype, scale float32 [out, groups] that turns codes into weights, zero
        point 2**(bits-1)).
    """
    values, scale8, _ = quantize_float(tensor.float(), _E4M3_SPEC, 0)
    factor = scale8.reshape(())
    offset = v / factor if isinstance(v, torch.Tensor) else v / float(factor)
    qdq, scale, zero = quant_tensor_sym(
        values / factor, bits, group_size, v=offset, min_scale=min_scale, max_scale=max_scale,
        scale_dtype=torch.bfloat16, q_scale_thresh=2.0**-100,
    )  # fmt: skip
    return (qdq * factor).to(tensor.dtype), scale * factor, zero
