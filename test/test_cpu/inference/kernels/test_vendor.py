"""Kernels of other packages on CPUs: PyTorch's int4 and int8, and ark where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from integer_weights import dense, random_weight

from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.inference.kernels import vendor as ark
from auto_round.inference.kernels.vendor import CpuInt4, CpuInt8

BF16 = torch.bfloat16
needs_ark = pytest.mark.skipif(importlib.util.find_spec("auto_round_kernel") is None, reason="needs auto-round-lib")


def weight(bits: int, out: int, width: int, size: int, sym: bool, dtype: torch.dtype = BF16) -> IntegerWeight:
    return random_weight(bits, out, width, size, sym, dtype, seed=bits + out, scales=(1e-3, 0.1))


def check(kind: type[LinearKernel], w: IntegerWeight, dtype: torch.dtype, most: float) -> None:
    """`most`: error of a weight or an output, in parts of itself."""
    assert kind.unsupported_reason(w.spec) is None
    kernel = kind(w)
    assert torch.equal(kernel.codes(), w.codes)
    gen = torch.Generator().manual_seed(0)
    for count in (1, 7, 40):
        x = torch.randn(count, w.spec.in_features + 8, generator=gen).to(dtype)[:, 8:]  # strided
        y, want = kernel(x), x.double() @ dense(w).T
        assert y.dtype == dtype
        size = x.double().abs() @ dense(w).abs().T
        assert float(((y.double() - want).abs() / (most * (size + want.abs()))).max()) < 1
    assert kernel(x[:0]).shape == (0, w.spec.out_features) and kernel(x[0]).shape == (w.spec.out_features,)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits, sym", [(2, True), (2, False), (3, True), (3, False), (4, True), (4, False)])
def test_int4_of_pytorch(bits: int, sym: bool, size: int) -> None:
    # asymmetric 4 bits: the offset is rounded as well, and is up to 15 scales large where a weight may be small
    w = weight(bits, 48, 256, size, sym)
    if bits == 4 and not sym:
        kernel = CpuInt4(w)
        assert torch.equal(kernel.codes(), w.codes)
        x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(BF16)
        want = x.double() @ dense(w).T
        assert float((kernel(x).double() - want).norm() / want.norm()) < 1e-2
    else:
        check(CpuInt4, w, BF16, 2.0**-8)


def test_int8_of_pytorch() -> None:
    check(CpuInt8, weight(8, 48, 256, 256, True), BF16, 2.0**-7)


def test_what_pytorchs_kernels_do_not_run() -> None:
    assert "groups" in str(CpuInt4.unsupported_reason(LayerSpec(4, 48, True, 96, 64, BF16, "cpu")))
    assert "16 outputs" in str(CpuInt4.unsupported_reason(LayerSpec(4, 32, True, 96, 40, BF16, "cpu")))
    assert "one scale per row" in str(CpuInt8.unsupported_reason(LayerSpec(8, 32, True, 96, 64, BF16, "cpu")))


@needs_ark
@pytest.mark.parametrize("out, width, size", [(64, 64, 32), (40, 128, 64), (33, 96, 32), (24, 72, 72), (40, 96, 24)])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ark(bits: int, sym: bool, out: int, width: int, size: int) -> None:
    for dtype, most in ((torch.float32, 4e-7), (torch.float16, 2.0**-11), (BF16, 2.0**-8)):
        check(ark.ArkKernel, weight(bits, out, width, size, sym, dtype), dtype, most)


@needs_ark
def test_ark_gives_codes_of_empty_groups_back() -> None:
    w = weight(4, 16, 64, 32, False)
    w.scales[3, 1] = 0
    check(ark.ArkKernel, w, torch.float32, 4e-7)


@needs_ark
def test_ark_compiles_as_one_graph() -> None:
    kernel, x = ark.ArkKernel(weight(4, 32, 64, 32, True)), torch.randn(3, 64)
    compiled: Any = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), kernel(x))


def test_without_the_package_ark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_round_kernel", None)
    ark.package.cache_clear()
    try:
        spec = LayerSpec(4, 32, True, 64, 64, torch.float32, "cpu")
        assert "pip install auto-round-lib" in str(ark.ArkKernel.unsupported_reason(spec))
    finally:
        ark.package.cache_clear()


def test_what_ark_does_not_run() -> None:
    assert "fill" in str(ark.ArkKernel.unsupported_reason(LayerSpec(4, 48, True, 64, 64, torch.float32, "cpu")))
    assert "symmetric" in str(ark.ArkKernel.unsupported_reason(LayerSpec(4, 32, False, 64, 64, torch.float16, "xpu")))
