"""Observe inputs of linear layers: second moments, min/max, and Hessians X^T X.

Forward hooks collect them while a block runs. Second moments (sum of x**2 per channel) are the importance of a
channel; min/max gives static activation scales. The Hessian A = sum x x' over tokens has importance on its
diagonal; its other entries say what rounding one weight means for the others: with D the change of a layer's
weight, tr(D A D') is the summed squared error of its outputs. A matrix of all channel pairs would be larger
than a layer with wide inputs, so channels are split into bands of at most 4096 (fewer if a block has many
layers); pairs across bands are dropped.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from auto_round.errors import NumericsError
from auto_round.modeling.blocks import in_features

# Rows are added up in pieces of fixed size: memory stays small, and the result does not depend on the thread count.
_CHUNK_ROWS = 1024


class SecondMomentObserver(dict[str, torch.Tensor]):
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
            self._found = self._sum_squares(inputs.detach())
            self._last = weakref.ref(inputs)
        for part in self._found[0]:
            total += part
        self.tokens[name] = self.tokens.get(name, 0) + self._found[1]

    def _sum_squares(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        """Sums of x**2 over pieces of the counted rows, and their number."""
        if self.mask is not None and rows.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        found = [
            part.to(torch.float32).square_().sum(dim=0) if part.dtype != torch.float32 else part.square().sum(dim=0)
            for part in rows.split(_CHUNK_ROWS)
        ]
        return found, rows.shape[0]

    def check(self) -> None:
        """Raise NumericsError naming the first layer whose inputs held NaN or Inf."""
        for name, total in self.items():
            if not bool(torch.isfinite(total).all()):
                raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")


@contextmanager
def observe_second_moments(block: nn.Module, names: Iterable[str]) -> Iterator[SecondMomentObserver]:
    """Sum x**2 over tokens for the inputs of the linear layers `names` (relative to `block`) that run meanwhile.

    Yields a mapping {name: float32 [in]} that grows with every run; layers that never ran (experts without tokens) have
    zeros. Set its `mask` before a run to leave padded positions out. Hooks are removed at the end, also after an error.
    """
    moments = SecondMomentObserver()

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


# The smallest and largest input of linear layers over the calibration data, for static activation scales.

_EXPERT = re.compile(r"\bexperts\.\d+\.")


class MinMaxObserver(dict[str, tuple[torch.Tensor, torch.Tensor]]):
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
def observe_min_max(block: nn.Module, names: Iterable[str]) -> Iterator[MinMaxObserver]:
    """Watch the inputs of the linear layers `names` (relative to `block`) that run meanwhile.

    Set `mask` before a run to leave padded positions out. Hooks are removed at the end, also after an error.
    """
    extremes = MinMaxObserver()
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


# Products of input channels: the matrix A = sum x x' over tokens, gathered while a block runs.
#
# With D the change of a layer's weight, tr(D A D') is the summed squared error of its outputs. What the rounding of one
# weight means for the others is in the entries beside A's diagonal, which alone is the importance (`statistics.py`).
#
# A matrix of every pair of channels would be larger than the layer where inputs are wide, so channels are taken in
# bands of at most 4096, fewer if a block has many layers, and pairs of channels in different bands are left out.

_BAND_WIDTHS = (4096, 2048, 1024, 512, 256)
_MAX_NUMEL = 1 << 28  # numbers in all matrices of a block: 1 GiB
_PRODUCT_ROWS = 1024  # tokens in one product
_TILE = 256
_MAX_STRIDE = 4  # of many tokens, one in four is as good as all; as many as there are channels at least


def band_width(widths: Sequence[int]) -> int:
    """The widest band for which the matrices of layers of these input widths stay below 1 GiB; 256 at least."""
    fits = (band for band in _BAND_WIDTHS if sum(width * min(width, band) for width in widths) <= _MAX_NUMEL)
    return next(fits, _BAND_WIDTHS[-1])


def hessian_bytes(widths: Sequence[int]) -> int:
    """Bytes of those matrices, at most."""
    band = band_width(widths)
    return sum(4 * width * min(width, band) for width in widths)


class InputHessian:
    """Sums of x x' by layer name, ready after `close`. Layers that are fed the very same tensor share one sum.

    Attributes:
        mask: bool [B, T] for the next run of the block: which positions count; None counts all. An input of another
            shape (an expert sees its own tokens only) counts whole.
    """

    every_token = False

    def __init__(self, band: int = _BAND_WIDTHS[0], passes: int = 1) -> None:
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
        rows = rows[:: min(_MAX_STRIDE, max(1, self.passes * rows.shape[0] // width))]
        if name not in self._sums:
            sizes = [min(self.band, width - start) for start in range(0, width, self.band)]
            self._sums[name] = [torch.zeros(size, size, device=rows.device) for size in sizes]
        for part in rows.split(_PRODUCT_ROWS):
            columns = part.float()
            for index, total in enumerate(self._sums[name]):
                start = index * self.band
                _add_upper(total, columns[:, start : start + total.shape[0]])

    def tokens(self, name: str) -> int:
        """Rows of inputs that layer `name` had, masked ones included."""
        return self._seen.get(name, 0)

    def of(self, name: str, least: int = 1) -> list[torch.Tensor] | None:
        """A of a layer: float32 [n, n] for each band of channels, in order. None where fewer than `least` tokens
        reached it, or where it shared its inputs in some runs only. Layers of the same inputs get the same tensors."""
        leader = self._leaders.get(name)
        if leader is None or self._mixed & {name, leader} or not least <= self._seen[name] == self._seen[leader]:
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
def observe_hessians(block: nn.Module, names: Iterable[str], passes: int = 1) -> Iterator[InputHessian]:
    """Gather the products of the inputs of the linear layers `names` (relative to `block`), which will run `passes`
    times meanwhile.

    They are ready when it ends. Hooks are removed then, also after an error.
    """
    modules = {name: block.get_submodule(name) for name in names}
    products = InputHessian(band_width([in_features(module) for module in modules.values()]), passes)

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: products.add(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield products
    finally:
        products.close()
        for handle in handles:
            handle.remove()
