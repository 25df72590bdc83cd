"""Scale search for small floats, weighted by how much each input matters.

A scale can only be one of few values (a power of two, an e4m3, a bfloat16), so the stored neighbours of the plain scale
are tried as they are, and each tile takes the one with the least `sum h (w - W)^2`. In float32, in chunks that stay in
cache.
"""

from __future__ import annotations

from itertools import groupby

import torch

from auto_round.data_type.elements import Element
from auto_round.data_type.float_family import FloatFamily, factor_of
from auto_round.data_type.tiles import as_tiles, tile_largest, tile_rows, tile_shape, tile_sum
from auto_round.schemes import GroupSize

_CHUNK = 1 << 16  # weights tried at a time: the buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 24


@torch.no_grad()
def search_scales(
    weight: torch.Tensor, family: FloatFamily, group_size: GroupSize, importance: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The stored scale of each tile with the least importance-weighted squared error among the candidates.

    Args:
        weight: [out, in], any float dtype; searched in float32.
        group_size: see `QuantizationScheme`.
        importance: [in], >= 0: the second moment of each input channel; None weighs all alike.
        global_scale: float32 scalar, for types that have one.

    Returns:
        float32 [R, C] (see `data_type.tiles`). Never worse, in this error, than the type's own rule.
    """
    tiles = as_tiles(weight, group_size)
    shares = _shares(importance, weight, group_size)
    pieces = tile_rows(tiles, _CHUNK if weight.device.type == "cpu" else _GPU_CHUNK)
    found = []
    for rows, parts in groupby(pieces, key=lambda piece: (piece[0].start, piece[0].stop)):
        inner = [tiles[slice(*rows), part[1]].float() for part in parts]
        largest = torch.stack([tile_largest(part) for part in inner]).amax(0)
        best = family.rule.scale(largest, global_scale)
        least = _error(inner, best, global_scale, shares, family.element)
        for scale in family.rule.candidates(best.clone()):
            error = _error(inner, scale, global_scale, shares, family.element)
            better = error < least
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
        found.append(best)
    scales = torch.cat(found)
    return scales.view(scales.shape[0], scales.shape[2])


def _error(
    parts: list[torch.Tensor], scale: torch.Tensor, global_scale: torch.Tensor | None, shares: torch.Tensor,
    element: Element,
) -> torch.Tensor:  # fmt: skip
    """[R, 1, C, 1]: the weighted squared error of tiles given in pieces of some rows each."""
    factor = factor_of(scale, global_scale)
    total = torch.zeros_like(scale)
    for part in parts:
        difference = element.nearest(part / factor).mul_(factor).sub_(part)
        total += tile_sum(difference.mul_(difference).mul_(shares))
    return total


def _shares(importance: torch.Tensor | None, weight: torch.Tensor, group_size: GroupSize) -> torch.Tensor:
    """[1, 1, C, N] float32 of mean one. A channel that was never active in the calibration data still gets a small
    share, so that its weights are not rounded at random."""
    _, _, c, n = tile_shape((weight.shape[0], weight.shape[1]), group_size)
    ones = torch.ones(1, 1, c, n, device=weight.device)
    if importance is None:
        return ones
    given = importance.to(weight.device, torch.float32)
    mean = given.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return ones
    padded = torch.nn.functional.pad(given / mean + 1e-4, (0, c * n - given.shape[0]))
    return padded.view(1, 1, c, n)
