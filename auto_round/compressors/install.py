"""The weights of a block's layers: those that were read, dequantized ones in their place, copies that go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.modeling.blocks import set_weight_2d, weight_2d
from auto_round.quantized_layer import QuantizedLayer


def install(task: LayerTask, layer: QuantizedLayer) -> None:
    """Put the dequantized weight in place of the original."""
    weight = layer.dequantize(torch.float32).to(task.weight.device)
    own = task.module.weight
    assert isinstance(own, torch.nn.Parameter)
    if own.numel() == 0:  # dropped before tuning
        made = weight.to(own.dtype)
        task.module.weight = torch.nn.Parameter(made.t() if task.transposed else made, requires_grad=False)
    else:
        set_weight_2d(task.module, weight)


def put_back(task: LayerTask) -> None:
    """The original weight of a layer that stays, where it was dropped before tuning."""
    own = task.module.weight
    assert isinstance(own, torch.nn.Parameter)
    if own.numel() == 0:
        made = task.weight.to(own.dtype)
        task.module.weight = torch.nn.Parameter(made.t() if task.transposed else made, requires_grad=False)


def drop_copies(tasks: Sequence[LayerTask]) -> None:
    """Free the weights that were cast to run the block in full precision: quantizers start from the source's own."""
    for task in tasks:
        weight = weight_2d(task.module)
        if weight.dtype != task.weight.dtype:
            task.module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


def loaded(task: LayerTask) -> LayerTask:
    """A layer whose weights were nowhere when the task was made, and are in memory now."""
    bias = getattr(task.module, "bias", None)
    weight = weight_2d(task.module).detach()
    return replace(task, weight=weight, bias=None if bias is None else bias.detach())
