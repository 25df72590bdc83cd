"""A packed layer that hands its codes to a kernel: same numbers, same file, back again when it moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_weights import arrays, int_format, pack_codes

from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.inference.linear import QuantLinear


class Plain(LinearKernel):
    """The formula, word for word."""

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        size = weight.spec.group_size
        scales = weight.scales.double().repeat_interleave(size, 1)[:, : weight.spec.in_features]
        zeros = weight.zeros.double().repeat_interleave(size, 1)[:, : weight.spec.in_features]
        self.register_buffer("own", weight.codes.clone(), persistent=False)
        self.register_buffer("dense", scales * (weight.codes.double() - zeros), persistent=False)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.get_buffer("dense").T).to(x.dtype)

    def codes(self) -> torch.Tensor:
        return self.get_buffer("own")


def filled(fmt: LayerFormat, g_idx: bool = False, bias: bool = True) -> QuantLinear:
    gen = torch.Generator().manual_seed(3)
    module = QuantLinear(64, 32, fmt, bias=bias, g_idx=g_idx)
    codes = torch.randint(0, 1 << fmt.scheme.bits, (32, 64), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << fmt.scheme.bits, (32, module.groups), generator=gen, dtype=torch.uint8)
    pack = pack_codes(fmt, codes, zeros)
    module.qweight, module.qzeros = pack
    module.scales = (torch.rand(module.groups, 32, generator=gen) + 0.1).half()
    if module.bias is not None:
        module.bias.copy_(torch.randn(32, generator=gen))
    if g_idx:
        module.g_idx = (torch.randperm(64, generator=gen) // module.group_size).int()
    module.prepare()
    return module


FORMATS: list[Any] = [
    (int_format(4, 16, False, "gptq_zp+-1"), False), (int_format(2, 32, False, "gptq"), True),
    (int_format(8, -1, False, "gptq_zp+-1"), False), (int_format(3, 16, False, "gptq"), True),
    (int_format(4, 32, False, "awq"), False),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "g_idx"), FORMATS)
def test_numbers_and_files_stay(fmt: LayerFormat, g_idx: bool) -> None:
    plain, fast = filled(fmt, g_idx), filled(fmt, g_idx)
    fast.use_kernel(Plain)
    assert fast.qweight is None and fast.is_loaded and fast.kernel is not None
    x = torch.randn(3, 5, 64)
    assert float((fast(x) - plain(x)).norm() / plain(x).norm()) < 1e-6
    assert torch.equal(fast.dequantize(), plain.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(arrays(fast), arrays(plain), strict=True))
    want, got = plain.state_dict(), fast.state_dict()
    assert set(want) == set(got) and all(torch.equal(want[k], got[k]) for k in want)

    other = filled(fmt, g_idx)
    assert other.qweight is not None
    other.qweight.zero_()
    other.use_kernel(Plain)
    other.load_state_dict(got)
    assert other.kernel is None and torch.equal(other.dequantize(), plain.dequantize())


def test_gradients_go_through_the_dense_product() -> None:
    plain, fast = filled(FORMATS[1][0], True), filled(FORMATS[1][0], True)
    fast.use_kernel(Plain)
    grads = []
    for module in (plain, fast):
        x = torch.ones(2, 64, requires_grad=True)
        module(x).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_cast_keeps_the_kernel_and_a_move_drops_it() -> None:
    module = filled(FORMATS[0][0])
    module.use_kernel(Plain)
    module.to(torch.bfloat16)
    assert module.kernel is not None and module.scales.dtype == torch.float16
    assert module(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    module.to("meta")
    assert module.kernel is None and module.qweight is not None and module.qweight.is_meta
