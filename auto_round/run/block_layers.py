"""Layers of the current block: their tasks, weights and dtypes, input scales and shared scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from auto_round import envs
from auto_round.algorithms.base import LayerTask
from auto_round.calibration.observers import MinMaxObserver
from auto_round.codecs.activation import ActivationQuantizer, static_quantizer
from auto_round.codecs.block_float import global_scale_of
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.minifloat import tensor_absmax
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.blocks import set_weight_2d, weight_2d
from auto_round.modeling.layer_rules import fused_groups, is_routed_expert
from auto_round.modeling.source import ModelSource
from auto_round.run.plan import LayerPlan
from auto_round.schemes import QuantizationScheme


def layer_task(source: ModelSource, plan: LayerPlan) -> LayerTask:
    """The task of a linear layer, with the source's own weight and bias."""
    module = source.model.get_submodule(plan.name)
    task = LayerTask(plan.name, module, weight_2d(module), plan.scheme, transposed=plan.transposed, ggml=plan.ggml)
    return with_loaded_weights(task)


def with_loaded_weights(task: LayerTask) -> LayerTask:
    """The task with the weight [out, in] and bias that its module has now."""
    bias = getattr(task.module, "bias", None)
    return replace(task, weight=weight_2d(task.module).detach(), bias=None if bias is None else bias.detach())


def install_weight(task: LayerTask, layer: QuantizedLayer | None) -> None:
    """Replace a module's weight by the dequantized one of its layer; without a layer, restore it if it was freed."""
    freed = task.module.weight
    assert isinstance(freed, torch.nn.Parameter)
    weight = task.weight if layer is None else layer.dequantize().to(task.weight.device)
    if freed.numel() == 0:
        cast = weight.to(freed.dtype)
        task.module.weight = torch.nn.Parameter(cast.t() if task.transposed else cast, requires_grad=False)
    elif layer is not None:
        set_weight_2d(task.module, weight)


@contextmanager
def in_dtype(module: torch.nn.Module, model_dtype: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    """Cast a module's tensors in the model's dtype to `dtype` for a while. Others (a router's bias in float32) and
    packed layers are left unchanged."""
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for owner in (part for part in module.modules() if not isinstance(part, PackedLinear)):
        stores: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for store in stores:
            for leaf, tensor in store.items():
                if tensor is None or tensor.dtype != model_dtype or tensor.dtype == dtype or tensor.is_meta:
                    continue
                cast = tensor.detach().to(dtype)
                before.append((store, leaf, tensor))
                store[leaf] = torch.nn.Parameter(cast, False) if isinstance(tensor, torch.nn.Parameter) else cast
    try:
        yield
    finally:
        for store, leaf, tensor in before:
            store[leaf] = tensor


def activation_of(
    scheme: QuantizationScheme, name: str, extremes: MinMaxObserver, stored: torch.dtype
) -> ActivationQuantizer | None:
    """The input quantizer of a layer, `name` in `extremes`, or None. `stored`: dtype of static scales in the files,
    unless the codec has one of its own. Raises NumericsError when a static scale has no calibration token or is NaN."""
    wanted = scheme.activations
    if wanted is None or not wanted.calibrated:
        return None if wanted is None else ActivationQuantizer(wanted)
    low, high = extremes.of(name)
    if wanted.has_global_scale:
        return ActivationQuantizer(wanted, global_scale=global_scale_of(torch.maximum(-low, high)).cpu())
    return static_quantizer(wanted, low, high, codec_of(wanted).input_scale_dtype or stored)


def input_quantizers(layer: QuantizedLayer) -> list[ActivationQuantizer]:
    """The quantizer of a quantized layer's inputs, if its scheme has one."""
    scheme = layer.scheme.activations
    scales = layer.act_scale, layer.act_zero_point, layer.act_global_scale
    return [] if scheme is None else [ActivationQuantizer(scheme, *scales)]


def share_input_ranges(extremes: MinMaxObserver, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Give layers one input range where runtimes need one input scale: fused layers with a global scale (NVFP4), and
    with AR_ENABLE_UNIFY_MOE_INPUT_SCALE routed experts. `schemes`: of layers with static input scales."""
    groups: list[Sequence[str]] = []
    if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE:
        under_global = [n for n, s in schemes.items() if s.activations is not None and s.activations.has_global_scale]
        groups += fused_groups(under_global, across_experts=False)
    if envs.AR_ENABLE_UNIFY_MOE_INPUT_SCALE:
        groups += fused_groups([n for n in schemes if is_routed_expert(n)])
    for group in groups:
        found = [extremes[name] for name in group if name in extremes]
        if found:
            low, high = torch.stack([pair[0] for pair in found]).min(), torch.stack([pair[1] for pair in found]).max()
            extremes.update(dict.fromkeys(group, (low, high)))


def share_global_scales(tasks: Sequence[LayerTask]) -> None:
    """Set one `global_scale` (NVFP4) for each group of fused layers in a block: that of the largest weight in it."""
    owners = {task.name: task for task in tasks if task.codec.has_global_scale}
    groups = fused_groups(owners, across_experts=False) if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE else []
    for group in groups:
        largest = torch.stack([tensor_absmax(owners[n].weight) for n in group]).max()
        for name in group:
            owners[name].global_scale = global_scale_of(largest)
