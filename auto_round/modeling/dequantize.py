"""Weights of checkpoints that are quantized already, as dense tensors. Pure functions.

A value is `element * scale`, computed in float32 and rounded once to the dtype that is asked for. Elements are those of
`data_type.elements`; a scale belongs to the whole tensor, to an output channel, or to a block of rows and columns.
"""

from __future__ import annotations

import torch

from auto_round.data_type.elements import ELEMENTS

_AT_ONCE = 1 << 20  # elements in float32 at a time
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_E8M0 = getattr(torch, "float8_e8m0fnu", None)  # newer than the oldest torch supported


def is_float8(dtype: torch.dtype) -> bool:
    """Whether weights may be stored in this 8-bit float type (E8M0, which holds scales only, is none)."""
    return dtype in _FLOAT8


def e8m0_values(codes: torch.Tensor) -> torch.Tensor:
    """float32 powers of two 2**(code - 127) of uint8 codes; 255 is NaN (OCP MX v1.0, 5.4.1)."""
    values = (codes.to(torch.int32) << 23).view(torch.float32)  # the code is float32's own exponent field
    values = values.masked_fill(codes == 0, 2.0**-127)
    return values.masked_fill(codes == 255, torch.nan)


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """A stored scale as float32: bytes and float8_e8m0fnu are powers of two, everything else is a number."""
    if stored.dtype == torch.uint8 or stored.dtype == _E8M0:
        return e8m0_values(stored.view(torch.uint8))
    return stored.float()


def scale_block(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Rows and columns of a weight [..., out, in] that share one scale, None when the shapes do not fit.

    Args:
        weight: shape, at least two-dimensional; dimensions before the last two are experts.
        scale: shape. One number, or one an expert; [out] or [out, 1]; [out/M, in/N], blocks at the edges cut short.
        block: (M, N) as the checkpoint's config says. Without it, or where it does not fit, blocks of equal size.
    """
    *experts, rows, columns = weight
    count = 1
    for size in scale:
        count *= size
    if count == 1 or list(scale) == experts:
        return rows, columns
    if tuple(scale) == (rows,) and not experts:
        return 1, columns
    if len(scale) != len(weight) or list(scale[:-2]) != experts:
        return None
    across, along = scale[-2:]
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (across, along):
        return block
    if across and along and rows % across == 0 and columns % along == 0:
        return rows // across, columns // along
    return None


def apply_scale(
    codes: torch.Tensor, element: str, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor
) -> torch.Tensor:
    """`element * scale` written to `out`, which is returned.

    Args:
        codes: uint8 [..., out, in], or the element's own float8 dtype.
        element: name in `data_type.elements.ELEMENTS`.
        scale: as stored, of a shape that `scale_block` takes.
        block: what `scale_block` found.
        out: contiguous, in the shape of `codes`, of the dtype that is wanted.
    """
    rows, columns = codes.shape[-2:]
    flat, dense = codes.view(torch.uint8).reshape(-1, rows, columns), out.view(-1, rows, columns)
    factors = scale_values(scale).reshape(-1, -(-rows // block[0]), -(-columns // block[1]))
    factors = factors.expand(flat.shape[0], *factors.shape[1:])
    step = max(1, _AT_ONCE // max(1, columns))
    even = columns % block[1] == 0
    for expert in range(flat.shape[0]):
        for start in range(0, rows, step):
            part = flat[expert, start : start + step]
            own = factors[expert, torch.arange(start, start + part.shape[0]) // block[0]]
            values = ELEMENTS[element].decode(part)
            if even:
                values.view(part.shape[0], -1, block[1]).mul_(own.unsqueeze(-1))
            else:
                values.mul_(own.repeat_interleave(block[1], 1)[:, :columns])
            dense[expert, start : start + step] = values
    return out


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2n] codes of 4 bits from bytes [..., n]; the low half of a byte comes first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantize_mxfp4(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Values of bytes [..., out, in/2], two E2M1 codes each, and E8M0 scales [..., out, in/32] (OCP MX v1.0, 6.1 and
    5.3.3), written to the contiguous `out` [..., out, in], which is returned."""
    half = packed.shape[-1]
    flat, scales, dense = packed.reshape(-1, half), scale.reshape(-1, scale.shape[-1]), out.view(-1, 2 * half)
    step = max(1, _AT_ONCE // max(1, 2 * half))
    block = (1, 2 * half // scales.shape[-1])
    for start in range(0, flat.shape[0], step):
        codes = unpack_nibbles(flat[start : start + step])
        apply_scale(codes, "e2m1", scales[start : start + step], block, dense[start : start + step])
    return out
