"""Kernels that multiply with packed integer weights; this file has their base class `LinearKernel`.

A kernel is built from exact integer codes and can return them. The modules beside this one are imported when a
layer first needs them.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

# What every kernel for packed integer weights is: built from exact codes, and able to give them back.


@dataclass(frozen=True)
class LayerSpec:
    """What a kernel must know to say whether it can run a layer.

    Attributes:
        bits: of a weight.
        group_size: weights that share a scale along the input; `in_features` where a row has one scale.
        sym: whether all zero points are 2**(bits - 1).
        in_features, out_features: of the layer.
        dtype: of the model, in which inputs arrive.
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
    """W = scale * (code - zero), exact, with groups that follow each other along the input.

    Attributes:
        codes: uint8 [out, in].
        scales: [out, groups], in the file's dtype.
        zeros: uint8 [out, groups].
        spec: the layer's sizes.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    spec: LayerSpec


class JoinedKernels(Protocol):
    """The kernels of a mixture's experts in one launch, with nothing that the host would have to wait for."""

    def __call__(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [rows, in] sorted by expert -> [rows, out]; no bias.

        Args:
            offsets: int32 [experts + 2] on the device: where the rows of each expert start, where those of no expert
                do, which become zeros, and the number of rows.
        """


class LinearKernel(nn.Module):
    """x -> x W^T from a layout of its own.

    Its tensors are buffers that are not saved (`persistent=False`); the layer that owns it writes the checkpoint's
    layout from `codes()`, and keeps `scales` and zero points as in the file.
    """

    def __init__(self, weight: IntegerWeight) -> None:
        """Pack `weight`. Called once, on the device where the layer runs; it must not keep `weight.codes`."""
        super().__init__()
        self.spec = weight.spec

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """None when it can run such a layer on this machine, or the reason why not."""

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of `x`; no bias. Inputs may be strided and of any floating dtype."""

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """The exact uint8 [out, in] that it was built from."""

    @classmethod
    def grouped(cls, kernels: Sequence[LinearKernel], x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Experts of one mixture, each on its own rows; no bias.

        Args:
            kernels: one for each expert, all of this class and of the same sizes.
            x: [rows, in], sorted by expert.
            counts: how many of the rows belong to each expert; they add up to `rows`.

        Returns:
            [rows, out] in the dtype of `x`. Kernels that can do it in one call override this loop.
        """
        y = x.new_empty(x.shape[0], kernels[0].spec.out_features)
        start = 0
        for kernel, count in zip(kernels, counts, strict=True):
            if count:
                y[start : start + count] = kernel(x[start : start + count])
            start += count
        return y

    @classmethod
    def join(cls, kernels: Sequence[LinearKernel]) -> JoinedKernels | None:
        """One object that runs experts by offsets on the device; None where only `grouped` does."""
        return None


def kernel_class(path: str) -> type[LinearKernel]:
    """The class at "package.module:Class". Kernels are imported when they are first asked for."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, LinearKernel)
    return found
