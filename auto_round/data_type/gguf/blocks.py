"""What a tensor of a ggml type holds, taken apart: codes, integer scales and minima, and the float16 factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.data_type.gguf.types import GgmlType


@dataclass(frozen=True, eq=False)
class GgmlBlocks:
    """A matrix in blocks, as stored.

    Attributes:
        kind: the type.
        codes: uint8 [out, in], 0 .. 2**bits - 1.
        d: float16 [out, in/block], the factor of the scales (of the codes, where a block has no sub-blocks).
        scales: int8 [out, in/group] for types with sub-blocks: 0 .. 2**scale_bits - 1, or signed; None otherwise.
        dmin: float16 [out, in/block], the factor of the minima (the minimum itself, without sub-blocks), or None.
        mins: uint8 [out, in/group], or None.
    """

    kind: GgmlType
    codes: torch.Tensor
    d: torch.Tensor
    scales: torch.Tensor | None = None
    dmin: torch.Tensor | None = None
    mins: torch.Tensor | None = None

    def step(self) -> torch.Tensor:
        """float32 [out, in/group]: the distance of two codes, the product rounded as readers round it."""
        d = self.d.float()
        if self.scales is None:
            return d
        return _over_groups(d, self.kind) * self.scales.float()

    def minimum(self) -> torch.Tensor | None:
        """float32 [out, in/group], added to every weight of the group (negative in K types); None without."""
        if self.dmin is None:
            return None
        dmin = self.dmin.float()
        if self.mins is not None:
            dmin = _over_groups(dmin, self.kind) * self.mins.float()
        return dmin * self.kind.min_sign

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in], bit for bit as ggml computes it: step * (code - zero), then the minimum."""
        out, columns = self.codes.shape
        values = self.codes.float().sub_(self.kind.zero).view(out, -1, self.kind.group)
        values.mul_(self.step().unsqueeze(-1))
        minimum = self.minimum()
        if minimum is not None:
            values.add_(minimum.unsqueeze(-1))
        return values.view(out, columns)

    def rows(self, wanted: slice) -> GgmlBlocks:
        """Some of the rows."""
        part = lambda t: None if t is None else t[wanted]  # noqa: E731
        return GgmlBlocks(
            self.kind, self.codes[wanted], self.d[wanted], part(self.scales), part(self.dmin), part(self.mins)
        )

    def to(self, device: torch.device | str) -> GgmlBlocks:
        """The same on another device."""
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        return GgmlBlocks(
            self.kind, self.codes.to(device), self.d.to(device), move(self.scales), move(self.dmin), move(self.mins)
        )


def _over_groups(factor: torch.Tensor, kind: GgmlType) -> torch.Tensor:
    return factor.repeat_interleave(kind.block // kind.group, dim=1)
