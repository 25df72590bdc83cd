"""The Triton kernel on a GPU: against float64, in compiled and captured code, and equal bits from equal calls."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from integer_weights import dense, error, random_weight

from auto_round.inference.kernels import IntegerWeight
from auto_round.inference.kernels.triton_linear import TritonLinear

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def weight(bits: int, out: int, inputs: int, group: int, sym: bool, dtype: torch.dtype, seed: int = 0) -> IntegerWeight:
    return random_weight(bits, out, inputs, group, sym, dtype, seed, device="cuda")


def kernel_of(given: IntegerWeight) -> TritonLinear:
    reason = TritonLinear.unsupported_reason(given.spec)
    if reason is not None:
        pytest.skip(reason)
    return TritonLinear(given)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 48, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_float64(bits: int, group: int, sym: bool, dtype: torch.dtype) -> None:
    for out, inputs in ((1000, 960), (4096, 1536)):
        given = weight(bits, out, inputs, group, sym, dtype)
        kernel, exact = kernel_of(given), dense(given).T
        assert torch.equal(kernel.codes(), given.codes)
        for rows in (1, 2, 7, 33, 100, 512):
            x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
            assert error(kernel(x), x.double() @ exact) < TOLERANCE[dtype], (out, inputs, rows)


@pytest.mark.parametrize("rows", [1, 5, 70, 600])
def test_equal_calls_give_equal_bits(rows: int) -> None:
    kernel = kernel_of(weight(4, 1024, 4096, 128, True, torch.bfloat16))
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    assert all(torch.equal(kernel(x), kernel(x)) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("experts", "rows"), [(8, 2), (8, 100), (60, 15), (60, 700)])
def test_experts(experts: int, rows: int, dtype: torch.dtype) -> None:
    given = [weight(4, 512, 1024, 64, True, dtype, seed) for seed in range(experts)]
    joined = TritonLinear.join([kernel_of(one) for one in given])
    assert joined is not None
    chosen = torch.randint(0, experts + 1, (rows,), device="cuda").sort().values
    offsets = torch.searchsorted(chosen, torch.arange(experts + 2, device="cuda"), out_int32=True)
    x = torch.randn(rows, 1024, device="cuda", dtype=dtype)
    y = joined(x, offsets)
    exact = torch.zeros(rows, 512, device="cuda", dtype=torch.float64)
    for expert in range(experts):
        exact[chosen == expert] = x[chosen == expert].double() @ dense(given[expert]).T
    assert error(y, exact) < TOLERANCE[dtype] and not y[chosen == experts].any()


@pytest.mark.parametrize("rows", [1, 16])
def test_compiled_and_captured(rows: int) -> None:
    kernel = kernel_of(weight(4, 1024, 2048, 128, False, torch.bfloat16))
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    want = kernel(x)
    assert torch.equal(torch.compile(kernel, fullgraph=True)(x), want)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(want)
    with torch.cuda.graph(graph):
        out.copy_(kernel(x))
    x.mul_(2)
    graph.replay()
    assert error(out, 2 * want.double()) < 1e-2
    torch.cuda.synchronize()


def test_nothing_waits_for_the_device() -> None:
    given = [weight(4, 256, 512, 64, True, torch.bfloat16, seed) for seed in range(8)]
    kernels = [kernel_of(one) for one in given]
    joined = TritonLinear.join(kernels)
    assert joined is not None
    x = torch.randn(24, 512, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(0, 30, 3, device="cuda", dtype=torch.int32).clamp(max=24)
    kernels[0](x), joined(x, offsets)  # compiled, tuned
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels[0](x), joined(x, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
