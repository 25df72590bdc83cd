"""Elements of the small float types: which values a code stands for, and the nearest code of a value.

| name | bits | codes | source |
|---|---|---|---|
| e2m1 | 4 | sign, 2 bits of exponent (bias 1), 1 of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 | OCP MX v1.0, 5.3.3 |
| int4 | 4 | sign and magnitude in quarters: 0, 0.25 ... 1.75 | the range of OCP MX v1.0, 5.3.4, for 4 bits |
| e4m3 | 8 | `torch.float8_e4m3fn`: largest 448, no Inf | OCP OFP8 v1.0, 5.1 |
| e5m2 | 8 | `torch.float8_e5m2`: largest 57344 | OCP OFP8 v1.0, 5.2 |

A value beyond the largest becomes the largest (saturation); a value halfway between two goes to the one whose last bit
is zero (round half to even). NaN has no code in the 4-bit elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Element:
    """One element type.

    Attributes:
        bits: 4 or 8.
        maximum: the largest finite value.
        exponent: of the largest value, floor(log2(maximum)); what OCP MX calls emax.
        dtype: PyTorch's own type for it, None when there is none.
    """

    name: str
    bits: int
    maximum: float
    exponent: int
    dtype: torch.dtype | None = None

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values of uint8 codes, in their shape."""
        if self.dtype is not None:
            return codes.view(self.dtype).float()
        return _TABLES[self.name].to(codes.device)[codes.int()]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest code of each float32 value, uint8, in their shape."""
        if self.dtype is not None:
            return values.clamp(-self.maximum, self.maximum).to(self.dtype).view(torch.uint8)
        size = values.abs()
        if self.name == "int4":
            index = (size * 4).clamp_(max=7).round_()
        else:
            # a step of 0.5 below 2, of 1 below 4, of 2 above; the index of a value is its code without the sign
            low = (size * 2).clamp_(max=4).round_()
            middle = size.clamp(2, 4).round_().sub_(2)
            high = (size * 0.5).clamp_(2, 3).round_().sub_(2)
            index = low.add_(middle).add_(high)
        return index.to(torch.uint8) | torch.signbit(values).to(torch.uint8).mul_(8)


_HALF = {"e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "int4": tuple(i / 4 for i in range(8))}
_TABLES = {name: torch.tensor([*half, *(-v for v in half)]) for name, half in _HALF.items()}

ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        Element("e2m1", 4, 6.0, 2), Element("int4", 4, 1.75, 0), Element("e4m3", 8, 448.0, 8, torch.float8_e4m3fn),
        Element("e5m2", 8, 57344.0, 15, torch.float8_e5m2),
    )
}  # fmt: skip


def spread_scale(scale: torch.Tensor, shape: tuple[int, int], group_size: int | tuple[int, int]) -> torch.Tensor:
    """A scale for every element of a weight, as a view where one will do.

    Args:
        scale: [out, groups]; [1, 1] per tensor; [out/M, in/N] for blocks of M rows and N columns.
        shape: (out, in) of the weight.
        group_size: as in a scheme.
    """
    out, columns = shape
    if isinstance(group_size, tuple):
        rows = scale.repeat_interleave(group_size[0], 0)[:out]
        return rows.repeat_interleave(group_size[1], 1)[:, :columns]
    if group_size <= 0 or scale.shape[1] == 1:
        return scale.expand(out, columns) if scale.shape[1] == 1 else scale
    return scale.repeat_interleave(group_size, 1)[:, :columns]


def dequantize_elements(
    codes: torch.Tensor, element: Element, scale: torch.Tensor, group_size: int | tuple[int, int],
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """float32 [out, in]: `decode(code) * scale`, or `decode(code) * (scale / global_scale)`, all in float32.

    Args:
        codes: uint8 [out, in].
        scale: float32, as `spread_scale` takes it.
        global_scale: float32 scalar by which the stored scales are too large (NVFP4).
    """
    factors = scale.float()
    if global_scale is not None:
        factors = factors / global_scale.float().reshape(())
    shape = (int(codes.shape[0]), int(codes.shape[1]))
    return element.decode(codes).mul_(spread_scale(factors, shape, group_size))
