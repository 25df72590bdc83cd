"""Layers on Gaudi, through the dequantizing operation that its PyTorch bridge adds."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from auto_round.export.packing.bits import pack_words, unpack_words
from auto_round.inference.kernels.kernel import IntegerWeight, LayerSpec, LinearKernel


class HpuLinear(LinearKernel):
    """x -> x W^T with `torch.ops.hpu.convert_from_uint4`, which turns packed 4-bit codes, scales and zero points into
    a dense W transposed, and a dense product.

    Buffers: `words` int32 [in, out/8], nibble i of word w = code of weight [8w + i, row]; `points` int32
    [groups, out/8], the same for zero points; `steps` bfloat16 [groups, out].
    """

    words: torch.Tensor
    points: torch.Tensor
    steps: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        for name, tensor in operands(weight).items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def refuses(cls, spec: LayerSpec) -> str | None:
        if spec.out_features % 8:
            return f"packs outputs by eight; {spec.out_features} is no multiple"
        if spec.in_features % spec.group_size:
            return f"needs groups of one size: {spec.in_features} inputs are no multiple of {spec.group_size}"
        if importlib.util.find_spec("habana_frameworks") is None:
            return "needs Habana's PyTorch bridge (habana_frameworks), which is not installed"
        importlib.import_module("habana_frameworks.torch.core")
        return None if hasattr(torch.ops.hpu, "convert_from_uint4") else "the bridge has no convert_from_uint4"

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = torch.ops.hpu.convert_from_uint4(self.words, self.steps, self.points, torch.bfloat16)
        return torch.matmul(x.to(torch.bfloat16), dense).to(x.dtype)

    def codes(self) -> torch.Tensor:
        return unpack_words(self.words.T.contiguous(), 4)


def operands(weight: IntegerWeight) -> dict[str, torch.Tensor]:
    """The operation's operands; see `HpuLinear`."""
    return {
        "words": _along_outputs(weight.codes), "points": _along_outputs(weight.zeros),
        "steps": weight.scales.T.to(torch.bfloat16).contiguous(),
    }  # fmt: skip


def _along_outputs(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n], below 16, to int32 [n, out/8]."""
    return pack_words(values, 4).T.contiguous()
