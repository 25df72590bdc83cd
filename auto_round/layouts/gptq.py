"""The GPTQ layout: `qweight` packed along the input dimension, `qzeros` along the output dimension.

    qweight int32 [in*bits/32, out]      value i of column o = code of weight [o, i]
    qzeros  int32 [groups, out*bits/32]  value o of row g    = zero point of group g of row o, minus `zero_offset`

Both are little-endian bit streams in int32 words: value i of a column occupies bits `i*bits .. i*bits + bits - 1`
of that column's stream; bit 32*w + b is bit b of word w. With 2, 4 and 8 bits no value crosses a word; with 3
bits a period of 32 values fills 3 words. The GPTQModel and HPU kernels in `inference` use the same words.

`zero_offset` is 1 in GPTQ "v1" files (AutoGPTQ, `auto_round:auto_gptq`) and 0 in "v2" and plain `auto_round`
files. With an offset of 1 the arithmetic is modulo 2**bits, like unsigned integers of that width: a zero point of
0 is stored as 2**bits - 1 and read back as 0. Readers that add 1 without wrapping see 2**bits there; that is why
asymmetric v1 files are not accurate everywhere and why asymmetric layers use other layouts by default.
"""

from __future__ import annotations

from math import gcd

import torch

from auto_round.errors import UnsupportedError

WORD_BITS = 32
# Codes packed at once: few enough that they and their temporaries stay in a shared cache.
_PIECE = 1 << 20


def period(bits: int) -> tuple[int, int]:
    """(values, words): the smallest whole number of words that whole values fill."""
    common = gcd(WORD_BITS, bits)
    return WORD_BITS // common, bits // common


def packs_evenly(count: int, bits: int) -> bool:
    """Whether `count` values of `bits` bits fill whole periods."""
    return count % period(bits)[0] == 0


def words_needed(count: int, bits: int) -> int:
    """int32 words that `count` values take. Raises UnsupportedError when they do not fill whole periods."""
    values, words = period(bits)
    if count % values:
        raise UnsupportedError(
            f"{count} values of {bits} bits do not fill whole 32-bit words: the count must be a multiple of {values}; "
            "leave this layer in full precision"
        )
    return count // values * words


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along dimension 0.

    Args:
        values: uint8 [n, m], each below 2**bits. Fastest when its transpose is contiguous, as for a layer's codes.
        bits: 2 to 8.

    Returns:
        int32 [n*bits/32, m], contiguous. Temporaries stay near `_PIECE` bytes.
    """
    count, width = values.shape
    words = torch.empty(words_needed(count, bits), width, dtype=torch.int32, device=values.device)
    step = max(1, _PIECE // max(1, count))
    for start in range(0, width, step):
        rows = values[:, start : start + step].T
        words[:, start : start + step] = pack_rows(rows, bits).T
    return words


def pack_rows(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [m, n] to int32 [m, n*bits/32], each row a dense stream of its own.

    With 4 and 2 bits two neighbours become one byte, once or twice. Else eight codes are one 64-bit number with a code
    in each byte; three times, neighbours move together: pairs, fours, eights; then the lowest `bits` bytes are the
    stream (memory is little-endian wherever PyTorch runs).
    """
    count, words = rows.shape[0], words_needed(rows.shape[1], bits)
    flat = rows.contiguous().view(-1)
    if flat.storage_offset() % 8:  # a view into the middle of something
        flat = flat.clone()
    if bits in (2, 4, 8):
        while bits < 8:
            pairs = flat.view(torch.int16)
            flat = (pairs >> (8 - bits)).bitwise_or_(pairs).to(torch.int8)
            bits *= 2
        return flat.view(torch.int32).view(count, words)
    packed = flat.view(torch.int64)
    for field in (8, 16, 32):
        packed = _join(packed, field, bits * field // 8)
    stream = packed.view(torch.uint8).view(-1, 8)[:, :bits].contiguous()
    return stream.view(-1).view(torch.int32).view(count, words)


def _join(numbers: torch.Tensor, field: int, used: int) -> torch.Tensor:
    """Fields of `field` bits that hold `used` bits each become fields twice as wide that hold two neighbours."""
    upper = numbers >> (field - used)
    if 2 * used > field:  # what is shifted out of the lower field would land on it
        upper.bitwise_and_(_mask(2 * field, 2 * used) ^ _mask(2 * field, used))
        return upper.bitwise_or_(numbers & _mask(2 * field, used))
    return upper.bitwise_or_(numbers).bitwise_and_(_mask(2 * field, 2 * used))


def _mask(field: int, used: int) -> int:
    """64 bits of which the lowest `used` of every `field` are set."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, field))


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_words`: int32 [n*bits/32, m] to uint8 [n, m]."""
    per_period, words_per_period = period(bits)
    rows, width = words.shape
    if rows % words_per_period:
        raise UnsupportedError(f"{rows} words of {bits}-bit values: the count must be a multiple of {words_per_period}")
    mask = (1 << bits) - 1
    values = torch.empty(rows // words_per_period * per_period, width, dtype=torch.uint8, device=words.device)
    for i in range(per_period):
        word, offset = divmod(i * bits, WORD_BITS)
        part = (words[word::words_per_period] >> offset) & mask
        spill = offset + bits - WORD_BITS
        if spill > 0:
            # The shift above is arithmetic: only the bits that belong to this word may stay.
            part &= (1 << (bits - spill)) - 1
            part |= (words[word + 1 :: words_per_period] & ((1 << spill) - 1)) << (bits - spill)
        values[i::per_period] = part.to(torch.uint8)
    return values


# The GPTQ layout: `qweight` packed along the input dimension, `qzeros` along the output dimension.
#
# qweight int32 [in*bits/32, out]      value i of column o = code of weight [o, i]
# qzeros  int32 [groups, out*bits/32]  value o of row g    = zero point of group g of row o, less `zero_offset`
#
# `zero_offset` is 1 in GPTQ "v1" files (AutoGPTQ, `auto_round:auto_gptq`) and 0 in "v2" and plain `auto_round` files.
# With an offset of 1 the arithmetic is modulo 2**bits, like unsigned integers of that width: a zero point of 0 is
# stored as 2**bits - 1 and read back as 0. Readers that add 1 without wrapping see 2**bits there; that is why
# asymmetric v1 files are not accurate everywhere and why asymmetric layers are written in other layouts by default.


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
