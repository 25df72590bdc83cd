"""Kernels that multiply with packed integer weights: their base class `LinearKernel`.

The other modules of this package are imported when a layer first needs them.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

# The kernels of all experts of a mixture: (x [rows, in] sorted by expert, offsets int32 [experts + 2] on the device) ->
# [rows, out], without bias. Offsets are the first row of each expert, the first row without an expert (their results
# are zeros), and the number of rows.
JoinedKernels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerSpec:
    """Properties of a layer that decide whether a kernel can run it."""

    bits: int
    group_size: int  # weights that share a scale along the input; `in_features` for one scale per row
    sym: bool  # whether all zero points are 2**(bits - 1)
    in_features: int
    out_features: int
    dtype: torch.dtype  # of the model and of the inputs
    device: str  # the kind of device, such as "cpu"


@dataclass(frozen=True)
class IntegerWeight:
    """W = scale * (code - zero), exact, with contiguous groups along the input."""

    codes: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # [out, groups], in the file's dtype
    zeros: torch.Tensor  # uint8 [out, groups]
    spec: LayerSpec


class LinearKernel(nn.Module):
    """x -> x W^T, with W in the kernel's own layout, which is not saved: the layer gets it back from `codes()`."""

    def __init__(self, weight: IntegerWeight) -> None:
        """Pack `weight`. Called on the device where the layer runs; must not keep a reference to `weight.codes`."""
        super().__init__()
        self.spec = weight.spec

    def hold(self, **buffers: torch.Tensor | None) -> None:
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Why the kernel cannot run, on this machine, a layer that its row in the table allows, or None."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of `x`; no bias. Inputs may be strided and of any floating dtype."""
        shape = (*x.shape[:-1], self.spec.out_features)
        if not x.numel():
            return x.new_empty(shape)
        return self.multiply(x.reshape(-1, self.spec.in_features)).to(x.dtype).reshape(shape)

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Of kernels that do not override `forward`: rows [n, in], strided, in any floating dtype -> [n, out]."""

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """The exact codes uint8 [out, in] that the kernel was built from."""

    @classmethod
    def grouped(cls, kernels: Sequence[LinearKernel], x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Products of experts of equal sizes: x [rows, in], `counts` of them for each, -> [rows, out]; no bias."""
        parts = zip(kernels, x.split(list(counts)), strict=True)
        found = [kernel(part) for kernel, part in parts if len(part)]
        return torch.cat(found) if found else x.new_empty(0, kernels[0].spec.out_features)

    @classmethod
    def join(cls, kernels: Sequence[LinearKernel]) -> JoinedKernels:
        """A function that runs all experts of a mixture, in one launch where the kernel can."""

        def run(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            *counts, spare = offsets.diff().tolist()
            y = cls.grouped(kernels, x[: len(x) - spare], counts)
            return torch.cat((y, y.new_zeros(spare, y.shape[1]))) if spare else y

        return run


def kernel_class(path: str) -> type[LinearKernel]:
    """Import the kernel at "package.module:Class"."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, LinearKernel)
    return found
