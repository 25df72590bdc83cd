"""Tiles against the definition of groups, written with Python indices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.codecs.minifloat import (
    as_blocks,
    block_absmax,
    block_chunks,
    block_shape,
    block_sum,
    from_blocks,
    tensor_absmax,
)

SIZES = st.one_of(st.sampled_from([0, -1]), st.integers(1, 20), st.tuples(st.integers(1, 6), st.integers(1, 9)))


@given(st.integers(1, 12), st.integers(1, 30), SIZES, st.integers(0, 2**31))
def test_a_tile_holds_what_shares_a_scale(rows: int, columns: int, size: int | tuple[int, int], seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    tiles = as_blocks(matrix, size)
    assert tuple(tiles.shape) == block_shape((rows, columns), size)
    assert torch.equal(from_blocks(tiles, (rows, columns)), matrix)
    m, n = size if isinstance(size, tuple) else (rows if size == 0 else 1, columns if size <= 0 else size)
    m, n = m, min(n, columns) if not isinstance(size, tuple) else n
    for r in range(tiles.shape[0]):
        for c in range(tiles.shape[2]):
            part = matrix[r * m : (r + 1) * m, c * n : (c + 1) * n]
            assert block_absmax(tiles)[r, 0, c, 0] == part.abs().max()
            torch.testing.assert_close(block_sum(tiles)[r, 0, c, 0], part.sum(), rtol=1e-4, atol=1e-5)
    assert tensor_absmax(matrix) == matrix.abs().max()


@given(st.integers(1, 12), st.integers(1, 30), SIZES, st.integers(1, 64))
def test_pieces_cover_everything_once(rows: int, columns: int, size: int | tuple[int, int], elements: int) -> None:
    tiles = as_blocks(torch.zeros(rows, columns), size)
    for outer, inner in block_chunks(tiles, elements):
        tiles[outer, inner] += 1
        if tiles.shape[0] > 1 or tiles.shape[2] > 1:
            assert inner == slice(0, tiles.shape[1])  # tiles stay whole
    assert bool((tiles == 1).all())


def test_no_copy_where_nothing_is_padded() -> None:
    matrix = torch.randn(4, 6)
    for size in (0, -1, 3, (2, 3)):
        assert as_blocks(matrix, size).data_ptr() == matrix.data_ptr()
    largest = block_absmax(torch.tensor([[1.0, float("nan")], [2.0, -3.0]]).view(2, 1, 1, 2)).flatten()
    assert bool(largest[0].isnan()) and largest[1] == 3
    assert bool(tensor_absmax(torch.tensor([1.0, float("nan")])).isnan())
