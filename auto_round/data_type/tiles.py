"""Weights and inputs cut into the pieces that share a scale, as a view [R, M, C, N] of the matrix itself.

Rows R*M by columns C*N, each tile M rows of N columns: groups along the input are M = 1; one scale a row M = C = 1; one
for the whole matrix R = C = 1; blocks as they are. A scale is [R, 1, C, 1] and broadcasts.
"""

from __future__ import annotations

import torch

from auto_round.schemes import GroupSize


def tile_shape(shape: tuple[int, int], group_size: GroupSize) -> tuple[int, int, int, int]:
    """(R, M, C, N) of a matrix [rows, columns]; the last tiles may reach beyond it."""
    rows, columns = shape
    if isinstance(group_size, tuple):
        m, n = group_size
        return -(-rows // m), m, -(-columns // n), n
    if group_size == 0:
        return 1, rows, 1, columns
    if group_size < 0 or columns < group_size:
        return rows, 1, 1, columns
    return rows, 1, -(-columns // group_size), group_size


def as_tiles(matrix: torch.Tensor, group_size: GroupSize) -> torch.Tensor:
    """[rows, columns] as [R, M, C, N], with zeros where the last tiles reach beyond; a view where none does."""
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    r, m, c, n = tile_shape(shape, group_size)
    if shape != (r * m, c * n):
        matrix = torch.nn.functional.pad(matrix, (0, c * n - shape[1], 0, r * m - shape[0]))
    return matrix.reshape(r, m, c, n)


def from_tiles(tiles: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Undo `as_tiles`: [R, M, C, N] as [rows, columns]."""
    r, m, c, n = tiles.shape
    return tiles.reshape(r * m, c * n)[: shape[0], : shape[1]]


def tile_sum(tiles: torch.Tensor) -> torch.Tensor:
    """[R, 1, C, 1]: the sum over each tile."""
    sums = tiles.sum(3, keepdim=True)
    return sums if tiles.shape[1] == 1 else sums.sum(1, keepdim=True)


def whole_largest(tensor: torch.Tensor) -> torch.Tensor:
    """float32 scalar: the largest magnitude of a tensor; NaN when it holds one."""
    low, high = torch.aminmax(tensor.detach())
    return torch.maximum(-low, high).float()


def tile_largest(tiles: torch.Tensor) -> torch.Tensor:
    """[R, 1, C, 1], float32: the largest magnitude of each tile; NaN where it holds one."""
    # Floats without their sign are in the order of their bits, NaN last; and integers are compared faster.
    bits = tiles.float().contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
    largest = bits.amax(3, keepdim=True)
    largest = largest if tiles.shape[1] == 1 else largest.amax(1, keepdim=True)
    return largest.view(torch.float32)


def tile_extremes(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, 1, C, 1], same), float32: the smallest and the largest value of each tile, at most and at least zero."""
    low, high = tiles.amin(3, keepdim=True).float(), tiles.amax(3, keepdim=True).float()
    if tiles.shape[1] > 1:
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    return low.clamp_(max=0), high.clamp_(min=0)


def tile_rows(tiles: torch.Tensor, elements: int) -> list[tuple[slice, slice]]:
    """Slices of the first two dimensions, in order, that hold about `elements` values each. Tiles are cut across their
    rows only where there is a single tile."""
    r, m, c, n = tiles.shape
    if not r == c == 1 or m == 1:
        step = max(1, elements // max(1, m * c * n))
        return [(slice(i, min(i + step, r)), slice(0, m)) for i in range(0, r, step)]
    step = max(1, elements // max(1, c * n))
    return [(slice(0, 1), slice(i, min(i + step, m))) for i in range(0, m, step)]
