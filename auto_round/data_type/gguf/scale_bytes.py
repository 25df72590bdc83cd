"""The integer scales and minima of a K block as bytes (ggml-common.h; `get_scale_min_k4` in ggml-quants.c).

| type | bytes | holds |
|---|---|---|
| Q2_K | 16 | a byte each: scale in the low half, minimum in the high half |
| Q6_K | 16 | a signed byte each |
| Q3_K | 12 | 6 bits, less 32: the low 4 in the halves of bytes 0-7 (scale i + 8 in the high one), the others in pairs in bytes 8-11 |
| Q4_K, Q5_K | 12 | 6 bits: scales 0-3 and minima 0-3 in the low 6 bits of bytes 0-3 and 4-7, whose high 2 bits are the high 2 of scales and minima 4-7; their low 4 are the halves of bytes 8-11 |
"""  # noqa: E501

from __future__ import annotations

import torch

from auto_round.data_type.gguf.types import GgmlType


def join_scales(kind: GgmlType, scales: torch.Tensor, mins: torch.Tensor | None) -> torch.Tensor:
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


def split_scales(kind: GgmlType, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
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
