"""Helpers for the layers of the current block: swap weights, cast dtypes, fix input and shared scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from auto_round import envs
from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.encode_layer import minifloat_spec
from auto_round.calibration.observers import MinMaxObserver
from auto_round.codecs.activation import ActivationQuantizer, static_quantizer
from auto_round.codecs.block_float import block_float_spec, global_scale_of
from auto_round.codecs.int import FP16_MAX
from auto_round.codecs.minifloat import tensor_absmax
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.blocks import set_weight_2d, weight_2d
from auto_round.modeling.layer_rules import fused_groups, is_routed_expert
from auto_round.schemes import QuantizationScheme


def install_dequantized(task: LayerTask, layer: QuantizedLayer) -> None:
    """Put the dequantized weight in place of the original."""
    weight = layer.dequantize(torch.float32).to(task.weight.device)
    own = task.module.weight
    assert isinstance(own, torch.nn.Parameter)
    if own.numel() == 0:  # dropped before tuning
        made = weight.to(own.dtype)
        task.module.weight = torch.nn.Parameter(made.t() if task.transposed else made, requires_grad=False)
    else:
        set_weight_2d(task.module, weight)


def restore_weight(task: LayerTask) -> None:
    """The original weight of a layer that stays, where it was dropped before tuning."""
    own = task.module.weight
    assert isinstance(own, torch.nn.Parameter)
    if own.numel() == 0:
        made = task.weight.to(own.dtype)
        task.module.weight = torch.nn.Parameter(made.t() if task.transposed else made, requires_grad=False)


def free_cast_copies(tasks: Sequence[LayerTask]) -> None:
    """Free the weights that were cast to run the block in full precision: quantizers start from the source's own."""
    for task in tasks:
        weight = weight_2d(task.module)
        if weight.dtype != task.weight.dtype:
            task.module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


def with_loaded_weights(task: LayerTask) -> LayerTask:
    """A layer whose weights were nowhere when the task was made, and are in memory now."""
    bias = getattr(task.module, "bias", None)
    weight = weight_2d(task.module).detach()
    return replace(task, weight=weight, bias=None if bias is None else bias.detach())


# A block in another dtype for as long as it is worked on.


@contextmanager
def in_dtype(module: torch.nn.Module, model_dtype: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of `module` that have the model's dtype, in `dtype`; afterwards the tensors of before
    are back, untouched.

    What a model keeps in another dtype (a router's bias in float32) stays so: the model's own code expects it. Packed
    layers take care of their own dtypes.
    """
    before = []
    for owner in module.modules():
        if isinstance(owner, PackedLinear):
            continue
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


# How the inputs of quantized layers are quantized in a run.


def is_calibrated(scheme: QuantizationScheme) -> bool:
    """Whether a scale of the inputs is fixed by calibration data."""
    return scheme.activations is not None and scheme.activations.calibrated


def activation_of(
    scheme: QuantizationScheme, name: str, extremes: MinMaxObserver, stored: torch.dtype
) -> ActivationQuantizer | None:
    """The step of one layer; None when its inputs stay in full precision.

    Args:
        name: of the layer in `extremes`, which are used for fixed scales only.
        stored: dtype in which a static scale is stored, the model's. Static scales of FP8 are bfloat16 in any model.

    Raises:
        NumericsError: a fixed scale without any calibration token, or of NaN.
    """
    wanted = scheme.activations
    if wanted is None:
        return None
    if not wanted.calibrated:
        return ActivationQuantizer(wanted)
    low, high = extremes.of(name)
    if wanted.has_global_scale:
        return ActivationQuantizer(wanted, global_scale=global_scale_of(torch.maximum(-low, high)).cpu())
    if block_float_spec(wanted.data_type, wanted.bits) is not None:
        stored = torch.bfloat16
    return static_quantizer(wanted, low, high, stored)


def share_input_ranges(extremes: MinMaxObserver, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Give layers the same extremes whose input scales runtimes want to be one.

    Layers with a global scale (NVFP4) that are joined share theirs unless AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE is off;
    routed experts theirs with AR_ENABLE_UNIFY_MOE_INPUT_SCALE.

    Args:
        schemes: by layer name, as in `extremes`, of the layers whose input scales are fixed.
    """
    if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE:
        under_global = [n for n, s in schemes.items() if s.activations is not None and s.activations.has_global_scale]
        for group in fused_groups(under_global, across_experts=False):
            _share_range(extremes, group)
    if envs.AR_ENABLE_UNIFY_MOE_INPUT_SCALE:
        for group in fused_groups([n for n in schemes if is_routed_expert(n)]):
            _share_range(extremes, group)


def _share_range(extremes: MinMaxObserver, group: Sequence[str]) -> None:
    found = [extremes[name] for name in group if name in extremes]
    if found:
        low, high = torch.stack([pair[0] for pair in found]).min(), torch.stack([pair[1] for pair in found]).max()
        extremes.update(dict.fromkeys(group, (low, high)))


def attach_activation_hooks(model: torch.nn.Module, activations: Mapping[str, ActivationQuantizer]) -> None:
    """From now on the named layers of a model that stays in memory quantize their inputs."""
    for name, quantizer in activations.items():
        model.get_submodule(name).register_forward_pre_hook(quantizer.hook)


# One global scale for the weights of layers that runtimes join (NVFP4).


def share_global_scales(tasks: Sequence[LayerTask]) -> None:
    """Set `global_scale` of the layers of a block whose type has one: the smallest of those that are joined, which is
    the one that the largest weight among them asks for. With AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE off, each its own."""
    owners = {task.name: task for task in tasks if _has_global_scale(task)}
    groups = fused_groups(owners, across_experts=False) if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE else []
    for group in groups:
        largest = torch.stack([tensor_absmax(owners[n].weight) for n in group]).max()
        for name in group:
            owners[name].global_scale = global_scale_of(largest)


def _has_global_scale(task: LayerTask) -> bool:
    family = minifloat_spec(task.scheme)
    return family is not None and family.has_global_scale


# Scales that were too large for the dtype they are stored in, and are its largest value instead.


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
