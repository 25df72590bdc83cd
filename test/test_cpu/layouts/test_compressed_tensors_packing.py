"""The dense rows of compressed-tensors, against an unpacker that reads bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.layouts.bit_stream import pack_rows, padded_words, unpack_rows
from auto_round.layouts.integers import signed_values, stored_codes


def random_codes(rows: int, count: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bit_by_bit(words: list[int], bits: int, count: int) -> list[int]:
    stream = [(word & 0xFFFFFFFF) >> bit & 1 for word in words for bit in range(32)]
    assert not any(stream[count * bits :])  # padding is zero
    return [sum(stream[i * bits + bit] << bit for bit in range(bits)) for i in range(count)]


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 140), st.integers(0, 2**31))
def test_any_shape_and_width(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(rows, count, bits, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, padded_words(count, bits)) and words.is_contiguous()
    assert [bit_by_bit(row, bits, count) for row in words.tolist()] == codes.tolist()
    assert torch.equal(unpack_rows(words, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_views_are_packed_like_copies(bits: int) -> None:
    codes = random_codes(24, 40, bits, 3)
    assert torch.equal(pack_rows(codes.T, bits), pack_rows(codes.T.contiguous(), bits))
    assert torch.equal(unpack_rows(pack_rows(codes.T, bits).T.contiguous().T, bits, 24), codes.T)


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_bytes(bits: int) -> None:
    codes = torch.arange(2**bits).to(torch.uint8)
    values = signed_values(codes, bits)
    assert values.dtype == torch.int8 and values.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert torch.equal(stored_codes(values, bits), codes)
