"""`PackedLinear`: a linear layer that keeps its weight as stored in the checkpoint and dequantizes it for each call.

It runs every `Layout`, in plain PyTorch. `qlinear.QuantLinear` adds kernels for GPTQ and AWQ, `ScaledMmLinear` runs FP8
in hardware.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import LayerFormat
from auto_round.layouts.floats import FloatLayout

# Private operators of PyTorch that tell whether the CPU has matrix instructions for a dtype.
_CPU_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# Name of the group of backends in plain PyTorch.
TORCH_BACKEND = "torch"
# Dtypes in which a file may store scales and biases, whatever the layout's own.
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=2)
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a half-precision dtype, so that products are not emulated (slowly).

    False when PyTorch cannot tell.
    """
    check = getattr(torch.ops.mkldnn, _CPU_CHECKS.get(dtype, ""), None)
    return bool(check()) if check is not None else False


def compute_dtype_for(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 (which holds all its values) for a half precision that the CPU has no instructions for."""
    exact = torch.device(device).type != "cpu" or dtype not in _CPU_CHECKS or cpu_multiplies(dtype)
    return dtype if exact else torch.float32


class PackedLinear(nn.Module):
    """y = q(x) W^T + bias, with W [out, in] packed in buffers that are named and shaped as in the checkpoint (`leaves`,
    the codes first), and q the quantization of inputs, if any. `backend` is the name of the table's row that runs it.

    All buffers but `bias` keep the file's dtype when the module is cast: rounding float16 scales to bfloat16 would
    damage every weight.
    """

    bias: torch.Tensor | None
    backend: str = TORCH_BACKEND

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, stored: Mapping[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """An empty layer. Raises UnsupportedError when the layout cannot hold a layer of this shape.

        `dtype` is the model's, `stored` are those of the file's tensors: scales may have another than the layout's.
        """
        super().__init__()
        problem = fmt.layout.mismatch(fmt.scheme, in_features, out_features)
        if problem is not None:
            raise UnsupportedError(f"a layer of {out_features} x {in_features} cannot be packed: {problem}")
        self.in_features, self.out_features, self.format, self.dtype = in_features, out_features, fmt, dtype
        specs = fmt.layout.specs(fmt.scheme, in_features, out_features, dtype)
        self.leaves = tuple(specs)
        for leaf, (shape, usual) in specs.items():
            kind = (stored or {}).get(leaf, usual)
            # Codes and scales of one byte are defined by their dtype.
            replaceable = leaf != self.leaves[0] and usual.is_floating_point and usual.itemsize > 1 and kind in _WIDE
            self.register_buffer(leaf, torch.zeros(shape, dtype=kind if replaceable else usual, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def is_loaded(self) -> bool:
        """Whether the codes are in memory; offloaded layers are on meta until they run."""
        return not self.get_buffer(self.leaves[0]).is_meta

    @property
    def activation(self) -> ActivationQuantizer | None:
        """The quantizer of the inputs; None when they are not quantized."""
        scheme = self.format.scheme.activations
        if scheme is None:
            return None
        scale, zero, above = (self._buffers.get(f"input_{leaf}") for leaf in ("scale", "zero_point", "global_scale"))
        return ActivationQuantizer(
            scheme, None if scale is None else scale.float().reshape(()), None if zero is None else int(zero),
            None if above is None else above.float().reshape(()),
        )  # fmt: skip

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Check the filled buffers. Raises ModelError, with the layer's `name`, when a scale is not finite."""
        for leaf in self.leaves[1:]:
            scale = self.get_buffer(leaf)
            e8m0 = scale.dtype == torch.uint8 and isinstance(self.format.layout, FloatLayout)
            if not bool((scale != 255 if e8m0 else torch.isfinite(scale.float())).all()):
                raise ModelError(f"{name or 'layer'}: {leaf} holds NaN or Inf; fetch the files again")

    def layer(self, name: str = "") -> QuantizedLayer:
        """The quantized layer that the buffers hold, without the bias."""
        fmt, tensors = self.format, {leaf: self.get_buffer(leaf) for leaf in self.leaves}
        return fmt.layout.unpack(name, fmt.scheme, tensors, self.in_features, self.out_features)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in], computed in float32 and rounded once to `dtype`."""
        fmt, tensors = self.format, {leaf: self.get_buffer(leaf) for leaf in self.leaves}
        return fmt.layout.dequantize(fmt.scheme, tensors, self.in_features, self.out_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Bit for bit the product of `nn.Linear`: rounding the next layer's inputs to codes magnifies any difference.
        step = self.activation
        x = x if step is None else step(x)
        compute = compute_dtype_for(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        return nn.functional.linear(x.to(compute), self.dequantize(compute), bias).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        before = {leaf: tensor for leaf in self.leaves if (tensor := self._buffers[leaf]) is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for leaf, tensor in before.items():
            after = self.get_buffer(leaf)
            if after.dtype != tensor.dtype:
                setattr(self, leaf, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        scheme = self.format.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={scheme.bits}, group_size={scheme.group_size}, sym={scheme.sym}, packing={self.format.packing}"
        )


class ScaledMmLinear(PackedLinear):
    """FP8 weights with scales per channel or tensor and static inputs, by `torch._scaled_mm`: FP8 products with float32
    sums in hardware (CUDA, compute capability 8.9 and above), otherwise in plain PyTorch.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The hardware works on tiles of 16.
        fits = x.device.type == "cuda" and self.in_features % 16 == 0 and self.out_features % 16 == 0 and x.numel() > 0
        return self.multiply(x) if fits else super().forward(x)

    @torch.no_grad()
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of `x`. Scales are applied to the float32 sums."""
        top = torch.finfo(self.weight.dtype).max
        scale = self.input_scale.float().reshape(())
        codes = (x.reshape(-1, self.in_features).float() / scale).clamp_(-top, top).to(self.weight.dtype)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        sums = torch._scaled_mm(codes, self.weight.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32)
        sums.mul_(self.weight_scale.float().reshape(1, -1))
        if self.bias is not None:
            sums.add_(self.bias.float())
        return sums.to(x.dtype).view(*x.shape[:-1], self.out_features)
