"""Layers of small floats under tuning: offsets, scale factors, and the quantized weights that follow from them.

With f the factor of a tile (its stored scale, over the global one where there is one), r = w / f and u how far apart
the element's values lie at r, a weight becomes W = f q, q = nearest(r + v u). An offset of one half reaches the next
value at any size. With G = dL/dW the straight-through gradients are, where q is not cut off,
    dL/dv = G f u            dL/df = sum over the tile of G (q - r)
and where it is dL/dv = 0 and dL/df = sum of G q (AutoRound, arXiv 2309.05516, section 3; the mask as in LSQ,
arXiv 1902.08153, equation 3). Scales are `start * factor`, rounded to what can be stored; that rounding passes straight
through too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.layer_codes import float_layer
from auto_round.algorithms.quantization.sign_round.layer_bank import (
    FACTOR_RANGE,
    LayerBank,
    Place,
    State,
    copied,
    joined,
    slices_of,
    stacked_weights,
)
from auto_round.data_type.elements import Element
from auto_round.data_type.float_family import FloatFamily, factor_of, shifted
from auto_round.data_type.tiles import as_tiles, tile_rows, tile_shape, tile_sum
from auto_round.quantized_layer import QuantizedLayer

Values = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Element], torch.Tensor]
Gradients = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Element, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


def float_values(tiles: torch.Tensor, factor: torch.Tensor, v: torch.Tensor, element: Element) -> torch.Tensor:
    """W, float32 [R, M, C, N], of the weight's tiles, factors [R, 1, C, 1] and offsets like `tiles`."""
    return element.nearest(shifted(tiles.float() / factor, v, element)).mul_(factor)


def float_gradients(
    tiles: torch.Tensor, factor: torch.Tensor, v: torch.Tensor, element: Element, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dL/dv like `tiles`, dL/df [R, 1, C, 1]) for `grad` = dL/dW, float32 like `tiles`."""
    ratio = tiles.float() / factor
    step = element.step(ratio)
    moved = ratio + v * step
    inside = (moved.abs() < element.saturation).float()
    slope = tile_sum((element.nearest(moved) - ratio * inside) * grad)
    return inside * step * grad * factor, slope


@lru_cache(maxsize=1)
def compiled_floats() -> tuple[Values, Gradients]:
    """Both functions compiled by PyTorch into one pass over the weights each, for any shape."""
    return torch.compile(float_values, dynamic=True), torch.compile(float_gradients, dynamic=True)


class FloatBank(LayerBank):
    """Offsets and scale factors of some layers, and the quantized weights that follow from them.

    Args:
        tasks: layers with equal in_features and scheme; `task.weight` is [out, in]. Only one when scales are per
            tensor.
        family: their data type.
        starts: stored scales where tuning starts and global scales or None, one of each a layer.
        compute_dtype: dtype of the matrix products.
        tune_scale: tune the factor on the scale as well.
        adam, momentum: how learnables move.
        compile_step: compile the elementwise passes.
    """

    def __init__(
        self, tasks: Sequence[LayerTask], family: FloatFamily,
        starts: Sequence[tuple[torch.Tensor, torch.Tensor | None]], compute_dtype: torch.dtype,
        tune_scale: bool = True, adam: bool = False, momentum: float = 0.0, compile_step: bool = False,
    ) -> None:  # fmt: skip
        self._values, self._gradients = compiled_floats() if compile_step else (float_values, float_gradients)
        self.family, self.tune_scale = family, tune_scale
        size = tasks[0].scheme.group_size
        shapes = [tile_shape((task.weight.shape[0], task.weight.shape[1]), size) for task in tasks]
        self.slices = slices_of([shape[0] for shape in shapes])
        _, m, c, n = shapes[0]
        height = self.slices[-1].stop * m
        super().__init__(tasks, compute_dtype, [part.start * m for part in self.slices], (height, c * n))
        self._globals = [given for _, given in starts]
        self.tiles = joined([as_tiles(weight, size) for weight in stacked_weights(tasks, compute_dtype)])
        self.start_scale = torch.cat([scale.reshape(-1, 1, c, 1) for scale, _ in starts]).to(self.tiles.device)
        self.scale = self.start_scale
        self.v = torch.zeros_like(self.tiles, dtype=torch.float32)
        self.factor = torch.ones_like(self.scale)
        self._make_rules(2, adam, momentum)
        self.refresh()

    def _factors(self, scale: torch.Tensor) -> torch.Tensor:
        """What elements are multiplied with, layer by layer."""
        if not self.family.has_global_scale:
            return scale
        parts = zip(self.slices, self._globals, strict=True)
        return torch.cat([factor_of(scale[rows], None if g is None else g.to(scale)) for rows, g in parts])

    @torch.no_grad()
    def refresh(self) -> None:
        factors = self._factors(self.scale)
        quantized = self.quantized.view(self.tiles.shape)
        for rows, inner in tile_rows(self.tiles, self._chunk):
            part = self._values(self.tiles[rows, inner], factors[rows], self.v[rows, inner], self.family.element)
            quantized[rows, inner] = part

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        if not self._take_gradient():
            return
        factors = self._factors(self.scale)
        grad = self.gradient.view(self.tiles.shape)
        slopes = torch.zeros_like(self.factor)

        def gradients() -> Iterator[tuple[Place, torch.Tensor]]:
            for rows, inner in tile_rows(self.tiles, self._chunk):
                tiles, v, own = (part[rows, inner] for part in (self.tiles, self.v, grad))
                part, slope = self._gradients(tiles, factors[rows], v, self.family.element, own.float())
                slopes[rows] += slope
                yield (rows, inner), part

        self._move_offsets(gradients(), lr)
        if self.tune_scale:
            self.rules[1].apply(self.factor, slopes.mul_(self._factors(self.start_scale)), scale_lr)
            self.factor.clamp_(*FACTOR_RANGE)
            self.scale = self.family.rule.store(self.start_scale * self.factor)
        self.refresh()

    @torch.no_grad()
    def restart(self) -> None:
        self.v.zero_()
        self.factor.fill_(1.0)
        self.scale = self.start_scale
        self.refresh()

    def snapshot(self, into: State | None = None) -> State:
        return copied((self.v, self.factor, self.scale), into)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        self.v, self.factor, self.scale = state
        self.refresh()

    @torch.no_grad()
    def finish(self) -> list[QuantizedLayer]:
        return [
            float_layer(task, self.family, self.scale[rows], self.v[rows], given)
            for task, rows, given in zip(self.tasks, self.slices, self._globals, strict=True)
        ]
