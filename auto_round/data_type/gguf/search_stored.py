"""The stored numbers of some blocks under search, as float32 that the stored types hold exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.search_factors import scale_limits, to_half
from auto_round.data_type.gguf.types import GgmlType


@dataclass(frozen=True)
class Stored:
    """Factors and integers of a piece.

    Attributes:
        d, dmin: [1, B]; dmin None without minima.
        scales, mins: [g, B]; ones where the type has no sub-blocks.
    """

    kind: GgmlType
    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None
    mins: torch.Tensor | None

    def grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The groups' steps and minima, [g, B], as readers compute them."""
        step = self.d * self.scales
        if self.dmin is None or self.mins is None:
            return step, None
        return step, self.dmin * self.mins * self.kind.min_sign

    def moved(self, move: tuple[float, float]) -> Stored:
        """Other values close by.

        Args:
            move: what is added to the integers of scale and minimum. Without sub-blocks, in parts of a step: how much
                wider the grid gets around its middle, and how far it is shifted.
        """
        kind = self.kind
        if kind.is_k:
            low, high = scale_limits(kind)
            mins = None if self.mins is None else (self.mins + move[1]).clamp_(0, high)
            return replace(self, scales=(self.scales + move[0]).clamp_(low, high), mins=mins)
        if self.dmin is None:
            return replace(self, d=to_half(self.d * (1 + move[0] / kind.zero)))
        return replace(
            self,
            d=to_half(self.d * (1 + move[0] / (kind.codes - 1))),
            dmin=to_half(self.dmin + self.d * (move[1] - move[0] / 2)),
        )

    def nothing(self) -> Stored:
        """All weights zero: by the groups' integers, or without sub-blocks by the factors."""
        empty = lambda t: None if t is None else torch.zeros_like(t)  # noqa: E731
        if self.kind.is_k:
            return replace(self, scales=torch.zeros_like(self.scales), mins=empty(self.mins))
        return replace(self, d=torch.zeros_like(self.d), dmin=empty(self.dmin))

    def where(self, better: torch.Tensor, other: Stored) -> Stored:
        """`other` where `better` ([g, B] or [1, B]) says so. Factors are taken from it only with [1, B]."""
        pick = lambda new, old: new if new is old else torch.where(better, new, old)  # noqa: E731
        dmin = None if self.dmin is None or other.dmin is None else pick(other.dmin, self.dmin)
        mins = None if self.mins is None or other.mins is None else pick(other.mins, self.mins)
        return Stored(self.kind, pick(other.d, self.d), pick(other.scales, self.scales), dmin, mins)

    def store(self, blocks: GgmlBlocks, rows: slice, cols: slice) -> None:
        """Write the numbers where they belong: B counts the blocks of those columns, and in each those of the rows."""
        pairs = ((self.d, blocks.d), (self.scales, blocks.scales), (self.dmin, blocks.dmin), (self.mins, blocks.mins))
        out, columns = blocks.codes.shape
        for value, target in pairs:
            if value is not None and target is not None:
                place = target.view(out, columns // self.kind.block, -1)[rows, cols]
                place.copy_(value.view(value.shape[0], place.shape[1], place.shape[0]).permute(2, 1, 0))
