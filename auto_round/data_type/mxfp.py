"""Microscaling floats: elements in groups of 32 under a power-of-two scale (OCP Microscaling Formats MX v1.0, 5, 6.3).

| name | element | scale |
|---|---|---|
| `mx_fp` with 4 bits, `mx_fp4` | e2m1 | floor rule of 6.3 |
| `mx_fp` with 8 bits, `mx_fp8` | e4m3 | floor rule |
| `mx_fp8e5m2` | e5m2 | floor rule |
| each with `_rceil` | the same | rounded up, so that no value of the group is cut |

Ties between two elements go to the even code. The scale of a group of zeros is 2**-127.
"""

from __future__ import annotations

from auto_round.data_type.elements import ELEMENTS
from auto_round.data_type.float_family import FloatFamily, register_float
from auto_round.data_type.float_scales import PowerOfTwo


def _family(element: str, up: bool) -> FloatFamily:
    return FloatFamily(PowerOfTwo(ELEMENTS[element], up))


def _names(*names: str, suffix: str) -> list[str]:
    return [spelled + suffix for name in names for spelled in (name, name.replace("mx_", "mx"))]


for _up, _suffix in ((False, ""), (True, "_rceil")):
    _four, _eight, _wide = (_family(element, _up) for element in ("e2m1", "e4m3", "e5m2"))
    register_float(_names("mx_fp", suffix=_suffix), {4: _four, 8: _eight})
    register_float(_names("mx_fp4", "mx_fp4e2m1", suffix=_suffix), {4: _four})
    register_float(_names("mx_fp8", "mx_fp8e4m3", suffix=_suffix), {8: _eight})
    register_float(_names("mx_fp8e5m2", suffix=_suffix), {8: _wide})
