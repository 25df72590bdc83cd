"""Memory layout of the ggml quantizers: chunks of blocks with one column per group, exact sums, output blocks.

`group_columns` turns a chunk of whole blocks into a matrix with a column for each group: sums and extremes over
a group run down the columns, which PyTorch vectorizes. The arithmetic follows ggml-quants.c in float32
operation by operation (order of sums, quotients, ties), so the bytes come out the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auto_round.codecs.ggml.types import GgmlBlocks, GgmlType
from auto_round.errors import NumericsError

# Weights per thread and chunk: a float32 buffer of 1 MB. With fewer, launching PyTorch's operations dominates.
_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24
# Columns are padded to a multiple of four vectors of 16 lanes, the widest: PyTorch sums four vectors side by side in
# row order, and left-over columns in another order.
_COLUMNS = 64
_UNEVEN = 8  # blocks of 256, so at least 64 columns


def block_slices(blocks: int, block: int, device: torch.device, times: int = 1) -> Iterator[slice]:
    """Slices of `blocks` blocks of `block` weights, one per chunk; `times` larger chunks where the work per weight is
    small."""
    chunk = _CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK
    step = max(_COLUMNS, chunk * times // block)
    if block > _COLUMNS and step > _COLUMNS:
        # Not a power of two: rows of such a matrix share few cache sets, and transposing it is slow.
        step -= _UNEVEN
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))


def block_row_chunks(blocks: torch.Tensor, part: slice, times: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
    """(slice, float32 [some, block]) for each chunk of a part of `blocks` [all, block]. All chunks share one buffer and
    may be overwritten."""
    buffer = None
    for inside in block_slices(part.stop - part.start, blocks.shape[1], blocks.device, times):
        where = slice(part.start + inside.start, part.start + inside.stop)
        some = blocks[where]
        buffer = torch.empty_like(some, dtype=torch.float32) if buffer is None else buffer
        yield where, buffer[: some.shape[0]].copy_(some)


def even_parts(count: int, parts: int) -> list[slice]:
    """`parts` slices of about the same length, without empty ones."""
    cuts = [count * index // parts for index in range(parts + 1)]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def group_columns(chunk: torch.Tensor, group: int) -> torch.Tensor:
    """[some, block] as [group, columns], contiguous: one column per group, zero-padded to a multiple of 64 columns."""
    groups = chunk.reshape(-1, group)
    short = -groups.shape[0] % _COLUMNS
    if short:
        groups = torch.nn.functional.pad(groups, (0, 0, 0, short))
    return groups.t().contiguous()


def columns_to_blocks(columns: torch.Tensor, some: int, kind: GgmlType) -> torch.Tensor:
    """[columns], one value per group, as [some, groups of a block], without the padding."""
    groups = kind.block // kind.group
    return columns[: some * groups].view(some, groups)


def blocks_to_columns(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `columns_to_blocks`, zero-padded."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _COLUMNS))


_ROWS_IN_ORDER = 16


class OrderedSum:
    """A buffer [16 or 32, columns] whose columns are summed from the first row to the last, as ggml's loops do.

    PyTorch's sum over the first dimension adds only 16 rows in order.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.values = torch.empty_like(like)
        self._first = self.values[:_ROWS_IN_ORDER]
        starts = range(_ROWS_IN_ORDER, like.shape[0], _ROWS_IN_ORDER)
        self._rest = [(self.values[s - 1], self.values[s - 1 : s + _ROWS_IN_ORDER]) for s in starts]

    def total(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """[columns]: the sums. Overwrites 32 rows of terms."""
        out = torch.sum(self._first, 0) if out is None else torch.sum(self._first, 0, out=out)
        for spare, rows in self._rest:
            spare.copy_(out)
            torch.sum(rows, 0, out=out)
        return out


def total(terms: torch.Tensor) -> torch.Tensor:
    """[columns]: the sum of each column of `terms`, in the order of `OrderedSum`."""
    buffer = OrderedSum(terms)
    buffer.values.copy_(terms)
    return buffer.total()


def signed_absmax(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The value of the largest magnitude along `dim` of a matrix: the first on a tie, never -0, NaN where one is
    NaN."""
    high, low = values.amax(dim), values.amin(dim)
    found = torch.where(high >= -low, high, low).add_(0.0)
    tied = ((high == -low) & (high > 0)).nonzero().squeeze(1)
    if tied.numel():
        some = values.index_select(1 - dim, tied)
        first = (some.abs() == high[tied].unsqueeze(dim)).to(torch.uint8).argmax(dim, keepdim=True)
        found[tied] = some.gather(dim, first).squeeze(dim)
    return found


def exact_quotient(numerator: float | torch.Tensor, divisor: float | torch.Tensor) -> torch.Tensor:
    """The correctly rounded quotient on every device: with a Python number, PyTorch multiplies by a reciprocal on
    some."""
    like = numerator if isinstance(numerator, torch.Tensor) else divisor
    assert isinstance(like, torch.Tensor)
    sides = [x if isinstance(x, torch.Tensor) else like.new_full((), x) for x in (numerator, divisor)]
    return sides[0] / sides[1]


def nearest_codes(
    columns: torch.Tensor, step: torch.Tensor, kind: GgmlType, minimum: torch.Tensor | None = None
) -> torch.Tensor:
    """The nearest code 0 .. 2**bits - 1 of each weight, float32 [group, columns].

    Args:
        columns: the weights, float32 [group, columns].
        step: float32 [columns]; where it is zero the codes are arbitrary.
        minimum: float32 [columns], subtracted by readers, not negative.
    """
    shifted = columns / step if minimum is None else (columns + minimum).div_(step)
    return shifted.round_().clamp_(-kind.zero, kind.codes - 1 - kind.zero).add_(kind.zero)


class GgmlBlockWriter:
    """A `GgmlBlocks`, filled chunk by chunk through views with a row for each block."""

    def __init__(self, shape: tuple[int, int], kind: GgmlType, device: torch.device) -> None:
        self._kind, self._blocks = kind, GgmlBlocks.empty(kind, *shape, device)
        by_block = lambda t: None if t is None else t.view(-1, t.shape[1] * kind.block // shape[1])  # noqa: E731
        self._codes, self._d = self._blocks.codes.view(-1, kind.block), self._blocks.d.view(-1, 1)
        self._scales, self._dmin, self._mins = map(
            by_block, (self._blocks.scales, self._blocks.dmin, self._blocks.mins)
        )

    def put_rows(self, where: slice, codes: torch.Tensor) -> None:
        """Store codes of blocks, [some, block] of any non-negative numbers, truncated and clamped to the last code."""
        self._store(self._codes[where], codes).clamp_(max=self._kind.codes - 1)

    def put_signed_rows(self, where: slice, codes: torch.Tensor) -> None:
        """Store 8-bit codes minus 128, float32 [some, block], truncated."""
        target = self._codes[where]
        target.view(torch.int8).copy_(codes)
        target.bitwise_xor_(0x80)

    def put_columns(self, where: slice, codes: torch.Tensor) -> None:
        """Store codes in the layout of `group_columns`, float32 [group, columns] of integers in range."""
        target = self._codes[where].view(-1, self._kind.group)
        self._store(target, codes.t()[: target.shape[0]].contiguous())

    def _store(self, target: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        # PyTorch converts floats to int8 four times as fast as to uint8.
        whole = target if self._kind.bits > 7 else target.view(torch.int8)
        whole.copy_(codes)
        return target

    def put_numbers(
        self, where: slice, d: torch.Tensor, scales: torch.Tensor | None = None, dmin: torch.Tensor | None = None,
        mins: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Store d and dmin [some] as float16; scales and mins [some, groups of a block], integers in any dtype."""
        self._d[where] = d.unsqueeze(1)
        if self._scales is not None and scales is not None:
            self._scales[where] = scales.to(torch.int8)
        if self._dmin is not None and dmin is not None:
            self._dmin[where] = dmin.unsqueeze(1)
        if self._mins is not None and mins is not None:
            self._mins[where] = mins.to(torch.uint8)

    def blocks(self) -> GgmlBlocks:
        """The blocks. Raises NumericsError when a d or dmin is Inf or NaN."""
        name = self._kind.name
        for half in (self._d, self._dmin):
            if half is None or bool(half.isfinite().all()):
                continue
            if bool(half.isnan().any()):
                raise NumericsError(f"the weights hold NaN or Inf, which {name} cannot store")
            raise NumericsError(f"the weights are too large for {name}: a block's scale exceeds float16's 65504")
        return self._blocks
