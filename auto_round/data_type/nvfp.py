"""NVFP4: e2m1 elements in groups of 16 under e4m3 scales, and those under one float32 scale of the whole tensor.

With `g = 448 * 6 / largest of the tensor`, a group's scale is the e4m3 nearest to `g * largest of the group / 6` and a
value is `element * (scale / g)`. The global scale is given (`global_scale`: for inputs fixed by calibration, for
weights shared by layers that runtimes join) or computed from the tensor. Ties of elements and of scales go to the even
code.
"""

from __future__ import annotations

from auto_round.data_type.elements import ELEMENTS
from auto_round.data_type.float_family import FloatFamily, register_float
from auto_round.data_type.float_scales import BlockScale

quant_tensor_nvfp = register_float(
    ["nv_fp", "nvfp", "nv_fp4", "nvfp4", "nv_fp_with_static_gs", "nv_fp4_with_static_gs"],
    {4: FloatFamily(BlockScale(ELEMENTS["e2m1"]))},
    usual_group_size=16,
)
