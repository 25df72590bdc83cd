"""Linear layers that a checkpoint leaves in half precision, mostly the head, on CPUs that are slow in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from auto_round.inference.kernels.cpu_dense import HALVES, dense_product, is_slow


class DenseLinear(nn.Linear):
    """An ordinary linear layer, faster where `is_slow`: on a CPU, without gradients, inputs and weight in the same half
    precision. Anything else, another device after `to()` too, is PyTorch's."""

    _slow: frozenset[torch.dtype] = frozenset()

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseLinear:
        """With the same parameters."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
        new._slow = frozenset(filter(is_slow, HALVES))  # now, since `torch.compile` cannot look into it
        return new.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if x.dtype not in self._slow or x.dtype != weight.dtype or not weight.is_cpu or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        product = torch.ops.auto_round.cpu_dense if torch.compiler.is_compiling() else dense_product
        y: torch.Tensor = product(weight, x)
        return y if bias is None else y + bias


def use_dense_linear(model: nn.Module) -> None:
    """Let the ordinary linear layers of `model` that are in a slow precision be `DenseLinear`."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and is_slow(module.weight.dtype):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, DenseLinear.of(module))
