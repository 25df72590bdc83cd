"""Little-endian bit streams in 32-bit words: value i occupies bits `i*bits .. i*bits + bits - 1` of its stream.

Bit 32*w + b of a stream is bit b of word w. With 2, 4 and 8 bits no value crosses a word; with 3 bits, 32 values
fill 3 words.
"""

from __future__ import annotations

from math import gcd

import torch
from torch.nn.functional import pad

from auto_round.errors import UnsupportedError

_CHUNK = 1 << 20  # codes packed at once: few enough that they and their temporaries stay in a shared cache


def period(bits: int, unit: int = 32) -> tuple[int, int]:
    """(values, units): the smallest whole number of units (words, or bytes with `unit` 8) that whole values fill."""
    common = gcd(unit, bits)
    return unit // common, bits // common


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
    return -(-count * bits // 32)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [n, m] by columns to int32 [n*bits/32, m]. Raises UnsupportedError when `n` fill no whole words."""
    words = torch.empty(words_needed(len(values), bits), values.shape[1], dtype=torch.int32, device=values.device)
    _pack(values.T, bits, words.T)
    return words


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along dimension 1: uint8 [m, n] to int32 [m, ceil(n*bits/32)], one zero-padded stream a row."""
    words = torch.empty(len(values), padded_words(values.shape[1], bits), dtype=torch.int32, device=values.device)
    _pack(values, bits, words)
    return words


def _pack(values: torch.Tensor, bits: int, words: torch.Tensor) -> None:
    """Fill `words` [rows, words] with one stream a row of `values` [rows, n], a few rows at a time."""
    step = max(1, _CHUNK // max(1, values.shape[1]))
    missing = -values.shape[1] % period(bits)[0]
    for start in range(0, values.shape[0], step):
        rows = values[start : start + step]
        rows = pad(rows, (0, missing)) if missing else rows
        words[start : start + step] = _pack_chunk(rows, bits)[:, : words.shape[1]]


def _pack_chunk(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [m, n] to int32 [m, n*bits/32] by joining neighbours, in pairs or as bytes of 64-bit numbers."""
    count, words = rows.shape[0], rows.shape[1] * bits // 32
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
    for field in (8, 16, 32):  # fields of this width, filled to bits/8, become fields twice as wide
        used = bits * field // 8
        low, both = (sum(((1 << size) - 1) << at for at in range(0, 64, 2 * field)) for size in (used, 2 * used))
        upper = packed >> (field - used)
        if 2 * used > field:  # bits shifted out of the lower field would overlap it
            packed = upper.bitwise_and_(both ^ low).bitwise_or_(packed & low)
        else:
            packed = upper.bitwise_or_(packed).bitwise_and_(both)
    stream = packed.view(torch.uint8).view(-1, 8)[:, :bits].contiguous()
    return stream.view(-1).view(torch.int32).view(count, words)


def unpack_rows(words: torch.Tensor, bits: int, count: int | None = None) -> torch.Tensor:
    """The inverse of `pack_rows`: [m, words] to uint8 [m, count], contiguous; transposed, of `pack_words`."""
    count = words.shape[1] * 32 // bits if count is None else count
    values, width = period(bits, 8)
    stream, periods = words.reshape(-1).view(torch.uint8).view(len(words), -1), -(-count // values)
    if stream.shape[1] < periods * width:
        stream = pad(stream, (0, periods * width - stream.shape[1]))
    codes = torch.empty(stream.shape[0], periods * values, dtype=torch.uint8, device=words.device)
    for i in range(values):
        byte, offset = divmod(i * bits, 8)
        part = stream[:, byte : periods * width : width] >> offset
        if offset + bits > 8:
            part |= stream[:, byte + 1 : periods * width : width] << (8 - offset)
        codes[:, i::values] = part & ((1 << bits) - 1)
    return codes[:, :count].contiguous()
