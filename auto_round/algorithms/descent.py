"""Coordinate descent: choose codes on given scales with the least squared error of a layer's outputs.

With D = W - w and inputs x, that error is tr(D H D') with the Hessian H = sum x x'. Columns are visited in turn, and
each code moves to the best value while the others stay (CDQuant, arXiv 2406.17542). Rows are independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auto_round.algorithms.base import LayerTask
from auto_round.codecs.base import Grid
from auto_round.codecs.quantized_layer import QuantizedLayer

_HEAD_PASSES = 4
_HEAD_DAMPING = 1.0
Limit = float | Tensor
_COLUMNS = 64  # columns between two updates of the whole gradient
_CHUNK = {"cpu": 1 << 22, "other": 1 << 26}  # weights rounded at a time


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` times its mean diagonal to the diagonal of a Hessian, in place."""
    hessian.diagonal().add_(damping * hessian.diagonal().mean() + 1e-12)
    return hessian


def row_slices(weight: Tensor) -> list[slice]:
    """Slices of rows that are rounded together."""
    out, columns = weight.shape
    step = max(1, _CHUNK.get(weight.device.type, _CHUNK["other"]) // columns)
    return [slice(start, start + step) for start in range(0, out, step)]


def descend_layer(task: LayerTask, hessian: Tensor, scale_dtype: torch.dtype) -> QuantizedLayer:
    """Quantize the LM head with searched scales and codes found by coordinate descent. `hessian` is damped by its full
    mean diagonal: with less, the error on the calibration tokens halves but the KL divergence on other text grows (ADR
    0008)."""
    out, columns = task.weight.shape
    start = task.start(True, scale_dtype)
    codes = descend_codes(task.weight, task.codec.grid(start, (out, columns)), [hessian], _HEAD_DAMPING, _HEAD_PASSES)
    return task.quantized(task.codec.with_codes(start, codes))


def descend_codes(weight: Tensor, grid: Grid, hessians: Sequence[Tensor], damping: float, passes: int) -> Tensor:
    """Codes uint8 [out, in] on a grid of whole numbers, with a Hessian for each band of input channels."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    start = 0
    for hessian in hessians:
        band = slice(start, start + hessian.shape[0])
        start = band.stop
        matrix = damp(hessian.clone(), damping)
        for rows in row_slices(weight):
            zero = grid.per_weight(grid.zero, rows, band) if isinstance(grid.zero, Tensor) else grid.zero
            part = weight[rows, band].float()
            part = part if grid.minimum is None else part - grid.per_weight(grid.minimum, rows, band)
            scale = grid.per_weight(grid.scale, rows, band)
            numbers = descend(part, scale, grid.low - zero, grid.high - zero, matrix, passes)
            codes[rows, band] = numbers.add_(zero).to(torch.uint8)
    return codes


@torch.no_grad()
def descend(weight: Tensor, scale: Tensor, low: Limit, high: Limit, hessian: Tensor, passes: int) -> Tensor:
    """Codes minus the zero point, [rows, in], from the nearest ones on; tr(D H D') never increases."""
    codes = (weight / scale).round_().clamp_(low, high)  # type: ignore[arg-type]
    gradient = (codes * scale - weight) @ hessian  # half of the true gradient
    diagonal = hessian.diagonal().unsqueeze(1)
    for _ in range(passes):
        for start in range(0, codes.shape[1], _COLUMNS):
            block = slice(start, min(start + _COLUMNS, codes.shape[1]))
            # Transposed, because columns are processed one at a time.
            local, unit, before = (t[:, block].t().contiguous() for t in (gradient, scale, codes))
            least, most = (
                t[:, block].t().contiguous() if isinstance(t, Tensor) else [t] * len(before) for t in (low, high)
            )
            divisor, after, deltas = diagonal[block] * unit, torch.empty_like(before), torch.empty_like(before)
            columns = zip(before, after, local, divisor, unit, deltas, hessian[block, block], least, most, strict=True)
            for index, (old, new, slope, curve, step, move, others, bottom, top) in enumerate(columns, 1):
                torch.addcdiv(old, slope, curve, value=-1, out=new).round_().clamp_(bottom, top)
                torch.sub(new, old, out=move).mul_(step)
                local[index:].addr_(others[index:], move)
            codes[:, block] = after.t()
            gradient.addmm_(deltas.t(), hessian[block])
    return codes
