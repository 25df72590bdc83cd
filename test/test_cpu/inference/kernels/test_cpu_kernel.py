"""The C kernel against float64: sizes, groups, dtypes, exact codes, numbers that are no numbers, threads, compiling."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_weights import dense, random_weight

from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.inference.kernels.cpu import CHUNK, CpuKernel, chunk_starts

# Error of one input, in parts of the largest of its chunk: half a step of 1 / 32767, or of 2**-15 of a power of two.
STEP = {torch.float32: 2.0**-30, torch.float16: 0.5 / 32767, torch.bfloat16: 0.5 / 32767}
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
weight = partial(random_weight, scales=(1e-3, 0.1))


def bound(w: IntegerWeight, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far an output may be off: the rounding of its inputs, of float32 sums, and of the output's dtype."""
    exact, size = dense(w).abs(), torch.zeros(x.shape, dtype=torch.float64)
    starts = chunk_starts(w.spec.in_features, w.spec.group_size).tolist()
    for a, b in itertools.pairwise(starts):
        size[:, a:b] = x[:, a:b].double().abs().amax(1, keepdim=True)
    inputs = STEP[dtype] * (size @ exact.T)
    return (
        1.001 * inputs
        + (len(starts) + 4) * 2.0**-23 * (x.double().abs() @ exact.T)
        + EPS[dtype] * ((x.double() @ dense(w).T).abs() + inputs)
    )


def rows(count: int, width: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SIZES = [(128, 40, 320), (32, 33, 96), (64, 70, 200), (-1, 37, 450), (24, 5, 130), (7, 65, 75)]


@pytest.mark.parametrize("group_size, out, width", SIZES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_size_against_float64(bits: int, sym: bool, group_size: int, out: int, width: int) -> None:
    w = weight(bits, out, width, group_size, sym)
    kernel = CpuKernel(w)
    assert torch.equal(kernel.codes(), w.codes)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1, 2, 7):
            x = rows(count, width, dtype)
            y = kernel(x)
            assert y.dtype == dtype
            far = (y.double() - x.double() @ dense(w).T).abs() / bound(w, x, dtype)
            assert float(far.max()) < 1, (dtype, count)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_prompt(bits: int) -> None:
    w = weight(bits, 96, 512, 128, False)
    x = rows(512, 512, torch.float32)
    y = CpuKernel(w)(x)
    assert float(((y.double() - x.double() @ dense(w).T).abs() / bound(w, x, x.dtype)).max()) < 1
    assert float((y.double() - x.double() @ dense(w).T).norm() / y.norm()) < 1e-6


def test_largest_sums_do_not_overflow() -> None:
    """Codes, inputs and zero points at their ends, for whole chunks."""
    for bits, zero, code in itertools.product((2, 4, 8), (0, None), (0, None)):
        top = (1 << bits) - 1
        spec = LayerSpec(bits, CHUNK, False, 2 * CHUNK, 3, torch.float32, "cpu")
        codes = torch.full((3, 2 * CHUNK), top if code is None else code, dtype=torch.uint8)
        zeros = torch.full((3, 2), top if zero is None else zero, dtype=torch.uint8)
        zeros[0] = top // 2  # zero points that differ
        w = IntegerWeight(codes, torch.ones(3, 2).half(), zeros, spec)
        for x in (torch.ones(3, 2 * CHUNK), -torch.ones(1, 2 * CHUNK)):
            want = x.double() @ dense(w).T
            assert torch.allclose(CpuKernel(w)(x).double(), want, rtol=1e-6, atol=0)


@settings(max_examples=40)
@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 140), st.integers(1, 300), st.integers(1, 310), st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.integers(0, 1000),
)  # fmt: skip
def test_codes_come_back(
    bits: int, out: int, width: int, group_size: int, sym: bool, scale_dtype: torch.dtype, seed: int
) -> None:
    w = weight(bits, out, width, group_size, sym, seed=seed, scale_dtype=scale_dtype)
    kernel = CpuKernel(w)
    assert torch.equal(kernel.codes(), w.codes)
    x = rows(1, width, torch.float32, seed)
    assert bool(((kernel(x).double() - x.double() @ dense(w).T).abs() <= bound(w, x, x.dtype)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_threads_and_batches_change_no_bit(bits: int) -> None:
    w = weight(bits, 300, 512, 64, False)
    kernel, x = CpuKernel(w), rows(260, 512, torch.float32)
    with threads(1):
        one = kernel(x)
    with threads(2):
        two = kernel(x)
        parts = torch.cat([kernel(part) for part in x.split([1, 2, 3, 4, 5, 6, 7, 111, 121])])
    assert torch.equal(one, two) and torch.equal(one, parts)


def test_any_strides_and_shapes() -> None:
    w = weight(4, 48, 128, 32, True)
    kernel, x = CpuKernel(w), rows(12, 128, torch.float32)
    want = kernel(x)
    for same in (x.T.contiguous().T, torch.randn(12, 200)[:, 40:168].copy_(x), torch.randn(24, 128)[::2].copy_(x)):
        assert not same.is_contiguous() and torch.equal(kernel(same), want)
    assert torch.equal(kernel(x.view(3, 4, 128)), want.view(3, 4, 48))
    assert torch.equal(kernel(x.view(3, 4, 128).transpose(0, 1)), want.view(3, 4, 48).transpose(0, 1))
    assert torch.equal(kernel(x[:1].expand(5, 128)), want[:1].expand(5, 48))
    assert torch.equal(kernel(x[0]), want[0])
    assert kernel(x[:0]).shape == (0, 48)
    assert torch.equal(kernel(x.double()), want.double())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_no_number_comes_out_as_with_a_dense_product(bits: int, dtype: torch.dtype) -> None:
    w = weight(bits, 40, 192, 64, False)
    w.codes[0] = w.zeros[0].repeat_interleave(64)  # zero times Inf is NaN
    kernel, x = CpuKernel(w), rows(8, 192, dtype)
    clean = kernel(x)
    bad = x.clone()
    bad[1, 5], bad[3, 70], bad[4, 191] = float("nan"), float("inf"), float("-inf")
    bad[6, 0], bad[6, 1] = float("inf"), float("-inf")
    for picked in (slice(None), slice(3, 4), slice(3, 5)):
        y, want = kernel(bad[picked]), (bad[picked].double() @ dense(w).T).to(dtype)
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
        assert torch.equal(y.sign()[y.isinf()], want.sign()[y.isinf()])
    assert torch.equal(kernel(bad)[[0, 2, 5, 7]], clean[[0, 2, 5, 7]])


def test_very_small_and_very_large_inputs() -> None:
    w = weight(4, 40, 256, 128, True)
    kernel = CpuKernel(w)
    assert not kernel(torch.zeros(2, 256)).any()
    for factor in (1e-40, 1e-37, 1e-30, 1e-20, 1e20, 1e36):
        x = rows(2, 256, torch.float32).clamp(-2, 2) * factor
        want = x.double() @ dense(w).T
        assert float((kernel(x).double() - want).norm() / want.norm()) < (1e-3 if factor < 1e-36 else 1e-6), factor


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_experts_in_one_call_are_the_loop(bits: int) -> None:
    kernels = [CpuKernel(weight(bits, 72, 160, 32, True, seed=seed)) for seed in range(5)]
    counts = [3, 0, 1, 130, 2]
    x = rows(sum(counts), 160, torch.bfloat16)
    loop = LinearKernel.grouped.__func__  # type: ignore[attr-defined]
    with threads(2):
        assert torch.equal(CpuKernel.grouped(kernels, x, counts), loop(CpuKernel, kernels, x, counts))


def test_it_compiles_as_one_graph() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = CpuKernel(weight(4, 64, 96, 32, True)), CpuKernel(weight(8, 40, 64, 32, False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.nn.functional.silu(self.a(x))) + CpuKernel.grouped([self.b, self.b], self.a(x), [1, 2])

    module, x = Two(), rows(3, 96, torch.float32)
    with torch.no_grad():
        want = module(x)
        compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)


def test_what_it_does_not_run() -> None:
    spec = LayerSpec(4, 32, True, 64, 64, torch.float32, "cpu")
    assert CpuKernel.unsupported_reason(spec) is None
