"""Arithmetic on groups that lie side by side, `[group, columns]` of `pieces.group_columns`, exact where it matters.

The codecs follow other programs' float32 arithmetic operation by operation, so that the same bytes come out. Here is
what PyTorch would do a little differently if asked plainly: the order of sums, quotients, ties.
"""

from __future__ import annotations

import torch

from auto_round.data_type.gguf.types import GgmlType

_ROWS_IN_ORDER = 16


class Terms:
    """A buffer for what is summed over each column, [16 or 32, columns].

    Sums run from the first row to the last as a plain loop adds, which is how other programs get the same bytes:
    PyTorch's sum over the first dimension adds 16 rows in order, and what is left of them last.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.values = torch.empty_like(like)
        self._first = self.values[:_ROWS_IN_ORDER]
        starts = range(_ROWS_IN_ORDER, like.shape[0], _ROWS_IN_ORDER)
        self._rest = [(self.values[s - 1], self.values[s - 1 : s + _ROWS_IN_ORDER]) for s in starts]

    def total(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """[columns]: the sums. Overwrites the terms where there are 32 rows."""
        out = torch.sum(self._first, 0) if out is None else torch.sum(self._first, 0, out=out)
        for spare, rows in self._rest:
            spare.copy_(out)
            torch.sum(rows, 0, out=out)
        return out


def total(terms: torch.Tensor) -> torch.Tensor:
    """[columns]: the sum of each column of `terms`, in the order of `Terms`."""
    buffer = Terms(terms)
    buffer.values.copy_(terms)
    return buffer.total()


def peak(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The value of the largest magnitude along `dim` of a matrix, the first on a tie; zero without a sign; NaN where
    there is one."""
    high, low = values.amax(dim), values.amin(dim)
    found = torch.where(high >= -low, high, low).add_(0.0)
    tied = ((high == -low) & (high > 0)).nonzero().squeeze(1)
    if tied.numel():
        some = values.index_select(1 - dim, tied)
        first = (some.abs() == high[tied].unsqueeze(dim)).to(torch.uint8).argmax(dim, keepdim=True)
        found[tied] = some.gather(dim, first).squeeze(dim)
    return found


def over(numerator: float | torch.Tensor, divisor: float | torch.Tensor) -> torch.Tensor:
    """The correctly rounded quotient of a number and a tensor, on every device: given a Python number, PyTorch
    multiplies by a reciprocal on some."""
    like = numerator if isinstance(numerator, torch.Tensor) else divisor
    assert isinstance(like, torch.Tensor)
    sides = [x if isinstance(x, torch.Tensor) else like.new_full((), x) for x in (numerator, divisor)]
    return sides[0] / sides[1]


def nearest_codes(
    columns: torch.Tensor, step: torch.Tensor, kind: GgmlType, minimum: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [group, columns] of codes 0 .. 2**bits - 1: the nearest for each weight, given the stored numbers.

    Args:
        columns: the weights, float32 [group, columns].
        step: float32 [columns]; where it is zero every code gives the same weight, and what is found means nothing.
        minimum: float32 [columns] of what readers take off, so not negative.
    """
    shifted = columns / step if minimum is None else (columns + minimum).div_(step)
    return shifted.round_().clamp_(-kind.zero, kind.codes - 1 - kind.zero).add_(kind.zero)
