"""W4FP8: 4-bit integers that stand for FP8 values, for hardware that multiplies in FP8 and stores 4 bits.

A weight is first rounded to e4m3 under one scale for the tensor, and those values then to symmetric integers in groups
with bfloat16 scales: `w = s8 * (s * q)`.
"""

from __future__ import annotations

from typing import Any

import torch

from auto_round.data_type.elements import ELEMENTS
from auto_round.data_type.float_family import FloatFamily, quantize_float
from auto_round.data_type.float_scales import PlainScale
from auto_round.data_type.int import quant_tensor_sym
from auto_round.data_type.register import register_dtype
from auto_round.schemes import GroupSize

_FP8 = FloatFamily(PlainScale(ELEMENTS["e4m3"]))


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
    values, scale8, _ = quantize_float(tensor.float(), _FP8, 0)
    factor = scale8.reshape(())
    offset = v / factor if isinstance(v, torch.Tensor) else v / float(factor)
    qdq, scale, zero = quant_tensor_sym(
        values / factor, bits, group_size, v=offset, min_scale=min_scale, max_scale=max_scale,
        scale_dtype=torch.bfloat16, q_scale_thresh=2.0**-100,
    )  # fmt: skip
    return (qdq * factor).to(tensor.dtype), scale * factor, zero
