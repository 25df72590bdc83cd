"""Microscaling integers: 4-bit sign and magnitude in quarters, in groups of 32 under a power-of-two scale.

OCP MX v1.0 defines 8-bit integers so (5.3.4: the point after the first bit; here 0 to 1.75 in quarters), and the scale
by the floor rule of 6.3 with 0 as the exponent of the largest value. The range is symmetric: there is no -2. Ties go to
the even code.
"""

from __future__ import annotations

from auto_round.data_type.elements import ELEMENTS
from auto_round.data_type.float_family import FloatFamily, register_float
from auto_round.data_type.float_scales import PowerOfTwo

quant_tensor_mxint = register_float(
    ["mx_int", "mxint", "mx_int4", "mxint4"], {4: FloatFamily(PowerOfTwo(ELEMENTS["int4"]))}
)
