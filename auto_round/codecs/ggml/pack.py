"""Pack ggml blocks into the bytes of a GGUF file and unpack them (ggml-common.h, `block_q4_0` to `block_q6_K`).

A block is the sequence of its fields, without padding. `d`, `dmin` are float16; the rest is codes and integers:

| field | bytes | holds |
|---|---|---|
| nibbles | 16 or 128 | the lowest 4 bits: code i in the low half of byte i, code i + half in the high half; the half
is 16 in blocks of 32, 32 in Q4_K and Q5_K, 64 in Q6_K |
| pairs | 64 | 2 bits: codes i, i + 32, i + 64, i + 96 of 128 in byte i, lowest first; of Q6_K the highest 2 |
| fifth | 4 | the highest bit of each code of Q5_0 and Q5_1, in order |
| top | 32 | the highest bit in Q3_K and Q5_K: bit k of byte i is that of code 32 * k + i |
| scales | 12 or 16 | see the second table |

Eight codes are processed as one 64-bit word, each in its own byte, so no shift carries into a neighbour.

Integer scales and minima of a K block (`get_scale_min_k4` in ggml-quants.c):

| type | bytes | holds |
|---|---|---|
| Q2_K | 16 | a byte each: scale in the low half, minimum in the high half |
| Q6_K | 16 | a signed byte each |
| Q3_K | 12 | 6 bits, less 32: the low 4 in the halves of bytes 0-7 (scale i + 8 in the high one), the others in pairs in bytes 8-11 |
| Q4_K, Q5_K | 12 | 6 bits: scales 0-3 and minima 0-3 in the low 6 bits of bytes 0-3 and 4-7, whose high 2 bits are the high 2 of scales and minima 4-7; their low 4 are the halves of bytes 8-11 |
"""  # noqa: E501

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType, block_slices


def join_scales(kind: GgmlType, scales: Tensor, mins: Tensor | None) -> Tensor:
    """uint8 [blocks, 12 or 16] from scales int8 and minima uint8, both [blocks, groups]."""
    if kind.name == "Q6_K":
        return scales.view(torch.uint8)
    if kind.name == "Q3_K":
        s = (scales + 32).view(torch.uint8)
        high = [(s[:, 4 * k : 4 * k + 4] >> 4) << (2 * k) for k in range(4)]
        low = (s[:, :8] & 15) | (s[:, 8:] << 4)
        return torch.cat((low, high[0] | high[1] | high[2] | high[3]), 1)
    assert mins is not None
    s = scales.view(torch.uint8)
    if kind.name == "Q2_K":
        return s | (mins << 4)
    first, middle = (x[:, :4] | ((x[:, 4:] >> 4) << 6) for x in (s, mins))
    return torch.cat((first, middle, (s[:, 4:] & 15) | (mins[:, 4:] << 4)), 1)


def split_scales(kind: GgmlType, data: Tensor) -> tuple[Tensor, Tensor | None]:
    """The inverse of `join_scales`: (scales int8 [blocks, groups], minima uint8 of that shape or None)."""
    if kind.name == "Q6_K":
        return data.view(torch.int8), None
    if kind.name == "Q3_K":
        high = torch.cat([(data[:, 8:] >> (2 * k)) & 3 for k in range(4)], 1) << 4
        low = torch.cat((data[:, :8] & 15, data[:, :8] >> 4), 1)
        return (low | high).view(torch.int8) - 32, None
    if kind.name == "Q2_K":
        return (data & 15).view(torch.int8), data >> 4
    first, middle, last = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), 1)
    return scales.view(torch.int8), torch.cat((middle & 63, (last >> 4) | ((middle >> 6) << 4)), 1)


# The fields of a block in the order in which they are stored, and their bytes.
LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "Q4_0": (("d", 2), ("nibbles", 16)),
    "Q4_1": (("d", 2), ("dmin", 2), ("nibbles", 16)),
    "Q5_0": (("d", 2), ("fifth", 4), ("nibbles", 16)),
    "Q5_1": (("d", 2), ("dmin", 2), ("fifth", 4), ("nibbles", 16)),
    "Q8_0": (("d", 2), ("bytes", 32)),
    "Q2_K": (("scales", 16), ("pairs", 64), ("d", 2), ("dmin", 2)),
    "Q3_K": (("top", 32), ("pairs", 64), ("scales", 12), ("d", 2)),
    "Q4_K": (("d", 2), ("dmin", 2), ("scales", 12), ("nibbles", 128)),
    "Q5_K": (("d", 2), ("dmin", 2), ("scales", 12), ("top", 32), ("nibbles", 128)),
    "Q6_K": (("nibbles", 128), ("pairs", 64), ("scales", 16), ("d", 2)),
}
# Distance between the two codes of a byte.
_HALF = {"Q4_0": 16, "Q4_1": 16, "Q5_0": 16, "Q5_1": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 64}
_EVERY = 0x0101010101010101  # a one in each byte of a word
# The product with it brings the lowest bit of byte i of a word to bit 56 + i, without carries on the way there.
_GATHER = 0x0102040810204080
_DIAGONAL = 0x8040201008040201 - (1 << 64)  # bit i of byte i


def _places(kind: GgmlType) -> dict[str, slice]:
    """Where each field is in a block, in bytes."""
    ends = accumulate((size for _, size in LAYOUTS[kind.name]), initial=0)
    return {field: slice(*place) for (field, _), place in zip(LAYOUTS[kind.name], pairwise(ends), strict=True)}


def pack_blocks(blocks: GgmlBlocks) -> Tensor:
    """uint8 [out, row_bytes], contiguous: the bytes of the tensor in a file. Nothing is rounded or checked."""
    kind = blocks.kind
    out, columns = blocks.codes.shape
    data = torch.empty(out, kind.row_bytes(columns), dtype=torch.uint8, device=blocks.codes.device)
    codes, rows = blocks.codes.contiguous().view(-1, kind.block), data.view(-1, kind.nbytes)
    halves = {"d": blocks.d, "dmin": blocks.dmin}
    per_block = {key: t.reshape(-1).view(torch.uint8).view(-1, 2) for key, t in halves.items() if t is not None}
    if blocks.scales is not None:
        groups = kind.block // kind.group
        mins = None if blocks.mins is None else blocks.mins.reshape(-1, groups)
        per_block["scales"] = join_scales(kind, blocks.scales.reshape(-1, groups), mins)
    for where in block_slices(slice(0, codes.shape[0]), kind.block, codes.device, times=4):
        for field, place in _places(kind).items():
            rows[where, place] = per_block[field][where] if field in per_block else _join(field, codes[where], kind)
    return data


def unpack_blocks(data: Tensor, kind: GgmlType | str, columns: int) -> GgmlBlocks:
    """The inverse of `pack_blocks` for rows of `columns` weights, from any bytes uint8 [out, row_bytes]."""
    kind = GGML_TYPES[kind] if isinstance(kind, str) else kind
    assert data.shape[1] == kind.row_bytes(columns)
    out, rows, places = data.shape[0], data.contiguous().view(-1, kind.nbytes), _places(kind)
    codes = torch.empty(out, columns, dtype=torch.uint8, device=data.device)
    flat = codes.view(-1, kind.block)
    per_block = {key: _copy(rows[:, places.pop(key)]) for key in ("d", "dmin", "scales") if key in places}
    for where in block_slices(slice(0, rows.shape[0]), kind.block, data.device, times=4):
        _split({field: _copy(rows[where, place]) for field, place in places.items()}, flat[where], kind)
    scales, mins = split_scales(kind, per_block.pop("scales")) if "scales" in per_block else (None, None)
    halves = {key: field.view(torch.float16).view(out, -1) for key, field in per_block.items()}
    scales, mins = (None if part is None else part.view(out, -1) for part in (scales, mins))
    return GgmlBlocks(kind, codes, scales=scales, mins=mins, **halves)


def _copy(field: Tensor) -> Tensor:
    """A contiguous copy, because `contiguous()` keeps a one-row slice at any storage offset."""
    return field.clone(memory_format=torch.contiguous_format)


def _words(codes: Tensor) -> Tensor:
    """uint8 [blocks, n], contiguous, as int64 [blocks, n / 8]."""
    flat = codes.reshape(-1)
    if flat.storage_offset() % 8:  # a view that does not start at a multiple of 8 bytes
        flat = flat.clone()
    return flat.view(torch.int64).view(codes.shape[0], -1)


def _join(field: str, codes: Tensor, kind: GgmlType) -> Tensor:
    """The bytes of one field of codes uint8 [blocks, block]."""
    if field == "bytes":
        return codes ^ 0x80  # two's complement of the code less 128
    words, count = _words(codes), codes.shape[0]
    if field == "nibbles":
        both = words.view(count, -1, 2, _HALF[kind.name] // 8)
        if kind.bits > 4:
            both = both & 15 * _EVERY
        joined = both[:, :, 0] | (both[:, :, 1] << 4)
    elif field == "pairs":
        four = words.view(count, 2, 4, 4)
        if kind.bits > 2:
            four = (four >> (4 if kind.bits == 6 else 0)) & 3 * _EVERY
        joined = four[:, :, 0] | (four[:, :, 1] << 2)
        joined |= four[:, :, 2] << 4
        joined |= four[:, :, 3] << 6
    elif field == "top":
        bits = ((words >> (kind.bits - 1)) & _EVERY).view(count, 8, 4)
        joined = bits[:, 0].clone()
        for k in range(1, 8):
            joined |= bits[:, k] << k
    else:
        bits = (words >> 4) & _EVERY
        return (bits.mul_(_GATHER) >> 56).to(torch.uint8)
    return joined.reshape(count, -1).view(torch.uint8)


def _split(fields: dict[str, Tensor], codes: Tensor, kind: GgmlType) -> None:
    """Write the codes of the fields to `codes`, uint8 [blocks, block]."""
    if "bytes" in fields:
        torch.bitwise_xor(fields["bytes"], 0x80, out=codes)
        return
    count = codes.shape[0]
    words = torch.empty(count, kind.block // 8, dtype=torch.int64, device=codes.device)
    if "nibbles" in fields:
        both, nibbles = words.view(count, -1, 2, _HALF[kind.name] // 8), _words(fields["nibbles"])
        nibbles = nibbles.view(count, -1, _HALF[kind.name] // 8)
        both[:, :, 0] = nibbles & 15 * _EVERY
        both[:, :, 1] = (nibbles >> 4) & 15 * _EVERY
    if "pairs" in fields:
        four, pairs = words.view(count, 2, 4, 4), _words(fields["pairs"]).view(count, 2, 4)
        for k in range(4):
            two = (pairs >> (2 * k)) & 3 * _EVERY
            if kind.bits == 6:
                four[:, :, k] |= two << 4
            else:
                four[:, :, k] = two
    if "top" in fields:
        eight, top = words.view(count, 8, 4), _words(fields["top"])
        for k in range(8):
            eight[:, k] |= ((top >> k) & _EVERY) << (kind.bits - 1)
    if "fifth" in fields:
        # Copy each byte to all eight of a word, keep bit i of byte i, and set 16 in each byte that is not zero.
        spread = (fields["fifth"].to(torch.int64) * _EVERY) & _DIAGONAL
        some = ((spread & 0x7F * _EVERY) + 0x7F * _EVERY) | spread
        words |= ((some >> 7) & _EVERY) << 4
    codes.copy_(words.view(torch.uint8))
