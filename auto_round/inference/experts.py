"""Run all experts of a mixture-of-experts block with one grouped kernel call per projection.

Without it, each expert needs three calls (gate, up, down).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from auto_round.inference.kernels import LinearKernel
from auto_round.inference.qlinear import QuantLinear
from auto_round.modeling.experts import RoutedExperts


class Projection:
    """The gate, up or down layers of all experts, which have equal sizes and kernels of one class."""

    def __init__(self, layers: Sequence[QuantLinear], kernels: Sequence[LinearKernel]) -> None:
        self.layers, self.kernels = list(layers), list(kernels)
        self.joined = type(kernels[0]).join(self.kernels)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        # The last row, of zeros, is for tokens without an expert.
        self.bias = torch.stack([*biases, torch.zeros_like(biases[0])]) if biases else None

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, offsets: torch.Tensor | list[int]) -> torch.Tensor:
        """x [rows, in] sorted by expert -> [rows, out].

        `offsets`: a tensor of the first row of each expert (see `JoinedKernels`), or a list of rows per expert.
        """
        if isinstance(offsets, torch.Tensor):
            assert self.joined is not None
            y = self.joined(x, offsets)
        else:
            taken = sum(offsets)
            y = type(self.kernels[0]).grouped(self.kernels, x[:taken], offsets)
            if taken < len(x):
                y = torch.cat((y, y.new_zeros(len(x) - taken, y.shape[1])))
        return y if self.bias is None else y + self.bias[chosen].to(y.dtype)


class PackedExperts:
    """Replaces the calls of single layers in `RoutedExperts` while the layers are unchanged (`is_valid`)."""

    def __init__(self, experts: RoutedExperts, projections: dict[str, Projection]) -> None:
        self.experts, self.projections = experts, projections
        self._on_device = all(p.joined is not None for p in projections.values())
        self._layers = [
            (experts.get_submodule(str(index))._modules, leaf, layer, layer.__dict__["_kernel"])
            for usual, projection in projections.items()
            for index, layer in enumerate(projection.layers)
            for leaf in (getattr(experts.leaves[index], usual),)
        ]

    def is_valid(self) -> bool:
        """Whether every layer is still in place, with the same kernel and without hooks."""
        return all(
            modules.get(leaf) is layer and layer.__dict__["_kernel"] is expected_kernel
            and not layer._forward_hooks and not layer._forward_pre_hooks
            for modules, leaf, layer, expected_kernel in self._layers
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [rows, H] sorted by expert, chosen int64 [rows] -> [rows, H]; zeros where `chosen` is not an expert."""
        experts = self.experts
        chosen = chosen.clamp(max=experts.num_experts)
        offsets: torch.Tensor | list[int]
        if self._on_device:
            ends = torch.arange(experts.num_experts + 2, device=chosen.device)
            offsets = torch.searchsorted(chosen, ends, out_int32=True)
        else:
            offsets = torch.bincount(chosen, minlength=experts.num_experts + 1).tolist()[: experts.num_experts]
        up = self.projections["up"](x, chosen, offsets)
        gate = self.projections["gate"](x, chosen, offsets) if "gate" in self.projections else None
        return self.projections["down"](experts.combine(gate, up), chosen, offsets)


def enable_grouped_experts(model: nn.Module) -> int:
    """Enable grouped calls in every `RoutedExperts` of `model` whose layers support it; returns how many do.

    All experts of a projection must have kernels of one class and equal sizes, without a column permutation.
    """
    found = 0
    for experts in model.modules():
        if not isinstance(experts, RoutedExperts):
            continue
        projections = {usual: _projection(experts, usual) for usual in ("gate", "up", "down")[not experts.has_gate :]}
        supported = {usual: projection for usual, projection in projections.items() if projection is not None}
        if len(supported) == len(projections):
            experts.batched = PackedExperts(experts, supported)
            found += 1
    return found


def _projection(experts: RoutedExperts, usual: str) -> Projection | None:
    modules = [
        getattr(experts.get_submodule(str(index)), getattr(leaves, usual))
        for index, leaves in enumerate(experts.leaves)
    ]
    layers = [m for m in modules if isinstance(m, QuantLinear) and m.in_order]
    kernels = [kernel for layer in layers if (kernel := layer.kernel) is not None]
    if len(kernels) < len(modules) or len({(type(kernel), kernel.spec) for kernel in kernels}) != 1:
        return None
    if len({layer.bias is None for layer in layers}) != 1:
        return None
    return Projection(layers, kernels)
