"""How many samples go through a block at once, and what happens when they do not fit on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from auto_round.algorithms.quantization.block_task import BlockTask
from auto_round.algorithms.quantization.device_memory import free_cached, out_of_memory
from auto_round.algorithms.quantization.sign_round.function_linear import FunctionTuningLinear
from auto_round.algorithms.quantization.sign_round.layer_bank import LayerBank
from auto_round.logger import logger

Learnables = LayerBank | FunctionTuningLinear
T = TypeVar("T")


class Passes:
    """Runs steps over parts of `at_once` samples, fewer once the device has run out of memory.

    A step keeps its samples and its sum of gradients, whatever the size of the parts. A step that failed is begun again
    from its start: what it had gathered is dropped.
    """

    def __init__(
        self, task: BlockTask, layers: Sequence[Learnables], at_once: int, device: torch.device | None = None
    ) -> None:
        """`device`: where the block runs; None: where its layers are."""
        self.task, self.layers, self.at_once = task, layers, at_once
        self.device = task.layers[0].weight.device if device is None else device

    def run(self, step: Callable[[int], T]) -> T:
        """`step(at_once)`; again with half as many samples at once, then with the block's inputs off the device.

        Raises DeviceError when one sample alone does not fit even so.
        """
        device = self.device
        while True:
            try:
                return step(self.at_once)
            except torch.OutOfMemoryError as error:
                for layer in self.layers:
                    layer.drop_gradient()
                if self.at_once > 1:
                    self.at_once //= 2
                    logger.info("%s is full: %d samples at once from here on", device, self.at_once)
                elif self.task.offload(self.task):
                    logger.info("%s is full: the inputs of the blocks move to the CPU", device)
                else:
                    raise out_of_memory(f"tuning {self.task.name} on one sample", device) from error
            free_cached(device)
