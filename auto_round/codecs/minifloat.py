"""Minifloats (FP4, FP8, MXINT4): encode and decode values, and split a matrix into blocks that share a scale.

| name | bits | codes | source |
|---|---|---|---|
| e2m1 | 4 | sign, 2 bits of exponent (bias 1), 1 of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 | OCP MX v1.0, 5.3.3 |
| int4 | 4 | sign and magnitude in quarters: 0, 0.25 ... 1.75 | the range of OCP MX v1.0, 5.3.4, for 4 bits |
| e4m3 | 8 | `torch.float8_e4m3fn`: largest 448, no Inf | OCP OFP8 v1.0, 5.1 |
| e5m2 | 8 | `torch.float8_e5m2`: largest 57344 | OCP OFP8 v1.0, 5.2 |

Values beyond the largest saturate; ties round to even; the sign of zero is kept; NaN has no code in the 4-bit types.
Steps are `2**(e - mantissa)` between 2**e and 2**(e+1), and below 2**lowest those of `e = lowest`. Adding and
subtracting `2**(e + 23 - mantissa)` in float32 rounds to such a step.

Blocks are a view [R, M, C, N] of a matrix: R*M rows by C*N columns, each block M rows of N columns. Groups along the
input have M = 1; one scale per row has M = C = 1; one scale per tensor has R = C = 1. A scale is [R, 1, C, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import ConfigError
from auto_round.schemes import GroupSize

_CHUNK = 1 << 17  # codes processed at once: temporaries stay in the cache
_EXPONENT = 0x7F800000  # bits of a float32 that hold its exponent


def block_shape(shape: tuple[int, int], group_size: GroupSize) -> tuple[int, int, int, int]:
    """(R, M, C, N) of a matrix [rows, columns]; the last blocks may be partial."""
    rows, columns = shape
    if isinstance(group_size, tuple):
        m, n = group_size
        return -(-rows // m), m, -(-columns // n), n
    if group_size == 0:
        return 1, rows, 1, columns
    if group_size < 0 or columns < group_size:
        return rows, 1, 1, columns
    return rows, 1, -(-columns // group_size), group_size


def as_blocks(matrix: Tensor, group_size: GroupSize) -> Tensor:
    """[rows, columns] as [R, M, C, N], with partial blocks zero-padded; a view where there are none."""
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    r, m, c, n = block_shape(shape, group_size)
    if shape != (r * m, c * n):
        matrix = torch.nn.functional.pad(matrix, (0, c * n - shape[1], 0, r * m - shape[0]))
    return matrix.reshape(r, m, c, n)


def from_blocks(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `as_blocks`: [R, M, C, N] as [rows, columns]."""
    r, m, c, n = blocks.shape
    return blocks.reshape(r * m, c * n)[: shape[0], : shape[1]]


def block_sum(blocks: Tensor) -> Tensor:
    """[R, 1, C, 1]: the sum over each block."""
    sums = blocks.sum(3, keepdim=True)
    return sums if blocks.shape[1] == 1 else sums.sum(1, keepdim=True)


def tensor_absmax(tensor: Tensor) -> Tensor:
    """float32 scalar; NaN when the tensor holds one."""
    low, high = torch.aminmax(tensor.detach())
    return torch.maximum(-low, high).float()


def block_absmax(blocks: Tensor) -> Tensor:
    """[R, 1, C, 1], float32: the largest magnitude of each block; NaN where it holds one."""
    # Magnitudes sort like their bits, NaN last, and integers are compared faster.
    bits = blocks.float().contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
    return bits.amax(3, keepdim=True).amax(1, keepdim=True).view(torch.float32)


def block_chunks(blocks: Tensor, elements: int) -> list[tuple[slice, slice]]:
    """Slices of the first two dimensions, of about `elements` values each. Only a single block is split by rows."""
    r, m, c, n = blocks.shape
    if not r == c == 1 or m == 1:
        step = max(1, elements // max(1, m * c * n))
        return [(slice(i, min(i + step, r)), slice(0, m)) for i in range(0, r, step)]
    step = max(1, elements // max(1, c * n))
    return [(slice(0, 1), slice(i, min(i + step, m))) for i in range(0, m, step)]


@dataclass(frozen=True)
class MinifloatType:
    """One element type of 4 to 8 bits."""

    name: str
    bits: int
    maximum: float  # the largest finite value
    exponent: int  # floor(log2(maximum)), emax in OCP MX
    mantissa: int  # bits of the mantissa
    lowest: int  # exponent of the smallest normal value; below it steps are equal
    dtype: torch.dtype | None = None  # PyTorch's dtype for it

    @property
    def saturation(self) -> float:
        """Values from here on saturate: half a step above the largest."""
        return self.maximum + 2.0 ** (self.exponent - self.mantissa - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of uint8 codes, in their shape."""
        # Moved to the top of a float16's exponent and mantissa, a code without its sign is the value times a power of
        # two, subnormals too.
        sign = 1 << (self.bits - 1)
        wide = codes.to(torch.int16)
        size = (wide & (sign - 1)).bitwise_left_shift_(10 - self.mantissa)
        bits = size.bitwise_or_(wide.bitwise_and_(sign).bitwise_left_shift_(16 - self.bits))
        values = bits.view(torch.float16).float().mul_(2.0 ** (14 + self.lowest))
        if self.name == "e4m3":  # the code of 480 is NaN
            nan = (codes & 0x7F) == 0x7F
            if nan.device.type != "cpu" or bool(nan.any()):
                values = values.masked_fill_(nan, torch.nan)
        return values

    def encode(self, values: Tensor) -> Tensor:
        """The nearest code of each float32 value, uint8, in their shape."""
        if self.dtype is not None:
            return values.clamp(-self.maximum, self.maximum).to(self.dtype).view(torch.uint8)
        size = values.abs().clamp_(max=self.maximum)
        power = self._power(size)
        lift = 23 - self.mantissa
        # The low bits of the sum count the steps from zero: the code of a value below twice the smallest normal. Each
        # doubling adds 2**mantissa codes to that.
        steps = size.add_(power, alpha=2.0**lift).view(torch.int32)
        above = power.view(torch.int32)
        steps.sub_(above).add_(above >> lift).sub_((lift << 23) + ((self.lowest + 127) << self.mantissa))
        sign = (values.view(torch.int32) >> (32 - self.bits)).bitwise_and_(1 << (self.bits - 1))
        return steps.bitwise_or_(sign).to(torch.uint8)

    def nearest(self, values: Tensor) -> Tensor:
        """float32: the value of the nearest code of each; NaN stays NaN. The same as `decode(encode(values))`."""
        size = values.abs().clamp_(max=self.maximum)
        lift = self._power(size).mul_(2.0 ** (23 - self.mantissa))
        return size.add_(lift).sub_(lift).copysign_(values)

    def step(self, values: Tensor) -> Tensor:
        """float32: the distance of neighbouring representable values at each of `values`."""
        return self._power(values.abs().clamp_(max=self.maximum)).mul_(2.0**-self.mantissa)

    def _power(self, size: Tensor) -> Tensor:
        """2**e of each magnitude, at least that of the smallest normal value; NaN gets that of Inf and stays NaN."""
        return (size.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=2.0**self.lowest)


MINIFLOATS: dict[str, MinifloatType] = {
    element.name: element
    for element in (
        MinifloatType("e2m1", 4, 6.0, 2, 1, 0), MinifloatType("int4", 4, 1.75, 0, 2, 0),
        MinifloatType("e4m3", 8, 448.0, 8, 3, -6, torch.float8_e4m3fn),
        MinifloatType("e5m2", 8, 57344.0, 15, 2, -14, torch.float8_e5m2),
    )
}  # fmt: skip


def register_minifloat(element: MinifloatType) -> MinifloatType:
    """Add an element type under its name. Returns it. Raises ConfigError when another one has the name."""
    if MINIFLOATS.setdefault(element.name, element) != element:
        raise ConfigError(f"element type {element.name!r} is already registered")
    return element


def dequantize_minifloat(
    codes: Tensor, element: MinifloatType, scale: Tensor, group_size: GroupSize, global_scale: Tensor | None = None
) -> Tensor:
    """float32 [out, in]: `decode(code) * (scale / global_scale)`; a scale for each block, [R, C], or one for all."""
    factors, shape = scale.float(), (int(codes.shape[0]), int(codes.shape[1]))
    if global_scale is not None:
        factors = factors / global_scale.float().reshape(())
    r, _, c, _ = block_shape(shape, group_size)
    blocks, factors = as_blocks(codes, group_size), factors.expand(r, c).view(r, 1, c, 1)
    if codes.device.type != "cpu":
        return from_blocks(element.decode(blocks).mul_(factors), shape)
    values = torch.empty(blocks.shape)
    for rows, inner in block_chunks(blocks, _CHUNK):
        torch.mul(element.decode(blocks[rows, inner]), factors[rows], out=values[rows, inner])
    return from_blocks(values, shape)
