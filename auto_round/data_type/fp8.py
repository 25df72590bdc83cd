"""FP8: e4m3 or e5m2 under one scale a tensor, row, group or block (OCP 8-bit Floating Point v1.0).

The scale is `largest / 448` (57344 for e5m2). For weights it is rounded to bfloat16 before any code is chosen, so that
files with bfloat16 and with float32 scales hold the same numbers; what the rounding leaves above the largest element is
cut, never rounded to the next power. Scales of inputs that are computed on the way stay float32; a fixed one is a value
of the model's dtype. Ties go to the even code.
"""

from __future__ import annotations

from typing import Any

import torch

from auto_round.data_type.elements import ELEMENTS
from auto_round.data_type.float_family import FloatFamily, pick, quantize_float, register_float
from auto_round.data_type.float_scales import PlainScale
from auto_round.data_type.register import register_dtype
from auto_round.schemes import GroupSize

_E4M3_NAMES = ["fp", "fp8", "fp8_sym", "fp8_e4m3", "fp8_e4m3fn", "fp8_dynamic", "fp8_block"]

quant_tensor_fp8 = register_float(_E4M3_NAMES, {8: FloatFamily(PlainScale(ELEMENTS["e4m3"]))}, -1)
quant_tensor_fp8_e5m2 = register_float(["fp8_e5m2"], {8: FloatFamily(PlainScale(ELEMENTS["e5m2"]))}, -1)

_INPUTS = {name: {8: FloatFamily(PlainScale(ELEMENTS[name], stored=False))} for name in ("e4m3", "e5m2")}


def _quantize_inputs(
    element: str, tensor: torch.Tensor, bits: int, group_size: GroupSize, scale: torch.Tensor | None,
    tensor_min: torch.Tensor | None, tensor_max: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    family = pick(_INPUTS[element], f"fp8_{element}", bits)
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
    return _quantize_inputs("e4m3", tensor, bits, group_size, scale, tensor_min, tensor_max)


@register_dtype("act_fp8_e5m2")
def quant_activation_fp8_e5m2(
    tensor: torch.Tensor, bits: int = 8, group_size: GroupSize = -1, scale: torch.Tensor | None = None,
    tensor_min: torch.Tensor | None = None, tensor_max: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    """Quantize and dequantize inputs to e5m2; as `quant_activation_fp8`."""
    return _quantize_inputs("e5m2", tensor, bits, group_size, scale, tensor_min, tensor_max)
