"""Rounding of the head against the error of its outputs, without ever forming them for all tokens.

With D = Wq - W and inputs z, the summed squared error of the outputs is tr(D A D') with A = sum z z'. So all tokens
cost one [in, in] matrix, however many they are and however large the vocabulary, and the rows of W are independent.
`column_descent.py` lowers it, code by code.

A is damped by its own mean diagonal. That is much more than the usual hundredth, and it matters: undamped, the error on
the tokens at hand halves while the KL divergence on other text grows (docs/adr/0008).
"""

from __future__ import annotations

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.column_descent import damped, descend, descend_blocks, row_slices
from auto_round.algorithms.quantization.layer_codes import as_groups, ggml_layer, integer_layer
from auto_round.algorithms.quantization.rtn.quantizer import start_blocks, start_grid
from auto_round.data_type.gguf.types import GgmlType
from auto_round.data_type.int import IntGrid
from auto_round.quantized_layer import QuantizedLayer

_PASSES = 4
_DAMPING = 1.0


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
    matrix = damped(square, _DAMPING)
    low, high = _limits(grid)
    for rows in row_slices(task.weight):
        weight = task.weight[rows].float()
        scale, bottom, top = (_spread(value, rows, task, columns) for value in (grid.scale, low, high))
        codes = descend(weight, scale, bottom, top, matrix, _PASSES)
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
    return ggml_layer(task, descend_blocks(task.weight, blocks, [square], _DAMPING, _PASSES))


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
