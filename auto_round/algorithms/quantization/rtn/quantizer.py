"""RTN: round to nearest on min/max scales, or on searched scales (opt-RTN)."""

from __future__ import annotations

from functools import partial

import torch

from auto_round.algorithms.base import BlockResult, BlockTask, LayerTask
from auto_round.algorithms.encode_layer import (
    as_groups,
    encode_by_function,
    encode_ggml,
    encode_integer,
    encode_integer_rtn,
    encode_minifloat,
    ggml_type_for,
    importance_groups,
    is_integer,
    minifloat_spec,
)
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.rtn.search import search_qparams, search_scales
from auto_round.codecs.block_float import BlockFloatSpec, encode
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GgmlBlocks, GgmlType
from auto_round.codecs.int import QuantParams, integer_qparams
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.codecs.registry import clamp_to_float16
from auto_round.threads import parallel_map


def initial_qparams(task: LayerTask, optimized: bool, scale_dtype: torch.dtype) -> QuantParams:
    """The grid of an integer layer before any tuning: searched, or from the minimum and maximum."""
    scheme = task.scheme
    assert isinstance(scheme.group_size, int)
    groups = as_groups(task.weight, scheme.group_size)
    if not optimized:
        return integer_qparams(groups, scheme.bits, scheme.sym, scale_dtype=scale_dtype)
    importance = importance_groups(task.importance, task.weight, scheme.group_size)
    return search_qparams(groups, scheme.bits, scheme.sym, importance, scale_dtype)


def initial_scales(
    task: LayerTask, family: BlockFloatSpec, optimized: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(stored scales, global scale) of a layer of small floats before any tuning: searched, or by the type's rule."""
    tensor_scale = family.global_scale(task.weight, task.global_scale)
    importance = task.importance if optimized else None
    if optimized:
        return search_scales(task.weight, family, task.scheme.group_size, importance, tensor_scale), tensor_scale
    return encode(task.weight, family, task.scheme.group_size, global_scale=tensor_scale).scale, tensor_scale


def initial_blocks(task: LayerTask, kind: GgmlType, optimized: bool, quick: bool = False) -> GgmlBlocks:
    """The blocks of a layer in a ggml type before any tuning: searched, or as ggml rounds without importance.

    Their scales are float16: weights beyond it are cut to its largest value first. `quick`: a shorter search, whose
    codes are left out.
    """
    from auto_round.codecs.ggml.plain import plain_blocks

    weight = clamp_to_float16(task.weight)
    if not optimized:
        return plain_blocks(weight, kind.name)
    return search_blocks(weight, kind.name, task.importance, quick=quick, codes=not quick)


def quantize_layer(task: LayerTask, optimized: bool, scale_dtype: torch.dtype) -> QuantizedLayer:
    """One layer rounded to nearest."""
    kind = ggml_type_for(task)
    if kind is not None:
        return encode_ggml(task, initial_blocks(task, kind, optimized))
    family = minifloat_spec(task.scheme)
    if family is not None:
        scale, tensor_scale = initial_scales(task, family, optimized)
        return encode_minifloat(task, family, scale, global_scale=tensor_scale)
    if not is_integer(task.scheme):
        return encode_by_function(task, scale_dtype)
    if not optimized:
        return encode_integer_rtn(task, scale_dtype)
    return encode_integer(task, initial_qparams(task, optimized, scale_dtype), None, scale_dtype)


class RTNQuantizer:
    """Round to nearest, layer by layer."""

    needs_targets = False

    def __init__(self, config: RTNConfig, scale_dtype: torch.dtype = torch.float16) -> None:
        self.config = config
        self.scale_dtype = scale_dtype
        self.needs_importance = config.optimized
        self.name = "opt-RTN" if config.optimized else "RTN"

    def needs_hessian(self, layer: LayerTask) -> bool:
        return False

    def quantize_block(self, task: BlockTask) -> BlockResult:
        device = task.layers[0].weight.device if task.layers else torch.device("cpu")
        rounded = partial(quantize_layer, optimized=self.config.optimized, scale_dtype=self.scale_dtype)
        return BlockResult(parallel_map(rounded, task.layers, device))
