"""Linear layers with weights of the small float types, and the hardware's own FP8 product where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auto_round.data_type.activation import ActivationQuantizer
from auto_round.errors import ModelError
from auto_round.inference.config_reader import LayerFormat
from auto_round.inference.packed_linear import PackedLinear
from auto_round.quantized_layer import QuantizedLayer
from auto_round.schemes import QuantizationScheme

_WIDE = (torch.float32, torch.bfloat16, torch.float16)


class FloatLinear(PackedLinear):
    """y = q(x) W^T + bias, with W [out, in] of a small float type and q the quantization of inputs, if any.

    Buffers are named and shaped as in the checkpoint, see `export.float_layouts`; all but `bias` keep the file's dtype
    when the module is cast. In plain PyTorch, on any device: weights are dequantized for each call.
    """

    scheme: QuantizationScheme
    weight_scale: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, stored: Mapping[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """`stored`: dtypes of the file's tensors; scales kept in another float dtype than the usual one are taken."""
        super().__init__()
        assert fmt.scheme is not None
        self.in_features, self.out_features, self.format, self.scheme = in_features, out_features, fmt, fmt.scheme
        self.bits, self.dtype = fmt.bits, dtype
        specs = fmt.naming.specs(fmt.scheme, in_features, out_features)
        self.kept = tuple(specs)
        self.words = self.kept[0]
        for name, (shape, usual) in specs.items():
            kind = (stored or {}).get(name, usual)
            if name == self.words or usual.itemsize == 1 or kind not in _WIDE:
                kind = usual  # the meaning of single bytes hangs on their dtype
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    def check_dtypes(self, name: str, stored: Mapping[str, torch.dtype]) -> None:
        """Raise ModelError when a tensor of the file has another dtype than the buffer that is to hold it."""
        for leaf in self.kept:
            wanted = self.get_buffer(leaf).dtype
            if stored.get(leaf, wanted) != wanted:
                raise ModelError(
                    f"tensor {name}.{leaf} is {stored[leaf]}, but layout {self.format.packing} of its "
                    f"quantization_config has {wanted}"
                )

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Raises ModelError when a scale is not finite."""
        for leaf in self.kept[1:]:
            scale = self.get_buffer(leaf)
            finite = scale != 255 if scale.dtype == torch.uint8 else torch.isfinite(scale.float())
            if not bool(finite.all()):
                raise ModelError(f"{name or 'layer'}: {leaf} holds NaN or Inf; fetch the files again")

    def layer(self, name: str) -> QuantizedLayer:
        tensors = {leaf: self.get_buffer(leaf) for leaf in self.kept}
        return self.format.naming.read(name, self.scheme, tensors, self.in_features, self.out_features)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes uint8 [out, in], float32 scales, zeros)."""
        read = self.layer("")
        assert read.codes is not None and read.scale is not None
        return read.codes, read.scale, torch.zeros_like(read.scale, dtype=torch.uint8)

    @property
    def activation(self) -> ActivationQuantizer | None:
        if self.format.activation is None:
            return None
        scalars = {"scale": "input_scale", "global_scale": "input_global_scale"}
        fixed: dict[str, Any] = {
            key: self.get_buffer(leaf).float().reshape(()) for key, leaf in scalars.items() if leaf in self.kept
        }
        return ActivationQuantizer(self.format.activation, **fixed)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in]: computed in float32 and rounded once to `dtype`."""
        return self.layer("").dequantize(dtype)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.dequantize(dtype).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class ScaledMmLinear(FloatLinear):
    """FP8 weights with a scale a channel or for all, and static inputs, by `torch._scaled_mm`: FP8 times FP8, added up
    in float32 by the hardware (CUDA, compute capability 8.9 and above).

    Shapes that the hardware does not take, and other devices, are computed as in `FloatLinear`.
    """

    weight: torch.Tensor
    input_scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The kernels work on tiles of 16.
        if x.device.type != "cuda" or self.in_features % 16 or self.out_features % 16 or x.numel() == 0:
            return self.linear(x)
        return self.multiply(x)

    @torch.no_grad()
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in] to [..., out] in its dtype. Scales are applied to the float32 sums."""
        top = torch.finfo(self.weight.dtype).max
        scale = self.input_scale.float().reshape(())
        codes = (x.reshape(-1, self.in_features).float() / scale).clamp_(-top, top).to(self.weight.dtype)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        sums = torch._scaled_mm(codes, self.weight.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32)
        sums.mul_(self.weight_scale.float().reshape(1, -1))
        if self.bias is not None:
            sums.add_(self.bias.float())
        return sums.to(x.dtype).view(*x.shape[:-1], self.out_features)
