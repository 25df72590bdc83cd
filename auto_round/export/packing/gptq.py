"""The GPTQ layout: `qweight` packed along the input dimension, `qzeros` along the output dimension.

    qweight int32 [in*bits/32, out]      value i of column o = code of weight [o, i]
    qzeros  int32 [groups, out*bits/32]  value o of row g    = zero point of group g of row o, less `zero_offset`

`zero_offset` is 1 in GPTQ "v1" files (AutoGPTQ, `auto_round:auto_gptq`) and 0 in "v2" and plain `auto_round` files.
With an offset of 1 the arithmetic is modulo 2**bits, like unsigned integers of that width: a zero point of 0 is stored
as 2**bits - 1 and read back as 0. Readers that add 1 without wrapping see 2**bits there; that is why asymmetric v1
files are not accurate everywhere and why asymmetric layers are written in other layouts by default.
"""

from __future__ import annotations

import torch

from auto_round.export.packing.bits import pack_words, unpack_words


def pack_gptq(
    codes: torch.Tensor, zero_point: torch.Tensor | int, bits: int, zero_offset: int, groups: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack one layer.

    Args:
        codes: uint8 [out, in].
        zero_point: uint8 [out, groups], or one int for every group.
        bits: 2, 3, 4 or 8.
        zero_offset: 1 or 0, subtracted from the zero points, modulo 2**bits.
        groups: number of groups; needed when `zero_point` is an int.

    Returns:
        (qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32]).
        Raises UnsupportedError when a dimension does not fill whole words.
    """
    qweight = pack_words(codes.T, bits)
    mask = (1 << bits) - 1
    if isinstance(zero_point, int):
        if groups is None:
            raise TypeError("pack_gptq: give the number of groups when zero_point is one int")
        stored = torch.full((codes.shape[0], groups), (zero_point - zero_offset) & mask, dtype=torch.uint8)
        stored = stored.to(codes.device)
    else:
        stored = (zero_point.to(torch.int16) - zero_offset).bitwise_and_(mask).to(torch.uint8)
    return qweight, pack_words(stored, bits).T.contiguous()


def unpack_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, bits: int, zero_offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_gptq`: (codes uint8 [out, in], zero points uint8 [out, groups]), both contiguous."""
    return unpack_words(qweight, bits).T.contiguous(), unpack_gptq_zeros(qzeros, bits, zero_offset)


def unpack_gptq_zeros(qzeros: torch.Tensor, bits: int, zero_offset: int) -> torch.Tensor:
    """Zero points uint8 [out, groups] of int32 [groups, out*bits/32]; adding the offset wraps modulo 2**bits."""
    stored = unpack_words(qzeros.T, bits).to(torch.int16)
    return (stored + zero_offset).bitwise_and_((1 << bits) - 1).to(torch.uint8)
