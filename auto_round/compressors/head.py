"""The output head: rounded against its outputs, and kept only where that brings predictions closer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.coordinate_descent import round_blocks_by_descent, round_by_descent
from auto_round.algorithms.quantization.layer_codes import ggml_kind, is_integer
from auto_round.algorithms.quantization.rtn.quantizer import round_to_nearest
from auto_round.algorithms.quantization.sign_round.samples import split_samples
from auto_round.compressors.blockwise import Walk
from auto_round.errors import NumericsError
from auto_round.modeling.outside import outside_loaded
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer

_TOKENS = 2048
_JUDGES = 256  # held-out tokens whose predictions are compared
_ROWS = 32
_WEIGHTS = 1 << 24  # of the head in float32 at a time


@dataclass
class HeadInputs:
    """What reaches the head: `square` = sum z z' over the tokens that are tuned on, float32 [in, in], z being inputs in
    the quantized model; and for held-out tokens [tokens, in] those inputs, and the full-precision model's."""

    square: torch.Tensor
    quantized: torch.Tensor
    full: torch.Tensor


@torch.no_grad()
def head_inputs(source: ModelSource, walk: Walk, name: str) -> HeadInputs:
    """Send both calibration streams on to the head.

    Raises:
        NumericsError: NaN or Inf in its inputs.
    """
    quantized, full = walk.last_inputs, walk.last_full
    assert quantized is not None and full is not None
    tuned_on, held_out = split_samples(quantized.hidden.shape[0], walk.seed)
    square: torch.Tensor | None = None
    judges: list[tuple[torch.Tensor, ...]] = []
    each = max(1, _JUDGES // len(held_out))
    with outside_loaded(source, walk.device):
        for sample in sorted({*tuned_on, *held_out}):
            keep = quantized.captured.loss_mask[sample].to(walk.device)
            rows = []
            for stream in (quantized, full) if sample in held_out else (quantized,):
                hidden = stream.hidden[sample : sample + 1].to(walk.device)
                rows.append(stream.captured.finish(source, hidden, [sample], stop_at=name)[0][keep].float())
            if sample in held_out:
                spread = torch.linspace(0, rows[0].shape[0] - 1, min(each, rows[0].shape[0])).long()
                judges.append(tuple(row[spread.to(row.device)] for row in rows))
            if sample in tuned_on:
                if square is None:
                    square = torch.zeros(rows[0].shape[-1], rows[0].shape[-1], device=rows[0].device)
                for part in rows[0].split(_TOKENS):
                    square.addmm_(part.t(), part)
    assert square is not None
    if not bool(torch.isfinite(square).all()):
        raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")
    return HeadInputs(square, torch.cat([j[0] for j in judges]), torch.cat([j[1] for j in judges]))


def quantize_head(
    task: LayerTask, inputs: HeadInputs, scale_dtype: torch.dtype, optimized: bool
) -> tuple[QuantizedLayer, float, float]:
    """The head on held-out tokens: (layer, KL divergence of rounding to nearest, and of what is kept), in nats.

    KL judges because squared error does not say what a change of the logits does to the prediction.
    """
    task.importance = inputs.square.diagonal().contiguous()
    nearest = round_to_nearest(task, optimized, scale_dtype)
    plain = head_divergence(task, nearest, inputs)
    kept, least = nearest, plain
    for other in _others(task, inputs.square, optimized, scale_dtype):
        divergence = head_divergence(task, other, inputs)
        if divergence < least:
            kept, least = other, divergence
    return kept, plain, least


def _others(
    task: LayerTask, square: torch.Tensor, optimized: bool, scale_dtype: torch.dtype
) -> Iterator[QuantizedLayer]:
    """Other ways to round the head, one at a time: they are large."""
    kind = ggml_kind(task)
    if kind is not None:
        yield round_blocks_by_descent(task, kind, square)
        if optimized:
            yield round_to_nearest(task, False, scale_dtype)
    elif is_integer(task.scheme):
        yield round_by_descent(task, square, scale_dtype)


@torch.no_grad()
def head_divergence(task: LayerTask, layer: QuantizedLayer, inputs: HeadInputs) -> float:
    """Mean KL(full || quantized) over the held-out tokens, nats."""
    fed = inputs.quantized if task.activation is None else task.activation(inputs.quantized)
    full, found = _logits(task, None, inputs.full), _logits(task, layer, fed)
    total = 0.0
    for x, z in zip(full.split(_ROWS), found.split(_ROWS), strict=True):
        wanted = x.log_softmax(-1)
        rows = (wanted.exp() * (wanted - z.log_softmax(-1))).sum(-1, dtype=torch.float64)
        total += sum(rows.tolist())
    return total / max(1, inputs.full.shape[0])


def _logits(task: LayerTask, layer: QuantizedLayer | None, inputs: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, vocabulary], of the dense weight or of a quantized one. A part of the vocabulary at a time: a
    whole head in float32 may be the largest tensor of a run."""
    out, columns = task.weight.shape
    logits = torch.empty(inputs.shape[0], out, device=inputs.device)
    whole = layer is not None and isinstance(layer.scheme.group_size, tuple)
    step = out if whole else max(1, _WEIGHTS // columns)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        part = layer if layer is None or whole else layer.rows(rows)
        dense = task.weight[rows].float() if part is None else part.dequantize().to(inputs.device)
        logits[:, rows] = inputs @ dense.t()
    return logits if task.bias is None else logits.add_(task.bias.float())
