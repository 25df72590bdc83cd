"""Blocks put together piece by piece."""

from __future__ import annotations

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.types import GgmlType
from auto_round.errors import NumericsError


class BlockStore:
    """The tensors of a GgmlBlocks, filled piece by piece."""

    def __init__(self, shape: tuple[int, int], kind: GgmlType, device: torch.device) -> None:
        blocks, groups = shape[0] * shape[1] // kind.block, kind.block // kind.group
        empty = lambda n, dtype: torch.empty(blocks, n, dtype=dtype, device=device)  # noqa: E731
        self._shape, self._kind = shape, kind
        self._codes, self._d = empty(kind.block, torch.uint8), empty(1, torch.float16)
        self._scales = empty(groups, torch.int8) if kind.is_k else None
        self._dmin = empty(1, torch.float16) if kind.has_min else None
        self._mins = empty(groups, torch.uint8) if kind.is_k and kind.has_min else None

    def put_rows(self, where: slice, codes: torch.Tensor) -> None:
        """Codes of some blocks, [some, block] of any numbers that are not negative: without their fractions, and the
        last code at most."""
        self._store(self._codes[where], codes).clamp_(max=self._kind.codes - 1)

    def put_signed_rows(self, where: slice, codes: torch.Tensor) -> None:
        """Codes of 8 bits, less 128: float32 [some, block], without their fractions."""
        target = self._codes[where]
        target.view(torch.int8).copy_(codes)
        target.bitwise_xor_(0x80)

    def put_columns(self, where: slice, codes: torch.Tensor) -> None:
        """Codes of some blocks, float32 [group, columns] as `group_columns` lays weights out: integers in range."""
        target = self._codes[where].view(-1, self._kind.group)
        self._store(target, codes.t()[: target.shape[0]].contiguous())

    def _store(self, target: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        # PyTorch turns floats to int8 four times as fast as to uint8.
        whole = target if self._kind.bits > 7 else target.view(torch.int8)
        whole.copy_(codes)
        return target

    def put_numbers(
        self, where: slice, d: torch.Tensor, scales: torch.Tensor | None = None, dmin: torch.Tensor | None = None,
        mins: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """d and dmin [some], stored as float16; scales and mins [some, groups of a block], integers in any dtype."""
        self._d[where] = d.unsqueeze(1)
        if self._scales is not None and scales is not None:
            self._scales[where] = scales.to(torch.int8)
        if self._dmin is not None and dmin is not None:
            self._dmin[where] = dmin.unsqueeze(1)
        if self._mins is not None and mins is not None:
            self._mins[where] = mins.to(torch.uint8)

    def blocks(self) -> GgmlBlocks:
        """What was put in. Raises NumericsError when a d or dmin is Inf or NaN."""
        name = self._kind.name
        for half in (self._d, self._dmin):
            if half is None or bool(half.isfinite().all()):
                continue
            if bool(half.isnan().any()):
                raise NumericsError(f"the weights hold NaN or Inf, which {name} cannot store")
            raise NumericsError(
                f"the weights are too large for {name}: the factor of a block is beyond float16's 65504"
            )
        view = lambda t: None if t is None else t.view(self._shape[0], -1)  # noqa: E731
        codes, d = self._codes.view(self._shape), self._d.view(self._shape[0], -1)
        return GgmlBlocks(self._kind, codes, d, view(self._scales), view(self._dmin), view(self._mins))
