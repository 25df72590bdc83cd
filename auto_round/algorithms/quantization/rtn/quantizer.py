"""Round to nearest: plain, or on scales found by the importance-weighted search.

Layers in ggml types get better codes than the nearest ones where calibration gathered the products of their input
channels: on the steps that the search finds, by coordinate descent on the error of the outputs (docs/adr/0011).
"""

from __future__ import annotations

from functools import partial

import torch

from auto_round.algorithms.quantization.block_task import BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.column_feedback import Shared, feedback, feedback_blocks, shared_feedback
from auto_round.algorithms.quantization.layer_codes import (
    as_groups,
    float_layer,
    function_layer,
    ggml_kind,
    ggml_layer,
    importance_groups,
    integer_layer,
    is_integer,
    rounded_layer,
    small_float,
)
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.rtn.float_search import search_scales
from auto_round.algorithms.quantization.rtn.search import search_grid
from auto_round.data_type.float_family import FloatFamily, encode
from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.search import search_blocks
from auto_round.data_type.gguf.types import GgmlType
from auto_round.data_type.int import IntGrid, integer_grid
from auto_round.data_type.utils import within_float16
from auto_round.quantized_layer import QuantizedLayer
from auto_round.threads import side_by_side

DAMPING = 0.3  # of the products' mean diagonal


def start_grid(task: LayerTask, optimized: bool, scale_dtype: torch.dtype) -> IntGrid:
    """The grid of an integer layer before any tuning: searched, or from the minimum and maximum."""
    scheme = task.scheme
    assert isinstance(scheme.group_size, int)
    groups = as_groups(task.weight, scheme.group_size)
    if not optimized:
        return integer_grid(groups, scheme.bits, scheme.sym, scale_dtype=scale_dtype)
    importance = importance_groups(task.importance, task.weight, scheme.group_size)
    return search_grid(groups, scheme.bits, scheme.sym, importance, scale_dtype)


def start_scales(task: LayerTask, family: FloatFamily, optimized: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(stored scales, global scale) of a layer of small floats before any tuning: searched, or by the type's rule."""
    given = family.global_scale(task.weight, task.global_scale)
    importance = task.importance if optimized else None
    if optimized:
        return search_scales(task.weight, family, task.scheme.group_size, importance, given), given
    return encode(task.weight, family, task.scheme.group_size, global_scale=given).scale, given


def start_blocks(task: LayerTask, kind: GgmlType, optimized: bool, shared: Shared | None = None) -> GgmlBlocks:
    """The blocks of a layer in a ggml type before any tuning: searched, or as ggml rounds without importance.

    Their factors are float16: weights beyond it are cut to its largest value first. `shared`: of `shared_feedback`.
    """
    from auto_round.data_type.gguf.plain import plain_blocks

    weight = within_float16(task.weight)
    if not optimized:
        return plain_blocks(weight, kind.name)
    if task.products is None:
        return search_blocks(weight, kind.name, task.importance)
    steps = search_blocks(weight, kind.name, task.importance, quick=True, codes=False)
    known = [(shared or {}).get(id(square)) or feedback(square, DAMPING) for square in task.products]
    return feedback_blocks(weight, steps, known)


def round_to_nearest(
    task: LayerTask, optimized: bool, scale_dtype: torch.dtype, shared: Shared | None = None
) -> QuantizedLayer:
    """One layer rounded to nearest. `shared`: of `shared_feedback`."""
    kind = ggml_kind(task)
    if kind is not None:
        return ggml_layer(task, start_blocks(task, kind, optimized, shared))
    family = small_float(task.scheme)
    if family is not None:
        scale, given = start_scales(task, family, optimized)
        return float_layer(task, family, scale, global_scale=given)
    if not is_integer(task.scheme):
        return function_layer(task, scale_dtype)
    if not optimized:
        return rounded_layer(task, scale_dtype)
    return integer_layer(task, start_grid(task, optimized, scale_dtype), None, scale_dtype)


class RTNQuantizer:
    """Round to nearest, layer by layer."""

    needs_targets = False

    def __init__(self, config: RTNConfig, scale_dtype: torch.dtype = torch.float16) -> None:
        self.config = config
        self.scale_dtype = scale_dtype
        self.needs_importance = config.optimized
        self.name = "opt-RTN" if config.optimized else "RTN"

    def needs_products(self, layer: LayerTask) -> bool:
        return self.config.optimized and ggml_kind(layer) is not None

    def quantize_block(self, task: BlockTask) -> BlockResult:
        device = task.layers[0].weight.device if task.layers else torch.device("cpu")
        shared = shared_feedback(task.layers, DAMPING, device)
        rounded = partial(
            round_to_nearest, optimized=self.config.optimized, scale_dtype=self.scale_dtype, shared=shared
        )
        return BlockResult(side_by_side(rounded, task.layers, device))
