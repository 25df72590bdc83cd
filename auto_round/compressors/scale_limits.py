"""Scales that were too large for the dtype they are stored in, and are its largest value instead."""

from __future__ import annotations

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.data_type.int import FP16_MAX
from auto_round.quantized_layer import QuantizedLayer


def clamped_scales(task: LayerTask, layer: QuantizedLayer) -> int:
    """How many stored scales of a layer were clamped, 0 for types whose scales cannot overflow.

    Integers: scales that are the largest value of their dtype. ggml types, all of whose factors are float16: blocks
    with a weight beyond float16, whose factors were found for the weight clamped to it.
    """
    if layer.blocks is not None:
        low, high = torch.aminmax(task.weight)
        if max(-float(low), float(high)) <= FP16_MAX:
            return 0
        beyond = task.weight.reshape(-1, layer.blocks.kind.block).abs().amax(1) > FP16_MAX
        return int(beyond.sum())
    if layer.scale is None or layer.element is not None or not layer.scale.is_floating_point():
        return 0
    return int((layer.scale.abs() == torch.finfo(layer.scale.dtype).max).sum())
