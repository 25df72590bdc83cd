"""Kernels that multiply with packed integer weights: their base class `LinearKernel`.

A kernel is built from exact integer codes and can return them. The other modules of this package are imported when a
layer first needs them.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class LayerSpec:
    """Properties of a layer that decide whether a kernel can run it.

    Attributes:
        group_size: weights that share a scale along the input; `in_features` for one scale per row.
        sym: whether all zero points are 2**(bits - 1).
        dtype: of the model and of the inputs.
        device: kind of device, such as "cpu".
    """

    bits: int
    group_size: int
    sym: bool
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class IntegerWeight:
    """W = scale * (code - zero), exact, with contiguous groups along the input.

    Attributes:
        codes: uint8 [out, in].
        scales: [out, groups], in the file's dtype.
        zeros: uint8 [out, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    spec: LayerSpec


# The kernels of all experts of a mixture in one launch: (x [rows, in] sorted by expert, offsets int32 [experts + 2] on
# the device) -> [rows, out], without bias. Offsets are the first row of each expert, the first row without an expert
# (their results are zeros), and the number of rows.
JoinedKernels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LinearKernel(nn.Module):
    """x -> x W^T, with W in the kernel's own layout.

    Its buffers are not saved (`persistent=False`): the layer writes the checkpoint's layout from `codes()`, and keeps
    `scales` and zero points itself.
    """

    def __init__(self, weight: IntegerWeight) -> None:
        """Pack `weight`. Called on the device where the layer runs; must not keep a reference to `weight.codes`."""
        super().__init__()
        self.spec = weight.spec

    def hold(self, **buffers: torch.Tensor | None) -> None:
        """Register buffers that are not saved."""
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """None when the kernel can run such a layer on this machine, or the reason why not.

        Asked only for layers that the columns of its row in the table allow: device, bits, dtype, requirements.
        """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of `x`; no bias. Inputs may be strided and of any floating dtype."""
        shape = (*x.shape[:-1], self.spec.out_features)
        if not x.numel():
            return x.new_empty(shape)
        return self.multiply(x.reshape(-1, self.spec.in_features)).to(x.dtype).reshape(shape)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Of kernels that do not override `forward`: rows [n, in], strided, in any floating dtype -> [n, out]."""
        raise NotImplementedError

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """The exact codes uint8 [out, in] that the kernel was built from."""

    @classmethod
    def grouped(cls, kernels: Sequence[LinearKernel], x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Products of the experts of one mixture: x [rows, in] sorted by expert -> [rows, out]; no bias.

        Args:
            kernels: one for each expert, all of this class and of the same sizes.
            counts: rows of each expert; their sum is `rows`.
        """
        parts = zip(kernels, x.split(list(counts)), strict=True)
        found = [kernel(part) for kernel, part in parts if len(part)]
        return torch.cat(found) if found else x.new_empty(0, kernels[0].spec.out_features)

    @classmethod
    def join(cls, kernels: Sequence[LinearKernel]) -> JoinedKernels | None:
        """A function that runs all experts in one launch; None when only `grouped` is supported."""
        return None


def kernel_class(path: str) -> type[LinearKernel]:
    """Import the kernel at "package.module:Class"."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, LinearKernel)
    return found
