"""Integers that stand for FP8 values."""

from __future__ import annotations

import torch

from auto_round.codecs.minifloat import MINIFLOATS
from auto_round.data_type import get_quant_func


def test_two_steps_by_hand() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    qdq, scale, zero = get_quant_func("fp8_to_int", 4)(weight, bits=4, group_size=32)
    assert zero == 8 and scale.shape == (16, 2)
    scale8 = (weight.abs().max() / 448).bfloat16().float()
    values = MINIFLOATS["e4m3"].nearest(weight / scale8)
    groups = values.view(16, 2, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    steps = (-largest / 8).bfloat16().float()
    codes = (groups / steps.unsqueeze(-1)).round().clamp(-8, 7)
    torch.testing.assert_close(scale, steps * scale8, rtol=1e-6, atol=0)
    torch.testing.assert_close(qdq, (codes * steps.unsqueeze(-1) * scale8).view(16, 64), rtol=1e-5, atol=1e-8)


def test_learnables_get_gradients() -> None:
    weight = torch.randn(8, 64)
    v = torch.zeros_like(weight, requires_grad=True)
    low, high = (torch.ones(16, 1, requires_grad=True) for _ in range(2))
    qdq, _, _ = get_quant_func("w4fp8", 4)(weight, bits=4, group_size=32, v=v, min_scale=low, max_scale=high)
    (qdq * torch.randn_like(qdq)).sum().backward()
    for value in (v, low, high):
        assert value.grad is not None and bool(value.grad.isfinite().all()) and bool(value.grad.any())


def test_zeros_and_dtype() -> None:
    qdq, _, _ = get_quant_func("w4fp8", 4)(torch.zeros(4, 32, dtype=torch.bfloat16), bits=4, group_size=32)
    assert qdq.dtype == torch.bfloat16 and not bool(qdq.any())
