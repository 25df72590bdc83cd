"""Rounding the experts of a block that is larger than the memory: one at a time is read, rounded and forgotten.

Rounding to nearest looks at one layer only, so a layer's codes can be made again whenever they are asked for: for the
check's tokens that reach the expert, and for every format that is written. That costs time, and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from auto_round.algorithms.quantization.block_task import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.compressors.global_scales import share_global_scales
from auto_round.compressors.install import loaded
from auto_round.compressors.job import Job
from auto_round.compressors.layers_by_expert import LayersByExpert
from auto_round.modeling.one_expert import OneExpert, expert_of
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer


def streams_experts(job: Job) -> bool:
    """Whether the experts of a block are read one at a time."""
    return job.memory_plan is not None and job.memory_plan.streams_experts


def one_expert(job: Job, source: ModelSource, block: str, device: torch.device, dtype: torch.dtype) -> OneExpert | None:
    """How the experts of a block are read; None when they are in memory with the block, and where it has none."""
    if not streams_experts(job) or not any(expert_of(name) for name in job.layers if name.startswith(f"{block}.")):
        return None
    return OneExpert(source, block, device, dtype)


@contextmanager
def experts_run(experts: OneExpert | None, result: BlockResult | None = None) -> Iterator[None]:
    """While this is open the block can be called: with its own experts, or with those of `result`."""
    if experts is None:
        yield
        return
    layers = None if result is None else result.layers
    made = layers.dense if isinstance(layers, LayersByExpert) else None
    with experts.running(made):
        yield


def layer_names(layers: Sequence[QuantizedLayer]) -> list[str]:
    """Their names, without making those that are made when they are reached."""
    return layers.names if isinstance(layers, LayersByExpert) else [layer.name for layer in layers]


class LaterExperts:
    """A quantizer of single layers that leaves experts, which are not in memory, for when they are asked for."""

    def __init__(self, inner: BlockQuantizer, experts: OneExpert) -> None:
        self.name, self.needs_importance = inner.name, inner.needs_importance
        self.needs_targets = inner.needs_targets
        self._inner, self._experts = inner, experts

    def needs_products(self, layer: LayerTask) -> bool:
        return self._inner.needs_products(layer)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        others = [layer for layer in task.layers if not layer.weight.is_meta]
        made = self._inner.quantize_block(replace(task, layers=others))
        held = {layer.name: layer for layer in made.layers}
        return BlockResult(StreamedLayers(self._experts, task, held, self._inner))


class StreamedLayers(LayersByExpert):
    """Those of an expert are rounded as they are reached."""

    def __init__(
        self, experts: OneExpert, task: BlockTask, held: Mapping[str, QuantizedLayer], quantizer: BlockQuantizer
    ) -> None:
        super().__init__([layer.name for layer in task.layers], held)
        self._experts, self._task, self._quantizer = experts, task, quantizer

    def _make(self, expert: str) -> dict[str, QuantizedLayer]:
        source = self._experts.source
        source.load(expert, self._experts.device)
        try:
            own = [loaded(task) for task in self._task.layers if expert_of(task.name) == expert]
            share_global_scales(own)
            made = self._quantizer.quantize_block(replace(self._task, layers=own))
        finally:
            source.release(expert)
        return {layer.name: layer for layer in made.layers}
