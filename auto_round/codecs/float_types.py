"""The built-in float data types: MXFP4, MXFP8, MXINT4, NVFP4, FP8 and W4FP8, with their scale rules (docs/schemes.md).

The scale of an MX group of zeros is 2**-127. An NVFP4 group so small that its scale rounds to zero gets the smallest
scale for weights (readers multiply with it), and zeros for inputs (as in the kernels and in compressed-tensors).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
from auto_round.codecs.registry import ACTIVATION_PREFIX, QuantFunc, register_dtype
from auto_round.schemes import GroupSize


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
