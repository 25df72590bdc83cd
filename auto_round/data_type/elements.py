"""Elements of the small float types: which values a code stands for, and the nearest code of a value.

| name | bits | codes | source |
|---|---|---|---|
| e2m1 | 4 | sign, 2 bits of exponent (bias 1), 1 of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 | OCP MX v1.0, 5.3.3 |
| int4 | 4 | sign and magnitude in quarters: 0, 0.25 ... 1.75 | the range of OCP MX v1.0, 5.3.4, for 4 bits |
| e4m3 | 8 | `torch.float8_e4m3fn`: largest 448, no Inf | OCP OFP8 v1.0, 5.1 |
| e5m2 | 8 | `torch.float8_e5m2`: largest 57344 | OCP OFP8 v1.0, 5.2 |

A value beyond the largest becomes the largest (saturation), Inf too; a value halfway between two goes to the one whose
last bit is zero (round half to even). The sign of zero is kept. NaN stays NaN in the 8-bit elements and has no code in
the 4-bit ones.

All four are one thing: numbers whose steps are `2**(e - mantissa)` between 2**e and 2**(e+1), and below
2**lowest those of `e = lowest`. Adding and taking away `2**(e + 23 - mantissa)` in float32 rounds to such a step, since
that is where float32's own last bit lies then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.data_type.tiles import as_tiles, from_tiles, tile_rows, tile_shape

_CHUNK = 1 << 17  # codes in flight: what is made of them on the way stays in the cache
_EXPONENT = 0x7F800000  # bits of a float32 that hold its exponent


@dataclass(frozen=True)
class Element:
    """One element type.

    Attributes:
        bits: 4 or 8.
        maximum: the largest finite value.
        exponent: of the largest value, floor(log2(maximum)); what OCP MX calls emax.
        mantissa: bits of the mantissa.
        lowest: exponent of the smallest normal value; below it steps are equal.
        dtype: PyTorch's own type for it, None when there is none.
    """

    name: str
    bits: int
    maximum: float
    exponent: int
    mantissa: int
    lowest: int
    dtype: torch.dtype | None = None

    @property
    def saturation(self) -> float:
        """Values from here on are cut, not rounded: half a step above the largest."""
        return self.maximum + 2.0 ** (self.exponent - self.mantissa - 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values of uint8 codes, in their shape."""
        # Moved to the top of a float16's exponent and mantissa, a code without its sign is the value times a power of
        # two, subnormals too; and float16 becomes float32 at the speed of a copy.
        sign = 1 << (self.bits - 1)
        wide = codes.to(torch.int16)
        size = (wide & (sign - 1)).bitwise_left_shift_(10 - self.mantissa)
        bits = size.bitwise_or_(wide.bitwise_and_(sign).bitwise_left_shift_(16 - self.bits))
        values = bits.view(torch.float16).float().mul_(2.0 ** (14 + self.lowest))
        if self.name == "e4m3":  # what would be 480 is its one NaN
            nan = (codes & 0x7F) == 0x7F
            if nan.device.type != "cpu" or bool(nan.any()):
                values = values.masked_fill_(nan, torch.nan)
        return values

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest code of each float32 value, uint8, in their shape."""
        if self.dtype is not None:
            return values.clamp(-self.maximum, self.maximum).to(self.dtype).view(torch.uint8)
        size = values.abs().clamp_(max=self.maximum)
        power = self._power(size)
        lift = 23 - self.mantissa
        # The low bits of the sum count the steps from zero; less the sum's own exponent, they are the code of a value
        # that lies below twice the smallest normal. Each doubling adds 2**mantissa codes to that.
        steps = size.add_(power, alpha=2.0**lift).view(torch.int32)
        above = power.view(torch.int32)
        steps.sub_(above).add_(above >> lift).sub_((lift << 23) + ((self.lowest + 127) << self.mantissa))
        sign = (values.view(torch.int32) >> (32 - self.bits)).bitwise_and_(1 << (self.bits - 1))
        return steps.bitwise_or_(sign).to(torch.uint8)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """float32: the value of the nearest code of each; NaN stays NaN. The same as `decode(encode(values))`."""
        size = values.abs().clamp_(max=self.maximum)
        lift = self._power(size).mul_(2.0 ** (23 - self.mantissa))
        return size.add_(lift).sub_(lift).copysign_(values)

    def step(self, values: torch.Tensor) -> torch.Tensor:
        """float32: how far apart the element's values lie at each of `values`."""
        return self._power(values.abs().clamp_(max=self.maximum)).mul_(2.0**-self.mantissa)

    def _power(self, size: torch.Tensor) -> torch.Tensor:
        """2**e of each magnitude, or of the smallest normal value; NaN gets that of Inf, so that it stays NaN."""
        return (size.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=2.0**self.lowest)


ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        Element("e2m1", 4, 6.0, 2, 1, 0), Element("int4", 4, 1.75, 0, 2, 0),
        Element("e4m3", 8, 448.0, 8, 3, -6, torch.float8_e4m3fn),
        Element("e5m2", 8, 57344.0, 15, 2, -14, torch.float8_e5m2),
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
    r, _, c, _ = tile_shape(shape, group_size)
    if factors.shape != (r, c):
        return element.decode(codes).mul_(spread_scale(factors, shape, group_size))
    tiles, factors = as_tiles(codes, group_size), factors.view(r, 1, c, 1)
    if codes.device.type != "cpu":
        return from_tiles(element.decode(tiles).mul_(factors), shape)
    values = torch.empty(tiles.shape)
    for rows, inner in tile_rows(tiles, _CHUNK):
        torch.mul(element.decode(tiles[rows, inner]), factors[rows], out=values[rows, inner])
    return from_tiles(values, shape)
