"""Activation quantization: find the function of a data type and fake-quantize the inputs of linear layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.codecs.registry import ACTIVATION_PREFIX, QUANT_FUNC_WITH_DTYPE, QuantFunc, find_quant_func
from auto_round.errors import UnsupportedError, nearest
from auto_round.schemes import ActivationScheme


def activation_function(scheme: ActivationScheme) -> QuantFunc:
    """The registered function that quantizes inputs: `act_` and the data type's name, or the data type's own. Raises
    UnsupportedError when there is none, or none for the static scales of the scheme."""
    function = find_quant_func(ACTIVATION_PREFIX + scheme.data_type, scheme.bits, scheme.sym)
    function = function or find_quant_func(scheme.data_type, scheme.bits, scheme.sym)
    if function is None:
        known = sorted(QUANT_FUNC_WITH_DTYPE)
        raise UnsupportedError(
            f"activations of data type {scheme.data_type!r} with {scheme.bits} bits are not available in this version"
            f"{nearest(scheme.data_type, known)} Available: {', '.join(known)}"
        )
    if not scheme.dynamic and not {"scale", "tensor_max"} <= set(inspect.signature(function).parameters):
        raise UnsupportedError(
            f"data type {scheme.data_type!r} has no static activations: its function takes no 'scale' and "
            "'tensor_max'; leave act_dynamic at True"
        )
    return function


@dataclass(frozen=True, eq=False)
class ActivationQuantizer:
    """Fake quantization of a layer's inputs, before its matrix product."""

    scheme: ActivationScheme
    scale: Tensor | None = None  # float32 scalar, for static activations
    zero_point: int | None = None  # code of 0.0 in the signed range, for static asymmetric ones
    global_scale: Tensor | None = None  # calibrated float32 scalar to which computed scales are relative (NVFP4)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., in] fake-quantized, in its shape and dtype; gradients pass straight through."""
        if x.numel() == 0:  # an expert that no token reached
            return x
        scheme = self.scheme
        static: dict[str, Any] = {} if self.global_scale is None else {"global_scale": self.global_scale}
        if not scheme.dynamic:
            static = {"scale": self.scale, "zero_point": self.zero_point}
        known = {"bits": scheme.bits, "group_size": scheme.group_size, "data_type": scheme.data_type}
        return activation_function(scheme)(x, scale_dtype=x.dtype, **known, **static)[0]

    def hook(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])


def static_quantizer(scheme: ActivationScheme, low: Tensor, high: Tensor, stored: torch.dtype) -> ActivationQuantizer:
    """A static quantizer for inputs between `low` and `high`, scalars; its scale is exact in the dtype `stored`."""
    zero_input = torch.zeros(1, 1, dtype=torch.float32, device=low.device)  # only the scale counts
    _, scale, zero = activation_function(scheme)(
        zero_input, bits=scheme.bits, group_size=0, data_type=scheme.data_type, scale_dtype=stored,
        tensor_min=low.float(), tensor_max=high.float(),
    )  # fmt: skip
    limits = torch.finfo(stored)
    rounded = scale.detach().float().reshape(()).clamp(limits.tiny, limits.max).to(stored).float().cpu()
    return ActivationQuantizer(scheme, rounded, None if scheme.sym else int(zero))


@contextmanager
def quantized_inputs(modules: Mapping[torch.nn.Module, ActivationQuantizer]) -> Iterator[None]:
    """Context in which the given modules quantize their inputs."""
    handles = [module.register_forward_pre_hook(quantizer.hook) for module, quantizer in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
