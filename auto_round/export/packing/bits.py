"""A dense little-endian bit stream in int32 words.

Value i of a column lies in bits `i*bits .. i*bits + bits - 1` of that column's stream; bit 32*w + b is bit b of word w.
With 2, 4 and 8 bits no value crosses a word; with 3 bits a period of 32 values fills 3 words (the GPTQ layout).
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
