"""Weights in pieces that stay in the cache, laid out so that groups are handled side by side.

A piece is some whole blocks. `group_columns` turns it into a matrix with a column for each group: the sums and extremes
over a group are then down the columns, which PyTorch does for many columns at once, and what there is one of in a group
(a step, a minimum) multiplies row after row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auto_round.data_type.gguf.types import GgmlType

# Weights in flight, for each thread: a float32 buffer of so many is 1 MB. Fewer, and starting PyTorch's operations
# costs more than doing them.
_PIECE = 1 << 18
_PIECE_ON_DEVICE = 1 << 24
# Columns come in multiples of it: four vectors of 16, the widest there are. PyTorch adds four vectors side by side in
# order, and the columns that are left over in another one.
_COLUMNS = 64
_UNEVEN = 8  # blocks of 256, so at least 64 columns


def block_slices(blocks: int, block: int, device: torch.device, times: int = 1) -> Iterator[slice]:
    """Slices of `blocks` blocks of `block` weights, one for each piece; of `times` pieces where less is done with a
    weight."""
    piece = _PIECE * torch.get_num_threads() if device.type == "cpu" else _PIECE_ON_DEVICE
    step = max(_COLUMNS, piece * times // block)
    if block > _COLUMNS and step > _COLUMNS:
        # Not a power of two: the rows of a matrix that is one share few places of the cache, and turning it is slow.
        step -= _UNEVEN
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))


def block_pieces(blocks: torch.Tensor, part: slice, times: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
    """(where, float32 [some, block]) of some of the blocks [all, block] of any float type, one after the other. The
    pieces share their memory, and may be overwritten."""
    buffer = None
    for inside in block_slices(part.stop - part.start, blocks.shape[1], blocks.device, times):
        where = slice(part.start + inside.start, part.start + inside.stop)
        some = blocks[where]
        buffer = torch.empty_like(some, dtype=torch.float32) if buffer is None else buffer
        yield where, buffer[: some.shape[0]].copy_(some)


def even_parts(count: int, parts: int) -> list[slice]:
    """As many slices of about the same length, fewer where that would be none."""
    cuts = [count * index // parts for index in range(parts + 1)]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def group_columns(piece: torch.Tensor, group: int) -> torch.Tensor:
    """[some, block] as [group, columns], contiguous: a column for each group, then columns of zeros up to a multiple
    of 64."""
    groups = piece.reshape(-1, group)
    short = -groups.shape[0] % _COLUMNS
    if short:
        groups = torch.nn.functional.pad(groups, (0, 0, 0, short))
    return groups.t().contiguous()


def of_blocks(columns: torch.Tensor, some: int, kind: GgmlType) -> torch.Tensor:
    """[columns], a number for each group, as [some, groups of a block]; the columns added at the end are left out."""
    groups = kind.block // kind.group
    return columns[: some * groups].view(some, groups)


def to_columns(values: torch.Tensor) -> torch.Tensor:
    """Undo `of_blocks`, with zeros in the columns that `group_columns` added."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _COLUMNS))
