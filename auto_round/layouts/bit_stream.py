"""Little-endian bit streams in 32-bit words: value i occupies bits `i*bits .. i*bits + bits - 1` of its stream.

Bit 32*w + b of a stream is bit b of word w. With 2, 4 and 8 bits no value crosses a word; with 3 bits, 32 values
fill 3 words.
"""

from __future__ import annotations

from math import gcd

import torch

from auto_round.errors import UnsupportedError

WORD_BITS = 32
# Codes packed at once: few enough that they and their temporaries stay in a shared cache.
_CHUNK = 1 << 20


def period(bits: int, unit: int = WORD_BITS) -> tuple[int, int]:
    """(values, units): the smallest whole number of units (words, or bytes with `unit` 8) that whole values fill."""
    common = gcd(unit, bits)
    return unit // common, bits // common


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


def padded_words(count: int, bits: int) -> int:
    """int32 words that `count` values take when the last word is padded with zeros."""
    return -(-count * bits // WORD_BITS)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along dimension 0, one stream a column.

    Args:
        values: uint8 [n, m], each below 2**bits. Fastest when its transpose is contiguous, as for a layer's codes.
        bits: 1 to 8.

    Returns:
        int32 [n*bits/32, m], contiguous. Raises UnsupportedError when `n` values do not fill whole words.
    """
    count, width = values.shape
    words = torch.empty(words_needed(count, bits), width, dtype=torch.int32, device=values.device)
    _pack(values.T, bits, words.T)
    return words


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along dimension 1: uint8 [m, n] to int32 [m, ceil(n*bits/32)], one zero-padded stream a row."""
    rows, count = values.shape
    words = torch.empty(rows, padded_words(count, bits), dtype=torch.int32, device=values.device)
    _pack(values, bits, words)
    return words


def _pack(values: torch.Tensor, bits: int, words: torch.Tensor) -> None:
    """Fill `words` [rows, words] with one stream a row of `values` [rows, n], a few rows at a time."""
    step = max(1, _CHUNK // max(1, values.shape[1]))
    missing = -values.shape[1] % period(bits)[0]
    for start in range(0, values.shape[0], step):
        rows = values[start : start + step]
        rows = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
        words[start : start + step] = _pack_chunk(rows, bits)[:, : words.shape[1]]


def _pack_chunk(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [m, n] to int32 [m, n*bits/32].

    With 4 and 2 bits two neighbours become one byte, once or twice. With other widths eight codes are one 64-bit number
    with a code in each byte; neighbours are joined three times (pairs, fours, eights), and the lowest `bits` bytes are
    the stream (memory is little-endian wherever PyTorch runs).
    """
    count, words = rows.shape[0], rows.shape[1] * bits // WORD_BITS
    flat = rows.contiguous().view(-1)
    if flat.storage_offset() % 8:  # a view that does not start at a multiple of 8 bytes
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
    if 2 * used > field:  # bits shifted out of the lower field would overlap it
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


def unpack_rows(words: torch.Tensor, bits: int, count: int | None = None) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 or uint32 [m, words] to uint8 [m, count], contiguous; by default all values."""
    count = words.shape[1] * WORD_BITS // bits if count is None else count
    values, width = period(bits, 8)
    stream, periods = words.contiguous().view(torch.uint8), -(-count // values)
    if stream.shape[1] < periods * width:
        stream = torch.nn.functional.pad(stream, (0, periods * width - stream.shape[1]))
    codes = torch.empty(stream.shape[0], periods * values, dtype=torch.uint8, device=words.device)
    for i in range(values):
        byte, offset = divmod(i * bits, 8)
        part = stream[:, byte : periods * width : width] >> offset
        if offset + bits > 8:
            part |= stream[:, byte + 1 : periods * width : width] << (8 - offset)
        codes[:, i::values] = part & ((1 << bits) - 1)
    return codes[:, :count].contiguous()
