"""Codes on given steps with the least error of a layer's outputs, found by coordinate descent.

With D = W - w and inputs x, the summed squared error of the outputs is tr(D A D') with A = sum x x'. Columns are
visited in turn, and each code moves to the best value while the others stay (cyclic coordinate descent; for
quantization: CDQuant, arXiv 2406.17542). Rows are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.rounding import code_limits, divisor_of

_COLUMNS = 64  # columns between two updates of the whole gradient
_CHUNK = {"cpu": 1 << 22, "other": 1 << 26}  # weights rounded at a time


def damped(square: torch.Tensor, damping: float) -> torch.Tensor:
    """A with `damping` times its mean diagonal added to the diagonal."""
    result = square.clone()
    result.diagonal().add_(damping * square.diagonal().mean() + 1e-12)
    return result


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
            found = descend(part, scale, torch.full_like(scale, low), torch.full_like(scale, high), matrix, passes)
            codes[rows, band] = found.add_(kind.zero).to(torch.uint8)
    return replace(blocks, codes=codes)


@torch.no_grad()
def descend(
    weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square: torch.Tensor, passes: int
) -> torch.Tensor:
    """Codes less the zero point, from rounding to nearest on; tr(D A D') only falls.

    Args:
        weight, scale, low, high: [rows, in]; limits of the codes less the zero point.
        square: A, symmetric and positive definite, [in, in].
        passes: visits of every code.
    """
    codes = torch.maximum(torch.minimum((weight / scale).round(), high), low)
    gradient = (codes * scale - weight) @ square  # half of the real one
    diagonal = square.diagonal().unsqueeze(1)
    for _ in range(passes):
        for start in range(0, codes.shape[1], _COLUMNS):
            block = slice(start, min(start + _COLUMNS, codes.shape[1]))
            inner = square[block, block]
            # Columns as rows: they are read one at a time.
            local, unit, best, least, most = (t[:, block].t().contiguous() for t in (gradient, scale, codes, low, high))
            divisor, moved = diagonal[block] * unit, torch.empty_like(local)
            for index in range(local.shape[0]):
                value = (best[index] - local[index] / divisor[index]).round_()
                value = torch.maximum(torch.minimum(value, most[index]), least[index])
                moved[index] = (value - best[index]) * unit[index]
                best[index] = value
                local.addr_(inner[index], moved[index])
            codes[:, block] = best.t()
            gradient.addmm_(moved.t(), square[block])
    return codes
