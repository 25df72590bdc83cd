"""RTN: round to nearest on min/max scales, or on searched scales (opt-RTN)."""

from __future__ import annotations

import torch

from auto_round.algorithms.base import BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.threads import parallel_map


def quantize_layer(task: LayerTask, optimized: bool, scale_dtype: torch.dtype) -> QuantizedLayer:
    """One layer rounded to nearest."""
    return task.quantized(task.codec.quantize(task.weight, task.start_options(optimized, scale_dtype)))


class RTNQuantizer:
    """Round to nearest, layer by layer."""

    needs_targets = False

    def __init__(self, config: RTNConfig, scale_dtype: torch.dtype = torch.float16) -> None:
        self.scale_dtype, self.needs_importance = scale_dtype, config.optimized
        self.name = "opt-RTN" if config.optimized else "RTN"

    def needs_hessian(self, layer: LayerTask) -> bool:
        return False

    def quantize_block(self, task: BlockTask) -> BlockResult:
        rounded = lambda layer: quantize_layer(layer, self.needs_importance, self.scale_dtype)  # noqa: E731
        return BlockResult(parallel_map(rounded, task.layers, task.device))
