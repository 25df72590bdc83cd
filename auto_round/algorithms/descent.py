"""Coordinate descent: choose codes on given scales with the least squared error of a layer's outputs.

With D = W - w and inputs x, that error is tr(D H D') with the Hessian H = sum x x'. Columns are visited in
turn, and each code moves to the best value while the others stay (CDQuant, arXiv 2406.17542). Rows are
independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from auto_round.codecs.ggml.types import GgmlBlocks, code_limits, divisor_of

Limit = float | torch.Tensor
_COLUMNS = 64  # columns between two updates of the whole gradient
_CHUNK = {"cpu": 1 << 22, "other": 1 << 26}  # weights rounded at a time


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """A copy of a Hessian with `damping` times its mean diagonal added to the diagonal."""
    return damp(hessian.clone(), damping)


def damp(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """`damped` in place."""
    hessian.diagonal().add_(damping * hessian.diagonal().mean() + 1e-12)
    return hessian


def row_slices(weight: torch.Tensor) -> list[slice]:
    """Slices of rows that are rounded together."""
    out, columns = weight.shape
    step = max(1, _CHUNK.get(weight.device.type, _CHUNK["other"]) // columns)
    return [slice(start, start + step) for start in range(0, out, step)]


def descend_blocks(
    weight: torch.Tensor, blocks: GgmlBlocks, hessians: Sequence[torch.Tensor], damping: float, passes: int
) -> GgmlBlocks:
    """Blocks with codes found by coordinate descent on their steps and minima.

    Args:
        weight: [out, in], any float dtype.
        blocks: steps and minima; the codes are ignored.
        hessians: of each band of input channels, in order: float32 [n, n], symmetric.
        damping: as a fraction of each one's mean diagonal.
        passes: updates of every code.
    """
    kind = blocks.kind
    codes = torch.empty_like(blocks.codes)
    steps, minima = divisor_of(blocks.step()), blocks.minimum()
    low, high = code_limits(kind)
    start = 0
    for hessian in hessians:
        band = slice(start, start + hessian.shape[0])
        start = band.stop
        groups = slice(band.start // kind.group, band.stop // kind.group)
        matrix = damped(hessian, damping)
        for rows in row_slices(weight):
            part = weight[rows, band].float()
            if minima is not None:
                part = part - minima[rows, groups].repeat_interleave(kind.group, dim=1)
            scale = steps[rows, groups].repeat_interleave(kind.group, dim=1)
            best_codes = descend(part, scale, low, high, matrix, passes)
            codes[rows, band] = best_codes.add_(kind.zero).to(torch.uint8)
    return replace(blocks, codes=codes)


@torch.no_grad()
def descend(
    weight: torch.Tensor, scale: torch.Tensor, low: Limit, high: Limit, hessian: torch.Tensor, passes: int
) -> torch.Tensor:
    """Codes minus the zero point, [rows, in], starting at the nearest ones; tr(D H D') never increases.

    Args:
        weight, scale: [rows, in].
        low, high: limits of the codes minus the zero point, [rows, in] or numbers.
        hessian: H, symmetric and positive definite, [in, in].
        passes: updates of every code.
    """
    codes = (weight / scale).round_().clamp_(low, high)  # type: ignore[arg-type]
    gradient = (codes * scale - weight) @ hessian  # half of the true gradient
    diagonal = hessian.diagonal().unsqueeze(1)
    for _ in range(passes):
        for start in range(0, codes.shape[1], _COLUMNS):
            block = slice(start, min(start + _COLUMNS, codes.shape[1]))
            # Transposed, because columns are processed one at a time.
            local, unit, before = (_transposed(t, block) for t in (gradient, scale, codes))
            least, most = _transposed_limit(low, block), _transposed_limit(high, block)
            divisor, after, deltas = diagonal[block] * unit, torch.empty_like(before), torch.empty_like(before)
            columns = zip(before, after, local, divisor, unit, deltas, hessian[block, block], least, most, strict=True)
            for index, (old, new, slope, curve, step, move, others, bottom, top) in enumerate(columns, 1):
                torch.addcdiv(old, slope, curve, value=-1, out=new).round_().clamp_(bottom, top)
                torch.sub(new, old, out=move).mul_(step)
                local[index:].addr_(others[index:], move)
            codes[:, block] = after.t()
            gradient.addmm_(deltas.t(), hessian[block])
    return codes


def _transposed(values: torch.Tensor, block: slice) -> torch.Tensor:
    return values[:, block].t().contiguous()


def _transposed_limit(limit: Limit, block: slice) -> Sequence[Any]:
    """The limit of each column of the block."""
    return [limit] * (block.stop - block.start) if isinstance(limit, float) else list(_transposed(limit, block))
