"""How the inputs of quantized layers are quantized in a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.calibration.extremes import InputExtremes
from auto_round.data_type.activation import ActivationQuantizer, static_quantizer
from auto_round.schemes import QuantizationScheme


def is_static(scheme: QuantizationScheme) -> bool:
    """Whether the scale of the inputs is fixed by calibration data."""
    return scheme.activations is not None and not scheme.activations.dynamic


def activation_of(
    scheme: QuantizationScheme, name: str, extremes: InputExtremes, stored: torch.dtype
) -> ActivationQuantizer | None:
    """The step of one layer; None when its inputs stay in full precision.

    Args:
        name: of the layer in `extremes`, which are used for static scales only.
        stored: dtype in which a static scale is stored, the model's.

    Raises:
        NumericsError: a static scale without any calibration token, or of NaN.
    """
    wanted = scheme.activations
    if wanted is None:
        return None
    return ActivationQuantizer(wanted) if wanted.dynamic else static_quantizer(wanted, *extremes.of(name), stored)


def attach(model: torch.nn.Module, activations: Mapping[str, ActivationQuantizer]) -> None:
    """From now on the named layers of a model that stays in memory quantize their inputs."""
    for name, quantizer in activations.items():
        model.get_submodule(name).register_forward_pre_hook(quantizer.hook)
