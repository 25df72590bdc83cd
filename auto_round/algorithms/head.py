"""Quantize the LM head by coordinate descent on the error of its outputs, from the Hessian of its inputs.

With D = Wq - W and inputs z, the summed squared error of the outputs is tr(D H D') with H = sum z z'. So all
tokens cost one [in, in] matrix, whatever the number of tokens and the size of the vocabulary. `descent.py`
lowers it code by code.

H is damped by its full mean diagonal, not by the usual hundredth of it: with less, the
error on the calibration tokens halves but the KL divergence on other text grows (docs/adr/0008).
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
    """Quantize an integer layer with searched scales and codes found by coordinate descent.

    Args:
        hessian: the sum of z z' over the tokens, float32 [in, in].
        scale_dtype: stored dtype of scales.
    """
    qparams = initial_qparams(task, True, scale_dtype)
    assert isinstance(task.scheme.group_size, int)
    deltas = torch.empty_like(as_groups(task.weight, task.scheme.group_size), dtype=torch.float32)
    out, columns = task.weight.shape
    matrix = damped(hessian, _DAMPING)
    low, high = _limits(qparams)
    for rows in row_slices(task.weight):
        weight = task.weight[rows].float()
        scale, bottom, top = (_expand(value, rows, task, columns) for value in (qparams.scale, low, high))
        codes = descend(weight, scale, bottom, top, matrix, _PASSES)
        # `encode_integer` rounds; these deltas lead it to the codes found here.
        if task.scheme.group_size == 0:
            deltas.view(out, columns)[rows] = codes - weight / scale
        else:
            deltas[rows] = as_groups(codes - weight / scale, task.scheme.group_size)
    return encode_integer(task, qparams, deltas, scale_dtype)


def descend_ggml_layer(task: LayerTask, kind: GgmlType, hessian: torch.Tensor) -> QuantizedLayer:
    """Quantize a layer in a ggml type with searched steps and minima; `hessian` as for `descend_integer_layer`."""
    blocks = initial_blocks(task, kind, True)
    return encode_ggml(task, descend_blocks(task.weight, blocks, [hessian], _DAMPING, _PASSES))


def _limits(qparams: QuantParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest code minus the zero point, in the shape of the scale."""
    zero = qparams.zero if isinstance(qparams.zero, torch.Tensor) else torch.full_like(qparams.scale, qparams.zero)
    return -zero, 2**qparams.bits - 1 - zero


def _expand(value: torch.Tensor, rows: slice, task: LayerTask, columns: int) -> torch.Tensor:
    """[out, groups, 1] (or [1, 1, 1] per tensor) as one value per weight of the rows."""
    size = task.scheme.group_size
    if not isinstance(size, int) or size <= 0:
        part = value if value.shape[0] == 1 else value[rows]
        return part.reshape(-1, 1).expand(task.weight[rows].shape)
    return value[rows].squeeze(-1).repeat_interleave(size, dim=1)[:, :columns]
