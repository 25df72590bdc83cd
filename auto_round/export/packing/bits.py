"""A dense little-endian bit stream in int32 words.

Value i of a column lies in bits `i*bits .. i*bits + bits - 1` of that column's stream; bit 32*w + b is bit b of word w.
With 2, 4 and 8 bits no value crosses a word; with 3 bits a period of 32 values fills 3 words (the GPTQ layout).
"""

from __future__ import annotations

from math import gcd

import torch

from auto_round.errors import UnsupportedError

WORD_BITS = 32


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
        values: uint8 [n, m], each below 2**bits; any strides, so a transposed view costs no copy.
        bits: 2 to 8.

    Returns:
        int32 [n*bits/32, m], contiguous. The largest temporary holds one word's share of the values.
    """
    per_period, words_per_period = period(bits)
    count, width = values.shape
    words = torch.zeros(words_needed(count, bits), width, dtype=torch.int32, device=values.device)
    for i in range(per_period):
        word, offset = divmod(i * bits, WORD_BITS)
        part = values[i::per_period].to(torch.int32)
        words[word::words_per_period] |= part << offset
        if offset + bits > WORD_BITS:
            words[word + 1 :: words_per_period] |= part >> (WORD_BITS - offset)
    return words


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
