"""Rounding of the head against the error of its outputs, without ever forming them for all tokens.

With D = Wq - W and inputs z, the summed squared error of the outputs is tr(D A D') with A = sum z z'. So all tokens
cost one [in, in] matrix, however many they are and however large the vocabulary, and the rows of W are independent.
Columns are visited in turn, and each code moves to the best value while the others stay (cyclic coordinate descent; for
quantization: CDQuant, arXiv 2406.17542).

A is damped by its own mean diagonal. That is much more than the usual hundredth, and it matters: undamped, the error on
the tokens at hand halves while the KL divergence on other text grows (docs/adr/0008).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.layer_codes import as_groups, ggml_layer, integer_layer
from auto_round.algorithms.quantization.rtn.quantizer import start_blocks, start_grid
from auto_round.data_type.gguf.rounding import code_limits, divisor_of
from auto_round.data_type.gguf.types import GgmlType
from auto_round.data_type.int import IntGrid
from auto_round.quantized_layer import QuantizedLayer

_PASSES = 4
_DAMPING = 1.0
_CHUNK = {"cpu": 1 << 22, "other": 1 << 26}  # weights rounded at a time
_COLUMNS = 64  # columns between two updates of the whole gradient


def round_by_descent(task: LayerTask, square: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedLayer:
    """Codes of an integer layer on the grid that the scale search finds.

    Args:
        task: the layer.
        square: A, the sum of z z' over the tokens, float32 [in, in].
        scale_dtype: dtype in which scales are stored.
    """
    grid = start_grid(task, True, scale_dtype)
    assert isinstance(task.scheme.group_size, int)
    offsets = torch.empty_like(as_groups(task.weight, task.scheme.group_size), dtype=torch.float32)
    out, columns = task.weight.shape
    damped = _damped(square)
    low, high = _limits(grid)
    for rows in _rows(task):
        weight = task.weight[rows].float()
        scale, bottom, top = (_spread(value, rows, task, columns) for value in (grid.scale, low, high))
        codes = descend(weight, scale, bottom, top, damped)
        # Codes are decided in one place only, from offsets.
        if task.scheme.group_size == 0:
            offsets.view(out, columns)[rows] = codes - weight / scale
        else:
            offsets[rows] = as_groups(codes - weight / scale, task.scheme.group_size)
    return integer_layer(task, grid, offsets, scale_dtype)


def round_blocks_by_descent(task: LayerTask, kind: GgmlType, square: torch.Tensor) -> QuantizedLayer:
    """Codes of a layer in a ggml type, on the steps and minima that the search finds.

    Args:
        square: A, the sum of z z' over the tokens, float32 [in, in].
    """
    blocks = start_blocks(task, kind, True)
    codes = torch.empty_like(blocks.codes)
    steps, minima = divisor_of(blocks.step()), blocks.minimum()
    damped = _damped(square)
    low, high = code_limits(kind)
    for rows in _rows(task):
        weight = task.weight[rows].float()
        if minima is not None:
            weight = weight - minima[rows].repeat_interleave(kind.group, dim=1)
        scale = steps[rows].repeat_interleave(kind.group, dim=1)
        found = descend(weight, scale, torch.full_like(scale, low), torch.full_like(scale, high), damped)
        codes[rows] = found.add_(kind.zero).to(torch.uint8)
    return ggml_layer(task, replace(blocks, codes=codes))


def _damped(square: torch.Tensor) -> torch.Tensor:
    damped = square.clone()
    damped.diagonal().add_(_DAMPING * square.diagonal().mean() + 1e-12)
    return damped


def _rows(task: LayerTask) -> list[slice]:
    out, columns = task.weight.shape
    step = max(1, _CHUNK.get(task.weight.device.type, _CHUNK["other"]) // columns)
    return [slice(start, start + step) for start in range(0, out, step)]


def _limits(grid: IntGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest code less the zero point, shaped like the scale."""
    zero = grid.zero if isinstance(grid.zero, torch.Tensor) else torch.full_like(grid.scale, grid.zero)
    return -zero, 2**grid.bits - 1 - zero


def _spread(value: torch.Tensor, rows: slice, task: LayerTask, columns: int) -> torch.Tensor:
    """[out, groups, 1] (or [1, 1, 1] per tensor) as one value an element of the rows."""
    size = task.scheme.group_size
    if not isinstance(size, int) or size <= 0:
        part = value if value.shape[0] == 1 else value[rows]
        return part.reshape(-1, 1).expand(task.weight[rows].shape)
    return value[rows].squeeze(-1).repeat_interleave(size, dim=1)[:, :columns]


@torch.no_grad()
def descend(
    weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square: torch.Tensor
) -> torch.Tensor:
    """Codes less the zero point, from rounding to nearest on; tr(D A D') only falls.

    Args:
        weight, scale, low, high: [rows, in]; limits of the codes less the zero point.
        square: A, symmetric and positive definite, [in, in].
    """
    codes = torch.maximum(torch.minimum((weight / scale).round(), high), low)
    gradient = (codes * scale - weight) @ square  # half of the real one
    diagonal = square.diagonal()
    for _ in range(_PASSES):
        for start in range(0, codes.shape[1], _COLUMNS):
            block = slice(start, min(start + _COLUMNS, codes.shape[1]))
            inner = square[block, block]
            local = gradient[:, block].t().contiguous()
            moved = torch.zeros_like(local)
            for index in range(local.shape[0]):
                column = start + index
                unit = scale[:, column]
                best = codes[:, column] - local[index] / (diagonal[column] * unit)
                best = torch.maximum(torch.minimum(best.round_(), high[:, column]), low[:, column])
                moved[index] = (best - codes[:, column]) * unit
                codes[:, column] = best
                local.addr_(inner[index], moved[index])
            gradient.addmm_(moved.t(), square[block])
    return codes
