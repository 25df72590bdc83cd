"""NVFP4: e2m1 elements in groups of 16 under e4m3 scales, and those under one float32 scale of the whole tensor.

With `g = 448 * 6 / largest of the tensor`, a group's scale is the e4m3 nearest to `g * (largest of the group / 6)`, and
a value is `element * (scale / g)`. The global scale is given (`global_scale`: for inputs fixed by calibration, for
weights shared by layers that runtimes join) or computed from the tensor. Ties of elements and of scales go to the even
code.

A group so small that its scale rounds to zero: weights get the smallest scale there is, since files hold it and every
reader multiplies with it. Inputs become zeros, as in the kernels and in compressed-tensors that quantize them.
"""

from __future__ import annotations

from auto_round.data_type.elements import ELEMENTS
from auto_round.data_type.float_family import FloatFamily, float_function, register_float
from auto_round.data_type.float_scales import BlockScale
from auto_round.data_type.register import register_dtype
from auto_round.data_type.utils import ACTIVATION_PREFIX

_NAMES = ["nv_fp", "nvfp", "nv_fp4", "nvfp4", "nv_fp_with_static_gs", "nv_fp4_with_static_gs"]

quant_tensor_nvfp = register_float(_NAMES, {4: FloatFamily(BlockScale(ELEMENTS["e2m1"]))}, usual_group_size=16)
quant_activation_nvfp = register_dtype([ACTIVATION_PREFIX + name for name in _NAMES])(
    float_function("nv_fp", {4: FloatFamily(BlockScale(ELEMENTS["e2m1"], of_inputs=True))}, usual_group_size=16)
)
