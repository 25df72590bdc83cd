"""Statistics of the inputs of linear layers, gathered by hooks while a block runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from auto_round.errors import NumericsError
from auto_round.modeling.blocks import in_features

# Rows are added up in pieces of fixed size: memory stays small, and the result does not depend on the thread count.
_ROWS = 1024


class SecondMoments(dict[str, torch.Tensor]):
    """Sums of squares by layer name, float32 [in_features], and how many tokens went into each.

    Attributes:
        mask: bool [B, T] for the next run of the block: which positions count; None counts all. A layer whose input
            does not have the shape [B, T, in] (an expert sees its own tokens only) counts all its rows.
        tokens: number of rows summed, by layer name.
    """

    every_token = False

    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = None
        self.tokens: dict[str, int] = {}
        self._last: Callable[[], torch.Tensor | None] = lambda: None  # the inputs of before, as long as they live
        self._found: tuple[list[torch.Tensor], int] = [], 0

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add x**2 of all counted rows of `inputs` [..., in]."""
        total = self.get(name)
        if total is None:
            total = self[name] = torch.zeros(inputs.shape[-1], dtype=torch.float32, device=inputs.device)
        elif total.device != inputs.device:  # the layer's weight was nowhere when watching began
            total = self[name] = total.to(inputs.device)
        if self._last() is not inputs:  # layers that are fed the same follow each other
            self._found = self._squares(inputs.detach())
            self._last = weakref.ref(inputs)
        for part in self._found[0]:
            total += part
        self.tokens[name] = self.tokens.get(name, 0) + self._found[1]

    def _squares(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        """Sums of x**2 over pieces of the counted rows, and their number."""
        if self.mask is not None and rows.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        found = [
            part.to(torch.float32).square_().sum(dim=0) if part.dtype != torch.float32 else part.square().sum(dim=0)
            for part in rows.split(_ROWS)
        ]
        return found, rows.shape[0]

    def check(self) -> None:
        """Raise NumericsError naming the first layer whose inputs held NaN or Inf."""
        for name, total in self.items():
            if not bool(torch.isfinite(total).all()):
                raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")


@contextmanager
def input_second_moments(block: nn.Module, names: Iterable[str]) -> Iterator[SecondMoments]:
    """Sum x**2 over tokens for the inputs of the linear layers `names` (relative to `block`) that run meanwhile.

    Yields a mapping {name: float32 [in]} that grows with every run; layers that never ran (experts without tokens) have
    zeros. Set its `mask` before a run to leave padded positions out. Hooks are removed at the end, also after an error.
    """
    moments = SecondMoments()

    def hook(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            moments.add(name, args[0])

        return before

    handles = []
    try:
        for name in names:
            module = block.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook(name)))
            width = in_features(module)
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            where = "cpu" if weight.is_meta else weight.device
            moments[name] = torch.zeros(width, dtype=torch.float32, device=where)
            moments.tokens[name] = 0
        yield moments
    finally:
        for handle in handles:
            handle.remove()
