"""Where the rows of a source tensor go in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Placement:
    """One place that a source tensor, or some of its rows, goes to.

    The steps are, in this order: `edit`, `rows`, then `slot` or `at_row`. Without `edit` a weight can be quantized as
    it is and its packed rows placed; with `edit` other numbers are quantized than the source holds.

    Attributes:
        tensor: name in the file, such as "blk.0.attn_q.weight".
        rows: int64 [n], the source's rows in the target's order; None for all of them as they are.
        slot: index in the target's leading dimension, where experts or heads are stacked.
        at_row: where the rows start in the target, when several sources are joined by rows.
        edit: changes the values or the layout of a dense tensor.
    """

    tensor: str
    rows: torch.Tensor | None = None
    slot: int | None = None
    at_row: int = 0
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None

    def cut(self, source: torch.Tensor) -> torch.Tensor:
        """The part of the target that comes from `source`: after `edit` and `rows`; a view where possible."""
        found = source if self.edit is None else self.edit(source)
        return found if self.rows is None else found[self.rows.to(found.device)]

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `cut` for a source of this shape, without any data."""
        if self.edit is not None:
            source = tuple(self.edit(torch.empty(source, device="meta")).shape)
        return source if self.rows is None else (int(self.rows.numel()), *source[1:])

    def of_transposed(self) -> Placement:
        """The same place for a source that is given as [in, out], as Conv1D modules store their weights."""
        edit = self.edit
        return replace(self, edit=_transposed if edit is None else lambda weight: edit(_transposed(weight)))


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.t()
