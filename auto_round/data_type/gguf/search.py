"""Importance-weighted search of what a ggml type stores: integer scales and minima, their float16 factors, and codes.

What is minimised is `sum h (w - W)^2` over all weights, W being what a reader computes from the stored numbers and h
the second moment of the weight's input channel. In three parts:

1. each group's own best step and minimum, as if they could be any numbers (`search_fits.py`);
2. the block's factors, and with them integers (`search_factors.py`);
3. with those factors, other integers close by: a group's pair of integers is changed where the *stored* values give a
   smaller error, codes being rounded anew for each trial. Then the factors are fitted to the integers and codes, and
   the neighbours are tried once more.

The third part is where most is won: integers of 4 or 6 bits are coarse, and which of the pairs around the best real
numbers happens to suit a group's weights can only be seen by trying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.search_effort import EFFORTS, QUICK, Effort
from auto_round.data_type.gguf.search_factors import choose_factor, over_groups, refit_factors, scale_limits, to_half
from auto_round.data_type.gguf.search_fits import fit_steps, fit_steps_and_minima
from auto_round.data_type.gguf.search_piece import Piece
from auto_round.data_type.gguf.search_stored import Stored
from auto_round.data_type.gguf.types import GGML_TYPES, GgmlType
from auto_round.threads import side_by_side

_CHUNK = 3 << 17  # weights searched at a time: the few buffers of one chunk stay in cache
_GPU_CHUNK = 1 << 23
_WIDTHS = (1.1, 1.05, 1.0, 0.97, 0.94, 0.9)  # of the range of integers, for a factor


@torch.no_grad()
def search_blocks(
    weight: torch.Tensor, name: str, importance: torch.Tensor | None = None, quick: bool = False, codes: bool = True
) -> GgmlBlocks:
    """The blocks of a matrix with the least importance-weighted squared error that the search finds.

    Args:
        weight: [out, in], any float dtype; searched in float32. `in` must fill blocks.
        name: of the type, `Q4_K`.
        importance: [in], >= 0: the second moment of each input channel; None weighs all alike.
        quick: a fifth of the time: few grids for each group, and no neighbours. Enough for steps whose codes are found
            by their outputs.
        codes: whether they are wanted; else any are in the result.

    Returns:
        GgmlBlocks on the weight's device. Weights that are NaN or Inf give factors that are not finite or arbitrary
        codes; callers check.
    """
    kind, effort = GGML_TYPES[name], (QUICK if quick else EFFORTS)[name]
    out, columns = weight.shape
    assert columns % kind.block == 0, f"{columns} columns do not fill blocks of {kind.block}"
    count, per = columns // kind.block, kind.block // kind.group
    blocks = _empty(kind, out, columns, weight.device)
    tiles = weight.view(out, count, per, kind.group)
    shares = _shares(importance, columns, weight.device).view(count, per, kind.group)
    placed = blocks.codes.view(tiles.shape)
    chunk = _CHUNK if weight.device.type == "cpu" else _GPU_CHUNK

    def search(place: tuple[slice, slice]) -> None:
        rows, cols = place
        part = tiles[rows, cols]
        shape = part.shape[:2]
        x = part.permute(3, 2, 1, 0).float().contiguous().view(kind.group, per, -1)
        h = shares[cols].permute(2, 1, 0).unsqueeze(-1)
        # One for all rows; several columns of blocks side by side need their own.
        h = h.squeeze(-1) if shape[1] == 1 else h.expand(-1, -1, -1, shape[0]).reshape(x.shape)
        piece = Piece(x, h, kind)
        found = _search(piece, effort)
        if codes:
            nearest = piece.codes(*found.grid()).view(kind.group, per, shape[1], shape[0])
            placed[rows, cols] = nearest.permute(3, 2, 1, 0)
        found.store(blocks, rows, cols)

    side_by_side(search, list(_pieces(out, count, max(1, chunk // kind.block))), weight.device)
    return blocks


def _empty(kind: GgmlType, out: int, columns: int, device: torch.device) -> GgmlBlocks:
    """Room for the blocks of a matrix."""
    make = lambda size, dtype: torch.empty(out, columns // size, dtype=dtype, device=device)  # noqa: E731
    scales = make(kind.group, torch.int8) if kind.is_k else None
    dmin = make(kind.block, torch.float16) if kind.has_min else None
    mins = make(kind.group, torch.uint8) if kind.is_k and kind.has_min else None
    return GgmlBlocks(kind, make(1, torch.uint8), make(kind.block, torch.float16), scales, dmin, mins)


def _pieces(out: int, count: int, blocks: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that are searched together: one column of them, or several if rows are few."""
    columns = max(1, min(count, blocks // out))
    some = -(-out // -(-out // blocks))  # alike, not a rest of a few
    for c in range(0, count, columns):
        for r in range(0, out, some):
            yield slice(r, min(r + some, out)), slice(c, min(c + columns, count))


def _shares(importance: torch.Tensor | None, columns: int, device: torch.device) -> torch.Tensor:
    """float32 [in] of mean one. A channel that was never active in the calibration data still gets a small share, so
    that its weights are not rounded at random."""
    given = torch.ones(columns, device=device) if importance is None else importance.to(device, torch.float32)
    mean = given.double().mean().float()
    if not torch.isfinite(mean) or mean <= 0:
        given = mean = torch.ones(columns, device=device)
    return given / mean + 1e-4


def _search(piece: Piece, effort: Effort) -> Stored:
    found = _start(piece, effort)
    least = piece.error(*found.grid())
    for index, moves in enumerate(effort.moves):
        if index:
            found, least = _refit(piece, found, least)
        origin = found
        for move in moves:
            trial = origin.moved(move)
            error = piece.error(*trial.grid())
            better = error < least
            found, least = found.where(better, trial), torch.where(better, error, least)
    # Weights too small for float16 factors, or a group whose importance lies on a few of them.
    return found.where(piece.sum_hxx < least, found.nothing())


def _refit(piece: Piece, found: Stored, least: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Factors fitted to the integers and codes, in those blocks where that helps."""
    d, dmin = refit_factors(piece, found.d, found.scales, found.dmin, found.mins)
    trial = replace(found, d=d, dmin=dmin)
    error = piece.error(*trial.grid())
    better = over_groups(error.clone()) < over_groups(least.clone())
    return found.where(better, trial), torch.where(better, error, least)


def _start(piece: Piece, effort: Effort) -> Stored:
    """What is stored for the groups' own best steps and minima."""
    kind = piece.kind
    minimum: torch.Tensor | None = None
    if kind.has_min:
        step, minimum = fit_steps_and_minima(piece, effort.starts, effort.refits, above_zero=kind.min_sign > 0)
    else:
        step = fit_steps(piece, effort.starts, effort.refits)
    low, high = scale_limits(kind)
    if not kind.is_k:
        one = torch.ones_like(step)
        return Stored(kind, to_half(step), one, None if minimum is None else to_half(minimum), one)
    d, scales = choose_factor(step, piece.sums(step, minimum).qq, low, high, _WIDTHS)
    if minimum is None:
        return Stored(kind, d, scales, None, None)
    dmin, mins = choose_factor(-minimum, piece.sum_h, low, high, _WIDTHS)
    return Stored(kind, d, scales, dmin, mins)
