"""Products of input channels: the matrix A = sum x x' over tokens, gathered while a block runs.

With D the change of a layer's weight, tr(D A D') is the summed squared error of its outputs. What the rounding of one
weight means for the others is in the entries beside A's diagonal, which alone is the importance (`statistics.py`).

A matrix of every pair of channels would be larger than the layer where inputs are wide, so channels are taken in bands
of at most 4096, fewer if a block has many layers, and pairs of channels in different bands are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from auto_round.modeling.blocks import in_features

_BANDS = (4096, 2048, 1024, 512, 256)
_MOST = 1 << 28  # numbers in all matrices of a block: 1 GiB
_ROWS = 1024  # tokens in one product
_TILE = 256
_EVERY = 4  # of many tokens, one in four is as good as all; as many as there are channels at least


def band_width(widths: Sequence[int]) -> int:
    """The widest band for which the matrices of layers of these input widths stay below 1 GiB; 256 at least."""
    fits = (band for band in _BANDS if sum(width * min(width, band) for width in widths) <= _MOST)
    return next(fits, _BANDS[-1])


def products_bytes(widths: Sequence[int]) -> int:
    """Bytes of those matrices, at most."""
    band = band_width(widths)
    return sum(4 * width * min(width, band) for width in widths)


class InputProducts:
    """Sums of x x' by layer name, ready after `close`. Layers that are fed the very same tensor share one sum.

    Attributes:
        mask: bool [B, T] for the next run of the block: which positions count; None counts all. An input of another
            shape (an expert sees its own tokens only) counts whole.
    """

    every_token = False

    def __init__(self, band: int = _BANDS[0], passes: int = 1) -> None:
        """`passes`: how often a layer will be fed, each time about as much."""
        self.band, self.passes = band, passes
        self.mask: torch.Tensor | None = None
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._leaders: dict[str, str] = {}
        self._seen: dict[str, int] = {}
        self._mixed: set[str] = set()
        self._last: tuple[str, torch.Tensor] | None = None

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add what layer `name` is fed, [..., in]."""
        self._seen[name] = self._seen.get(name, 0) + inputs.shape[:-1].numel()
        shared = self._last is not None and self._last[1] is inputs
        if not shared:
            self._last = name, inputs
        assert self._last is not None
        if self._leaders.setdefault(name, self._last[0]) != self._last[0]:
            self._mixed.add(name)
        if shared or name in self._mixed:
            return
        rows = inputs.detach()
        if self.mask is not None and rows.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        width = rows.shape[1]
        rows = rows[:: min(_EVERY, max(1, self.passes * rows.shape[0] // width))]
        if name not in self._sums:
            sizes = [min(self.band, width - start) for start in range(0, width, self.band)]
            self._sums[name] = [torch.zeros(size, size, device=rows.device) for size in sizes]
        for part in rows.split(_ROWS):
            columns = part.float()
            for index, total in enumerate(self._sums[name]):
                start = index * self.band
                _add_upper(total, columns[:, start : start + total.shape[0]])

    def of(self, name: str) -> list[torch.Tensor] | None:
        """A of a layer: float32 [n, n] for each band of channels, in order. None where no token reached it, or where
        it shared its inputs in some runs only. Layers of the same inputs get the same tensors."""
        leader = self._leaders.get(name)
        if leader is None or self._mixed & {name, leader} or not 0 < self._seen[name] == self._seen[leader]:
            return None
        return self._sums[leader]

    def close(self) -> None:
        """Finish the sums; nothing can be added afterwards."""
        self._last = None
        for total in (total for bands in self._sums.values() for total in bands):
            _mirror(total)


def _add_upper(total: torch.Tensor, columns: torch.Tensor) -> None:
    """Add x x' of all rows to the upper triangle, tile by tile; what is below the diagonal stays unfinished."""
    for start in range(0, total.shape[0], _TILE):
        stop = min(start + _TILE, total.shape[0])
        total[:stop, start:stop].addmm_(columns[:, :stop].t(), columns[:, start:stop])


def _mirror(total: torch.Tensor) -> None:
    """Copy the upper triangle to the lower one, tile by tile."""
    for start in range(0, total.shape[0], _TILE):
        rows = slice(start, start + _TILE)
        total[rows, :start] = total[:start, rows].t()
        total[rows, rows] = total[rows, rows].triu() + total[rows, rows].triu(1).t()


@contextmanager
def input_products(block: nn.Module, names: Iterable[str], passes: int = 1) -> Iterator[InputProducts]:
    """Gather the products of the inputs of the linear layers `names` (relative to `block`), which will run `passes`
    times meanwhile.

    They are ready when it ends. Hooks are removed then, also after an error.
    """
    modules = {name: block.get_submodule(name) for name in names}
    products = InputProducts(band_width([in_features(module) for module in modules.values()]), passes)

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: products.add(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield products
    finally:
        products.close()
        for handle in handles:
            handle.remove()
