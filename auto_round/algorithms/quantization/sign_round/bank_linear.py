"""A linear layer whose rounding is being tuned. Its weight and learnables live in a bank."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.algorithms.quantization.sign_round.layer_bank import LayerBank


class _FusedLinear(torch.autograd.Function):
    """`x @ W.T + bias` whose backward hands dL/dW to the bank instead of to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: BankLinear) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.quantized, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grad_outputs
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        flat = grad.reshape(-1, grad.shape[-1])
        layer.bank.add_weight_gradient(layer.index, flat, x.reshape(-1, x.shape[-1]))
        grad_x = (flat @ layer.quantized).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None


class BankLinear(torch.nn.Module):
    """Stands in for the linear `bank.tasks[index]` while its block is tuned."""

    anchor: torch.Tensor

    def __init__(self, bank: LayerBank, index: int) -> None:
        super().__init__()
        task = bank.tasks[index]
        self.bank, self.index = bank, index
        self.bias = None if task.bias is None else task.bias.to(bank.compute_dtype)
        # autograd calls backward only if some input of the function wants a gradient, and the block's input does not
        self.anchor = torch.zeros(1, requires_grad=True, device=task.weight.device)
        self.quantized = bank.weight(index)
        self.activation = task.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.quantized.dtype)
        if self.activation is not None:
            x = self.activation(x)
        return _FusedLinear.apply(x, self.anchor, self)
