"""Codes on given steps with the least error of a layer's outputs, found by coordinate descent.

With D = W - w and inputs x, the summed squared error of the outputs is tr(D A D') with A = sum x x'. Columns are
visited in turn, and each code moves to the best value while the others stay (cyclic coordinate descent; for
quantization: CDQuant, arXiv 2406.17542). Rows are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.rounding import code_limits, divisor_of

Limit = float | torch.Tensor
_COLUMNS = 64  # columns between two updates of the whole gradient
_CHUNK = {"cpu": 1 << 22, "other": 1 << 26}  # weights rounded at a time


def damped(square: torch.Tensor, damping: float) -> torch.Tensor:
    """A with `damping` times its mean diagonal added to the diagonal."""
    return damp(square.clone(), damping)


def damp(square: torch.Tensor, damping: float) -> torch.Tensor:
    """The same in place."""
    square.diagonal().add_(damping * square.diagonal().mean() + 1e-12)
    return square


def row_slices(weight: torch.Tensor) -> list[slice]:
    """Rows of a matrix that are rounded together."""
    out, columns = weight.shape
    step = max(1, _CHUNK.get(weight.device.type, _CHUNK["other"]) // columns)
    return [slice(start, start + step) for start in range(0, out, step)]


def descend_blocks(
    weight: torch.Tensor, blocks: GgmlBlocks, squares: Sequence[torch.Tensor], damping: float, passes: int
) -> GgmlBlocks:
    """The blocks with codes by coordinate descent, on the steps and minima that they have.

    Args:
        weight: [out, in], any float dtype.
        blocks: stored numbers of it; their codes do not matter.
        squares: A of each band of input channels, in order: float32 [n, n], symmetric.
        damping: in parts of the mean diagonal of each.
        passes: visits of every code.
    """
    kind = blocks.kind
    codes = torch.empty_like(blocks.codes)
    steps, minima = divisor_of(blocks.step()), blocks.minimum()
    low, high = code_limits(kind)
    at = 0
    for square in squares:
        band = slice(at, at + square.shape[0])
        at = band.stop
        groups = slice(band.start // kind.group, band.stop // kind.group)
        matrix = damped(square, damping)
        for rows in row_slices(weight):
            part = weight[rows, band].float()
            if minima is not None:
                part = part - minima[rows, groups].repeat_interleave(kind.group, dim=1)
            scale = steps[rows, groups].repeat_interleave(kind.group, dim=1)
            found = descend(part, scale, low, high, matrix, passes)
            codes[rows, band] = found.add_(kind.zero).to(torch.uint8)
    return replace(blocks, codes=codes)


@torch.no_grad()
def descend(
    weight: torch.Tensor, scale: torch.Tensor, low: Limit, high: Limit, square: torch.Tensor, passes: int
) -> torch.Tensor:
    """Codes less the zero point, from rounding to nearest on; tr(D A D') only falls.

    Args:
        weight, scale: [rows, in].
        low, high: limits of the codes less the zero point, [rows, in] or the same for all.
        square: A, symmetric and positive definite, [in, in].
        passes: visits of every code.
    """
    codes = (weight / scale).round_().clamp_(low, high)  # type: ignore[arg-type]
    gradient = (codes * scale - weight) @ square  # half of the real one
    diagonal = square.diagonal().unsqueeze(1)
    for _ in range(passes):
        for start in range(0, codes.shape[1], _COLUMNS):
            block = slice(start, min(start + _COLUMNS, codes.shape[1]))
            # Columns as rows: they are read one at a time.
            local, unit, before = (_turned(t, block) for t in (gradient, scale, codes))
            least, most = _turned_limit(low, block), _turned_limit(high, block)
            divisor, after, moved = diagonal[block] * unit, torch.empty_like(before), torch.empty_like(before)
            columns = zip(before, after, local, divisor, unit, moved, square[block, block], least, most, strict=True)
            for index, (old, new, slope, curve, step, move, others, bottom, top) in enumerate(columns, 1):
                torch.addcdiv(old, slope, curve, value=-1, out=new).round_().clamp_(bottom, top)
                torch.sub(new, old, out=move).mul_(step)
                local[index:].addr_(others[index:], move)
            codes[:, block] = after.t()
            gradient.addmm_(moved.t(), square[block])
    return codes


def _turned(values: torch.Tensor, block: slice) -> torch.Tensor:
    return values[:, block].t().contiguous()


def _turned_limit(limit: Limit, block: slice) -> Sequence[Any]:
    """A limit for each column of the block."""
    return [limit] * (block.stop - block.start) if isinstance(limit, float) else list(_turned(limit, block))
