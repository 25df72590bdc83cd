"""How the inputs of quantized layers are quantized in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from auto_round import envs
from auto_round.calibration.extremes import InputExtremes
from auto_round.data_type.activation import ActivationQuantizer, static_quantizer
from auto_round.data_type.float_family import float_family
from auto_round.data_type.float_scales import global_scale_of
from auto_round.modeling.fused import fused_groups, is_routed_expert
from auto_round.schemes import QuantizationScheme


def is_calibrated(scheme: QuantizationScheme) -> bool:
    """Whether a scale of the inputs is fixed by calibration data."""
    return scheme.activations is not None and scheme.activations.calibrated


def activation_of(
    scheme: QuantizationScheme, name: str, extremes: InputExtremes, stored: torch.dtype
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
    if float_family(wanted.data_type, wanted.bits) is not None:
        stored = torch.bfloat16
    return static_quantizer(wanted, low, high, stored)


def join_extremes(extremes: InputExtremes, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Give layers the same extremes whose input scales runtimes want to be one.

    Layers with a global scale (NVFP4) that are joined share theirs unless AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE is off;
    routed experts theirs with AR_ENABLE_UNIFY_MOE_INPUT_SCALE.

    Args:
        schemes: by layer name, as in `extremes`, of the layers whose input scales are fixed.
    """
    if envs.AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE:
        under_global = [n for n, s in schemes.items() if s.activations is not None and s.activations.has_global_scale]
        for group in fused_groups(under_global, across_experts=False):
            _join(extremes, group)
    if envs.AR_ENABLE_UNIFY_MOE_INPUT_SCALE:
        for group in fused_groups([n for n in schemes if is_routed_expert(n)]):
            _join(extremes, group)


def _join(extremes: InputExtremes, group: Sequence[str]) -> None:
    found = [extremes[name] for name in group if name in extremes]
    if found:
        low, high = torch.stack([pair[0] for pair in found]).min(), torch.stack([pair[1] for pair in found]).max()
        extremes.update(dict.fromkeys(group, (low, high)))


def attach(model: torch.nn.Module, activations: Mapping[str, ActivationQuantizer]) -> None:
    """From now on the named layers of a model that stays in memory quantize their inputs."""
    for name, quantizer in activations.items():
        model.get_submodule(name).register_forward_pre_hook(quantizer.hook)
