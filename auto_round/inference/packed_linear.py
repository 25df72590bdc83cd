"""What linear layers with packed weights share, whatever their layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from auto_round.data_type.activation import ActivationQuantizer
from auto_round.inference.compute import compute_dtype_for
from auto_round.inference.config_reader import LayerFormat
from auto_round.quantized_layer import QuantizedLayer
from auto_round.schemes import QuantizationScheme

PLAIN = "torch"
"""Backends in plain PyTorch, by the name of their group."""


class PackedLinear(nn.Module):
    """y = x W^T + bias, with W [out, in] packed in buffers that are named and shaped as in the checkpoint.

    Attributes:
        words: name of the buffer that holds the codes.
        kept: names of buffers that keep the file's dtype when the module is cast: rounding float16 scales to bfloat16
            would damage every weight.
        backend: name of the table's row that runs it.
    """

    words: str
    kept: tuple[str, ...]
    in_features: int
    out_features: int
    format: LayerFormat
    bits: int
    dtype: torch.dtype
    bias: torch.Tensor | None
    backend: str = PLAIN

    @property
    def activation(self) -> ActivationQuantizer | None:
        """What is done to the inputs before the product, None for nothing."""
        return None

    @abstractmethod
    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The exact (codes uint8 [out, in], scales [out, groups] as stored, zero points uint8 [out, groups])."""

    def layer(self, name: str) -> QuantizedLayer:
        """What the buffers hold, as it was before it was packed; without the bias."""
        codes, scale, zero = self.unpack()
        step = self.activation
        return QuantizedLayer(
            name, QuantizationScheme(bits=self.bits, group_size=self.format.group_size, sym=self.format.sym), codes,
            scale, zero, act_scale=None if step is None else step.scale,
            act_zero_point=None if step is None else step.zero_point,
        )  # fmt: skip

    @abstractmethod
    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W transposed, [in, out]."""

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Call once the buffers are filled. `name` is for messages. Raises ModelError for what cannot be run."""

    @property
    def is_loaded(self) -> bool:
        """Whether the codes are here; offloaded layers are on meta until they run."""
        return not self.get_buffer(self.words).is_meta

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in]: `scale * (code - zero)` computed in float32 and rounded once to `dtype`."""
        return self._dense(dtype).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        compute = compute_dtype_for(x.device, x.dtype)
        y = torch.matmul(x.to(compute), self._dense(compute))
        if self.bias is not None:
            y = y + self.bias.to(compute)
        return y.to(x.dtype)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on inputs that are quantized first: as an ordinary linear layer computes it, to the last bit,
        because rounding inputs to codes magnifies any difference."""
        step = self.activation
        x = x if step is None else step(x)
        compute = compute_dtype_for(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        return nn.functional.linear(x.to(compute), self.dequantize(compute), bias).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        before = {name: tensor for name in self.kept if (tensor := getattr(self, name)) is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self.get_buffer(name)
            if after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.format.group_size}, sym={self.format.sym}, "
            f"packing={self.format.packing}"
        )
