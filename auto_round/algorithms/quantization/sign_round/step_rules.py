"""How a learnable moves, given its gradient: by the sign, by the sign with momentum, or by AdamW."""

from __future__ import annotations

from typing import Protocol

import torch


class StepRule(Protocol):
    """State for one learnable tensor."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """Move `value` in place; `gradient` may be overwritten."""
        ...


class SignStep:
    """`value -= lr * sign(gradient)` (signSGD, Bernstein et al. 2018, arXiv 1802.04434)."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        value.sub_(gradient.sign_(), alpha=lr)


class MomentumSignStep:
    """The sign of a running sum of gradients: `m = momentum * m + g; value -= lr * sign(m)`."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.buffer: torch.Tensor | None = None

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        if self.buffer is None:
            self.buffer = torch.zeros_like(value)
        self.buffer.mul_(self.momentum).add_(gradient)
        value.sub_(self.buffer.sign(), alpha=lr)


class AdamStep:
    """AdamW without weight decay (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.steps = 0
        self.mean: torch.Tensor | None = None
        self.square: torch.Tensor | None = None

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.steps += 1
        self.mean.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = self.square.div(1 - self.beta2**self.steps).sqrt_()
        # Gradients of a mean over many outputs are tiny; an absolute epsilon would stop them. Scale it to the tensor.
        root.add_(root.mean().mul_(1e-4).add_(1e-30))
        value.addcdiv_(self.mean, root, value=-lr / (1 - self.beta1**self.steps))


def make_rule(adam: bool, momentum: float) -> StepRule:
    """A fresh rule for one tensor: AdamW, or the sign of the gradient with or without momentum."""
    if adam:
        return AdamStep()
    return MomentumSignStep(momentum) if momentum > 0 else SignStep()
