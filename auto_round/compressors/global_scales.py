"""One global scale for the weights of layers that runtimes join (NVFP4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from auto_round import envs
from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.layer_codes import small_float
from auto_round.data_type.float_scales import global_scale_of
from auto_round.data_type.tiles import whole_largest
from auto_round.modeling.fused import fused_groups


def share_global_scales(tasks: Sequence[LayerTask]) -> None:
    """Set `global_scale` of the layers of a block whose type has one: the smallest of those that are joined, which is
    the one that the largest weight among them asks for. With AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE off, each its own."""
    owners = {task.name: task for task in tasks if _has_global_scale(task)}
    groups = fused_groups(owners, across_experts=False) if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE else []
    for group in groups:
        largest = torch.stack([whole_largest(owners[n].weight) for n in group]).max()
        for name in group:
            owners[name].global_scale = global_scale_of(largest)


def _has_global_scale(task: LayerTask) -> bool:
    family = small_float(task.scheme)
    return family is not None and family.has_global_scale
