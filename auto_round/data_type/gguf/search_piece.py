"""Some blocks under search: their weights, how much each counts, and the weighted error of a step and a minimum."""

from __future__ import annotations

from typing import NamedTuple

import torch

from auto_round.data_type.gguf.rounding import code_limits, inverse_of, round_codes
from auto_round.data_type.gguf.types import GgmlType


def fold(values: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, whose size is a power of two; `values` is overwritten, and the result a view.

    By halves, because the order in which `torch.sum` adds depends on where a value lies and on the number of threads,
    and a search that compares sums would then find something else now and then.
    """
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = torch.add(values[:half], values[half:], out=values[:half])
    return values[0]


class Sums(NamedTuple):
    """Of the codes q of a group, [g, B] each: sum h q, sum h q^2, sum h q x."""

    q: torch.Tensor
    qq: torch.Tensor
    qx: torch.Tensor


class Piece:
    """Blocks side by side. A sum over a group is then a sum of long rows, which vector units do best.

    Args:
        x: weights, float32 [n, g, B]: n weights in a group, g groups in a block, B blocks.
        h: how much each weight counts, like `x`, or [n, g, 1] for all blocks.
        kind: the type. Codes are taken less their zero here: `low` to `high`.
    """

    def __init__(self, x: torch.Tensor, h: torch.Tensor, kind: GgmlType) -> None:
        self.x, self.h, self.kind = x, h, kind
        self.low, self.high = code_limits(kind)
        self.hx = h * x
        self._t, self._q = torch.empty_like(x), torch.empty_like(x)
        self.sum_h, self.sum_hx = (fold(self._t.copy_(part)).clone() for part in (h.expand_as(x), self.hx))
        self.sum_hxx = fold(torch.mul(self.hx, x, out=self._t)).clone()

    def _round(self, step: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """Weights in steps, in `_t`, and their codes in `_q`; returns the latter."""
        inverse = inverse_of(step)
        if minimum is None:
            torch.mul(self.x, inverse, out=self._t)
        else:
            torch.sub(self.x, minimum, out=self._t).mul_(inverse)
        return torch.round(self._t, out=self._q).clamp_(self.low, self.high)

    def error(self, step: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
        """[g, B]: sum over the group of h (step q + minimum - x)^2 at the nearest codes.

        Args:
            step, minimum: [g, B]; steps of either sign, or zero.
        """
        wrong = self._round(step, minimum).sub_(self._t)
        found = fold(torch.mul(wrong, wrong, out=self._t).mul_(self.h)) * step * step
        flat = self.sum_hxx
        if minimum is not None:
            flat = flat + minimum * (minimum * self.sum_h - 2 * self.sum_hx)
        return torch.where(step == 0, flat, found)

    def sums(self, step: torch.Tensor, minimum: torch.Tensor | None = None) -> Sums:
        """Of the nearest codes."""
        q = self._round(step, minimum)
        qx = fold(torch.mul(q, self.hx, out=self._t)).clone()
        weighted = torch.mul(q, self.h, out=self._t)
        qq = fold(q.mul_(weighted)).clone()
        return Sums(fold(weighted).clone(), qq, qx)

    def codes(self, step: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 like `x`: stored codes, the nearest ones, by the very formula of `assign_codes`."""
        found = round_codes(self.x, inverse_of(step), minimum, None, (self.low, self.high))
        return found.add_(self.kind.zero).to(torch.uint8)
