"""Gaudi: what the operation is given, and the refusal where there is no such device."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from integer_weights import int_format

from auto_round.errors import UnsupportedError
from auto_round.inference.kernels import IntegerWeight, LayerSpec
from auto_round.inference.kernels.vendor import HpuLinear
from auto_round.inference.table import choose_backend

SPEC = LayerSpec(4, 32, False, 64, 16, torch.bfloat16, "hpu")


def weight() -> IntegerWeight:
    gen = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (16, 64), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (16, 2), generator=gen, dtype=torch.uint8)
    return IntegerWeight(codes, torch.rand(16, 2, generator=gen).half(), zeros, SPEC)


def test_operands_by_hand() -> None:
    given = weight()
    got = dict(HpuLinear(given).named_buffers())
    assert got["words"].shape == (64, 2) and got["zeros"].shape == (2, 2) and got["scales"].shape == (2, 16)
    for row in (0, 5, 63):
        for word in (0, 1):
            value = int(got["words"][row, word]) & 0xFFFFFFFF
            assert [(value >> (4 * i)) & 15 for i in range(8)] == given.codes[8 * word : 8 * word + 8, row].tolist()
    value = int(got["zeros"][1, 0]) & 0xFFFFFFFF
    assert [(value >> (4 * i)) & 15 for i in range(8)] == given.zeros[:8, 1].tolist()
    assert torch.equal(got["scales"], given.scales.T.bfloat16())
    assert torch.equal(HpuLinear(given).codes(), given.codes)


def test_refusals() -> None:
    if importlib.util.find_spec("habana_frameworks") is not None:
        pytest.skip("a Gaudi machine")
    assert (
        HpuLinear.unsupported_reason(SPEC)
        == "needs Habana's PyTorch bridge (habana_frameworks), which is not installed"
    )
    short = LayerSpec(4, 48, False, 64, 16, torch.bfloat16, "hpu")
    assert HpuLinear.unsupported_reason(short) == "needs groups of one size: 64 inputs are no multiple of 48"
    assert HpuLinear.unsupported_reason(LayerSpec(4, 32, False, 64, 12, torch.bfloat16, "hpu")) is not None
    with pytest.raises(UnsupportedError, match="hpu: needs Habana's PyTorch bridge"):
        choose_backend(int_format(4, 32, False, "gptq"), "hpu", "hpu", SPEC)
