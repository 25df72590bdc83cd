"""Fake quantization of a piece of a weight and its straight-through gradients, as pure functions of tensors.

With s = s0 f and W = s q, q = clamp(round(w/s + v), low, high) (codes less the zero point), and G = dL/dW, the
straight-through gradients are, inside the clamp,
    dL/dv = G s            dL/df = sum over the group of G s0 (q - w/s)
and outside it dL/dv = 0 and dL/df = sum of G s0 q (AutoRound, arXiv 2309.05516, section 3; the clamp's mask as in LSQ,
arXiv 1902.08153, equation 3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

Limit = torch.Tensor | float
Values = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Limit, Limit], torch.Tensor]
Gradients = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Limit, Limit, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


def _clamp(x: torch.Tensor, low: Limit, high: Limit) -> torch.Tensor:
    if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor):
        return torch.maximum(torch.minimum(x, high), low)
    assert isinstance(low, float | int) and isinstance(high, float | int)
    return x.clamp(low, high)


def quantized_values(
    groups: torch.Tensor, scale: torch.Tensor, v: torch.Tensor, low: Limit, high: Limit
) -> torch.Tensor:
    """W, float32 [rows, groups, group_size].

    Args:
        groups: the weight, [rows, groups, group_size], in any dtype; counted with in float32.
        scale: s, [rows, groups, 1].
        v: offsets in units of one code, like `groups`.
        low, high: limits of the code less the zero point; numbers or [rows, groups, 1].
    """
    return _clamp((groups.float() / scale + v).round(), low, high) * scale


def straight_through_gradients(
    groups: torch.Tensor, scale: torch.Tensor, v: torch.Tensor, low: Limit, high: Limit, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dL/dv like `groups`, (dL/df) / s0 [rows, groups, 1]) for `grad` = dL/dW, like `groups`."""
    ratio = groups.float() / scale
    raw = (ratio + v).round()
    codes = _clamp(raw, low, high)
    inside = (raw == codes).to(grad.dtype)
    slope = ((codes - ratio * inside) * grad).sum(-1, keepdim=True)
    return inside * grad * scale, slope


@lru_cache(maxsize=1)
def compiled() -> tuple[Values, Gradients]:
    """Both functions compiled by PyTorch into one pass over the weights each, for any shape."""
    return torch.compile(quantized_values, dynamic=True), torch.compile(straight_through_gradients, dynamic=True)
