"""Codes and scales of the small float types as the bytes of a file. Nothing is rounded: a value that its dtype cannot
hold is an error.

    two 4-bit codes a byte   the even column in the low nibble, the odd one in the high nibble
    E8M0 scales              one byte a scale, 2**(byte - 127); 255 is NaN (OCP MX v1.0, 5.4.1)
    e4m3, e5m2 codes         the bytes of `torch.float8_e4m3fn`, `torch.float8_e5m2`
"""

from __future__ import annotations

import torch

from auto_round.data_type.elements import ELEMENTS
from auto_round.errors import NumericsError

_MANTISSA_BITS = 23  # of float32, whose exponent has the bias of E8M0
_SMALLEST = 1 << 22  # bits of 2**-127, the one scale that float32 holds as a subnormal
_NAN = 0x7FC00000


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, n] of codes below 16 to uint8 [rows, ceil(n/2)]; the last high nibble of an odd row is zero."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 1::2].bitwise_left_shift(4).bitwise_or_(codes[:, 0::2])


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [rows, ceil(columns/2)] to uint8 [rows, columns]."""
    codes = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8, device=packed.device)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes[:, :columns]


def pack_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """float32 powers of two from 2**-127 to 2**127 as uint8 bytes, in their shape.

    Raises NumericsError for any other value.
    """
    bits = scale.float().contiguous().view(torch.int32)
    stored = (bits >> _MANTISSA_BITS).to(torch.uint8)  # the exponent's field; that of 2**-127 is zero
    if not torch.equal(unpack_e8m0(stored).view(torch.int32), bits) or bool((stored == 255).any()):
        raise NumericsError("a scale is no power of two from 2**-127 to 2**127, and E8M0 bytes hold no other")
    return stored


def unpack_e8m0(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_e8m0`, float32. 255 becomes NaN."""
    bits = stored.to(torch.int32) << _MANTISSA_BITS
    bits = torch.where(stored == 0, _SMALLEST, torch.where(stored == 255, _NAN, bits))
    return bits.to(torch.int32).view(torch.float32)


def exactly(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `values` in `dtype`, in their shape. Raises NumericsError when one of them is none of its values."""
    stored = values.to(dtype)
    if not torch.equal(stored.float(), values.float()):
        raise NumericsError(f"a scale is no value of {dtype}, in which it is stored")
    return stored


def pack_codes(codes: torch.Tensor, element: str) -> torch.Tensor:
    """Codes uint8 [out, in] of an element type: bytes of two codes each, or a tensor of PyTorch's own float8 dtype."""
    dtype = ELEMENTS[element].dtype
    return pack_nibbles(codes) if dtype is None else codes.contiguous().view(dtype)


def unpack_codes(stored: torch.Tensor, element: str, columns: int) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    return unpack_nibbles(stored, columns) if ELEMENTS[element].dtype is None else stored.view(torch.uint8)
