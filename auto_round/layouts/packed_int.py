"""The integer layouts of compressed-tensors: packed int32 rows for 2 to 8 bits, and plain int8 values.

Packed: value i of a row occupies bits `i*bits .. i*bits + bits - 1` of the row's little-endian stream; bit 32*w +
b is bit b of word w. The last word of a row is padded with zeros.

    weight_packed      int32 [out, ceil(in*bits/32)]       codes, along the input
    weight_zero_point  int32 [ceil(out*bits/32), groups]   zero points, along the output

Both hold unsigned values 0 .. 2**bits - 1: the library's signed integers plus 2**(bits-1), which are our codes.
The plain layout stores the signed integers as int8 (`signed_values`, `stored_codes`).
"""

from __future__ import annotations

import sys

import torch

_VALUES = 8  # eight values of any width fill whole bytes


def packed_words(count: int, bits: int) -> int:
    """int32 words that a row of `count` values takes."""
    return -(-count * bits // 32)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, n], each below 2**bits, to int32 [rows, ceil(n*bits/32)]; any bits from 1 to 8.

    Works in bytes: no temporary is larger than the values themselves.
    """
    rows, count = values.shape
    if bits == 8 and count % 4 == 0:
        return _as_words(values.clone(memory_format=torch.contiguous_format))
    if count % _VALUES:
        values = torch.nn.functional.pad(values, (0, -count % _VALUES))
    eights = values.reshape(rows, -1, _VALUES)
    used = eights.shape[1] * bits
    stream = torch.zeros(rows, -(-used // 4) * 4, dtype=torch.uint8, device=values.device)
    whole = stream[:, :used].view(rows, -1, bits)
    for i in range(_VALUES):
        byte, shift = divmod(i * bits, 8)
        part = eights[..., i]
        whole[..., byte] |= part << shift  # what does not fit is cut off: bytes wrap
        if shift + bits > 8:
            whole[..., byte + 1] |= part >> (8 - shift)
    return _as_words(stream)[:, : packed_words(count, bits)].contiguous()


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 [rows, words] to uint8 [rows, count]."""
    rows = words.shape[0]
    stream = _as_bytes(words)
    eights = -(-count // _VALUES)
    if stream.shape[1] < eights * bits:
        stream = torch.nn.functional.pad(stream, (0, eights * bits - stream.shape[1]))
    whole = stream[:, : eights * bits].reshape(rows, eights, bits)
    values = torch.empty(rows, eights, _VALUES, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(_VALUES):
        byte, shift = divmod(i * bits, 8)
        part = whole[..., byte] >> shift
        if shift + bits > 8:
            part = part | (whole[..., byte + 1] << (8 - shift))
        values[..., i] = part & mask
    return values.view(rows, -1)[:, :count].contiguous()


def _as_words(stream: torch.Tensor) -> torch.Tensor:
    if sys.byteorder == "big":
        stream = stream.view(stream.shape[0], -1, 4).flip(-1).reshape(stream.shape)
    return stream.view(torch.int32)


def _as_bytes(words: torch.Tensor) -> torch.Tensor:
    stream = words.contiguous().view(torch.uint8)
    if sys.byteorder == "big":
        stream = stream.view(stream.shape[0], -1, 4).flip(-1).reshape(stream.shape)
    return stream


def signed_values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes 0 .. 2**bits - 1 as int8 values less 2**(bits-1), contiguous."""
    return (codes - 2 ** (bits - 1)).view(torch.int8).contiguous()  # bytes wrap


def stored_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `signed_values`."""
    return values.view(torch.uint8) + 2 ** (bits - 1)
