"""Quantize the LM head by coordinate descent on the error of its outputs, from the Hessian of its inputs.

With D = Wq - W and inputs z, the summed squared error of the outputs is tr(D H D') with H = sum z z'. So all
tokens cost one [in, in] matrix, whatever the number of tokens and the size of the vocabulary. `descent.py`
lowers it code by code.

H is damped by its own mean diagonal. That is much more than the usual hundredth, and it matters: undamped, the
error on the calibration tokens halves while the KL divergence on other text grows (docs/adr/0008).
"""

from __future__ import annotations

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.descent import damped, descend, descend_blocks, row_slices
from auto_round.algorithms.encode_layer import as_groups, encode_ggml, encode_integer
from auto_round.algorithms.quantization.rtn.quantizer import initial_blocks, initial_qparams
from auto_round.codecs.ggml.types import GgmlType
from auto_round.codecs.int import QuantParams
from auto_round.codecs.quantized_layer import QuantizedLayer

_PASSES = 4
_DAMPING = 1.0


def descend_integer_layer(task: LayerTask, hessian: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedLayer:
    """Codes of an integer layer on the grid that the scale search finds.

    Args:
        task: the layer.
        square: A, the sum of z z' over the tokens, float32 [in, in].
        scale_dtype: dtype in which scales are stored.
    """
    qparams = initial_qparams(task, True, scale_dtype)
    assert isinstance(task.scheme.group_size, int)
    offsets = torch.empty_like(as_groups(task.weight, task.scheme.group_size), dtype=torch.float32)
    out, columns = task.weight.shape
    matrix = damped(hessian, _DAMPING)
    low, high = _limits(qparams)
    for rows in row_slices(task.weight):
        weight = task.weight[rows].float()
        scale, bottom, top = (_expand(value, rows, task, columns) for value in (qparams.scale, low, high))
        codes = descend(weight, scale, bottom, top, matrix, _PASSES)
        # Codes are decided in one place only, from offsets.
        if task.scheme.group_size == 0:
            offsets.view(out, columns)[rows] = codes - weight / scale
        else:
            offsets[rows] = as_groups(codes - weight / scale, task.scheme.group_size)
    return encode_integer(task, qparams, offsets, scale_dtype)


def descend_ggml_layer(task: LayerTask, kind: GgmlType, hessian: torch.Tensor) -> QuantizedLayer:
    """Codes of a layer in a ggml type, on the steps and minima that the search finds.

    Args:
        square: A, the sum of z z' over the tokens, float32 [in, in].
    """
    blocks = initial_blocks(task, kind, True)
    return encode_ggml(task, descend_blocks(task.weight, blocks, [hessian], _DAMPING, _PASSES))


def _limits(qparams: QuantParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest code less the zero point, shaped like the scale."""
    zero = qparams.zero if isinstance(qparams.zero, torch.Tensor) else torch.full_like(qparams.scale, qparams.zero)
    return -zero, 2**qparams.bits - 1 - zero


def _expand(value: torch.Tensor, rows: slice, task: LayerTask, columns: int) -> torch.Tensor:
    """[out, groups, 1] (or [1, 1, 1] per tensor) as one value an element of the rows."""
    size = task.scheme.group_size
    if not isinstance(size, int) or size <= 0:
        part = value if value.shape[0] == 1 else value[rows]
        return part.reshape(-1, 1).expand(task.weight[rows].shape)
    return value[rows].squeeze(-1).repeat_interleave(size, dim=1)[:, :columns]
