"""The smallest and largest input of linear layers over the calibration data, for static activation scales."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from auto_round.errors import NumericsError

_EXPERT = re.compile(r"\bexperts\.\d+\.")


class InputExtremes(dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """(minimum, maximum) by layer name, float32 scalars, at most and at least zero. A layer that never ran is absent.

    Attributes:
        mask: bool [B, T] for the next run of the block: which positions count; None counts all. Inputs of another shape
            than [B, T, in] (an expert's own tokens) count whole.
    """

    every_token = False

    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = None

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Take in all counted rows of `inputs` [..., in]."""
        rows = inputs.detach()
        if self.mask is not None and rows.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.to(rows.device)]
        if rows.numel() == 0:
            return
        low, high = torch.aminmax(rows)
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if name in self:
            low, high = torch.minimum(low, self[name][0]), torch.maximum(high, self[name][1])
        self[name] = (low, high)

    def of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's extremes. An expert that saw no token gets those of its siblings together, any other layer that
        never ran those of all layers.

        Raises:
            NumericsError: the inputs held NaN or Inf, or nothing ran at all.
        """
        found = [self[name]] if name in self else []
        if not found and _EXPERT.search(name):
            family = _EXPERT.sub("experts.*.", name)
            found = [pair for other, pair in self.items() if _EXPERT.sub("experts.*.", other) == family]
        found = found or list(self.values())
        if not found:
            raise NumericsError(f"layer {name!r}: no calibration token reached it, so it has no activation scale")
        low, high = torch.stack([p[0] for p in found]).min(), torch.stack([p[1] for p in found]).max()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")
        return low, high


@contextmanager
def input_extremes(block: nn.Module, names: Iterable[str]) -> Iterator[InputExtremes]:
    """Watch the inputs of the linear layers `names` (relative to `block`) that run meanwhile.

    Set `mask` before a run to leave padded positions out. Hooks are removed at the end, also after an error.
    """
    extremes = InputExtremes()
    handles = []
    try:
        for name in names:

            def before(_module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                extremes.add(name, args[0])

            handles.append(block.get_submodule(name).register_forward_pre_hook(before))
        yield extremes
    finally:
        for handle in handles:
            handle.remove()
