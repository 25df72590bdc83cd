"""The AWQ "gemm" layout, 4 bits: `qweight` and `qzeros` packed along the output, in blocks of eight columns.

qweight int32 [in, out/8]      nibble i (bits 4i .. 4i+3) of word w = code of weight [8w + ORDER[i], row]
qzeros  int32 [groups, out/8]  the same for zero points, stored without an offset
scales  float16 [groups, out]
"""

from __future__ import annotations

from typing import ClassVar

import torch

from auto_round.errors import UnsupportedError
from auto_round.layouts.bit_stream import words_needed
from auto_round.layouts.gptq import GptqLayout
from auto_round.schemes import QuantizationScheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = 8
# Codes packed at once: few enough that they and their temporaries stay in a core's cache.
_CHUNK = 1 << 17


def _pack_columns(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n] to int32 [n, out/8]."""
    words = torch.empty(values.shape[1], values.shape[0] // _PER_WORD, dtype=torch.int32, device=values.device)
    step = max(1, _CHUNK // max(1, values.shape[1])) * _PER_WORD
    for start in range(0, values.shape[0], step):
        some = values[start : start + step]
        part = torch.zeros(some.shape[0] // _PER_WORD, some.shape[1], dtype=torch.int32, device=values.device)
        for byte in range(4):
            low, high = (some[column::_PER_WORD] for column in AWQ_ORDER[2 * byte : 2 * byte + 2])
            part.bitwise_or_((low | (high << 4)).to(torch.int32) << (8 * byte))
        words[:, start // _PER_WORD : start // _PER_WORD + part.shape[0]] = part.T
    return words


def unpack_awq_rows(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out/8] to uint8 [n, out]."""
    values = torch.empty(words.shape[0], words.shape[1] * _PER_WORD, dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(AWQ_ORDER):
        values[:, column::_PER_WORD] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return values


def pack_awq(codes: torch.Tensor, zeros: torch.Tensor, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack one layer.

    Args:
        codes: uint8 [out, in], each below 16.
        zeros: zero points, uint8 [out, groups].
        bits: 4; the layout has no other width.

    Returns:
        (qweight int32 [in, out/8], qzeros int32 [groups, out/8]).
        Raises UnsupportedError for another width or when out is not a multiple of 8.
    """
    if bits != 4:
        raise UnsupportedError(f"the AWQ layout holds 4-bit weights, not {bits}-bit ones; use the auto_round format")
    if codes.shape[0] % _PER_WORD:
        raise UnsupportedError(f"the AWQ layout needs out_features in multiples of {_PER_WORD}, not {codes.shape[0]}")
    return _pack_columns(codes), _pack_columns(zeros)


class AwqLayout(GptqLayout):
    """The tensors of `GptqLayout` with AWQ words, and zero points stored without an offset."""

    bits: ClassVar[tuple[int, ...]] = (4,)

    def _weight_shape(self, in_features: int, out_features: int, bits: int) -> tuple[int, int]:
        return in_features, words_needed(out_features, bits)

    def _pack_words(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        return pack_awq(codes, zeros, bits)

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        if scheme.bits != 4:
            return f"the AWQ layout has no {scheme.bits}-bit form"
        return f"out_features={out_features} is not a multiple of {_PER_WORD}" if out_features % _PER_WORD else None

    def row_period(self, bits: int) -> tuple[int, int]:
        return 1, 1

    def code_rows(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        return unpack_awq_rows(words)

    def zero_rows(self, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
        return unpack_awq_rows(qzeros)


AWQ = AwqLayout(0)
