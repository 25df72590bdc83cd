"""Triton programs against float64, in Triton's interpreter. `test_triton_linear.py` runs this file with
TRITON_INTERPRET=1, which must be set before Triton is imported."""

from __future__ import annotations

import itertools

import pytest
import torch
from integer_weights import dense, error, int_format, random_weight

from auto_round.inference.kernels import IntegerWeight
from auto_round.inference.kernels.triton_linear import (
    Packed,
    TritonLinear,
    run_dense,
    run_tiles,
    run_vector,
    triton_experts,
)
from auto_round.inference.linear import QuantLinear
from auto_round.layouts.integers import GPTQ_V1

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the norm of the result. The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check(given: IntegerWeight, dtype: torch.dtype, rows: int) -> None:
    assert TritonLinear.unsupported_reason(given.spec) is None
    kernel = TritonLinear(given)
    assert torch.equal(kernel.codes(), given.codes) and kernel.scales.dtype == torch.float16
    x = torch.randn(rows, given.spec.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y = kernel(x)
    assert y.dtype == dtype and y.shape == (rows, given.spec.out_features)
    assert error(y, x.double() @ dense(given).T) < TOLERANCE[dtype]


# Outputs are odd or not a multiple of a tile; inputs fill whole blocks, or not.
SHAPES = {32: (33, 224), 64: (50, 192), 128: (31, 384), -1: (37, 200)}
CASES = [
    (bits, group, sym, dtype, rows)
    for index, (bits, group, sym, dtype) in enumerate(itertools.product((2, 3, 4, 8), SHAPES, (True, False), FLOATS))
    for rows in ((7,) if index % 2 else (33,))
]


@pytest.mark.parametrize(("bits", "group", "sym", "dtype", "rows"), CASES)
def test_tiles(bits: int, group: int, sym: bool, dtype: torch.dtype, rows: int) -> None:
    check(random_weight(bits, *SHAPES[group], group, sym), dtype, rows)


@pytest.mark.parametrize(
    ("bits", "group", "sym", "dtype", "rows", "shape"),
    [
        (4, 32, True, torch.bfloat16, 1, (33, 256)), (4, 64, False, torch.float16, 2, (33, 192)),
        (4, 128, True, torch.float16, 1, (31, 640)), (4, -1, False, torch.float32, 1, (37, 136)),
        (4, 48, False, torch.bfloat16, 1, (20, 144)), (4, 256, True, torch.float32, 1, (17, 512)),
        (2, 64, True, torch.bfloat16, 1, (33, 512)), (2, 32, False, torch.float32, 2, (20, 256)),
        (3, 16, True, torch.float16, 1, (33, 128)), (8, 32, True, torch.float32, 1, (33, 128)),
        (8, 128, False, torch.bfloat16, 2, (50, 256)), (8, -1, True, torch.float16, 1, (37, 100)),
    ],
)  # fmt: skip
def test_vectors(bits: int, group: int, sym: bool, dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    check(random_weight(bits, *shape, group, sym), dtype, rows)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows_write_the_weight_out(dtype: torch.dtype) -> None:
    check(random_weight(4, 40, 256, 64, False), dtype, 512)


def test_columns_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auto_round.inference.kernels.triton_linear.DENSE_NUMEL", 256 * 32)
    check(random_weight(8, 77, 256, 64, False), torch.float32, 64)


def test_every_way_gives_the_same_product() -> None:
    given = random_weight(4, 33, 512, 128, False)
    kernel, x = TritonLinear(given), torch.randn(2, 512)
    packed, exact = Packed(kernel.words, kernel.scales, kernel.zeros, kernel.form), x.double() @ dense(given).T
    for run in (run_vector, run_tiles, run_dense):
        assert error(run(x, packed), exact) < 1e-6


def test_equal_calls_give_equal_bits_and_rows_do_not_mix() -> None:
    kernel = TritonLinear(random_weight(4, 48, 256, 64, True))
    x = torch.randn(5, 256)
    y = kernel(x)
    assert torch.equal(kernel(x), y) and torch.equal(kernel(x[:3]), y[:3])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_row(rows: int, value: float) -> None:
    kernel = TritonLinear(random_weight(8, 20, 64, 32, True))
    x = torch.randn(rows, 64)
    x[0, 3] = value
    y = kernel(x)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_inputs_of_any_form() -> None:
    given = random_weight(8, 20, 64, 32, False)
    kernel, exact = TritonLinear(given), dense(given).T
    whole = torch.randn(64, 6)
    assert error(kernel(whole.T), whole.T.double() @ exact) < 1e-6
    wide = torch.randn(2, 3, 130)
    assert error(kernel(wide[..., 1:65]), wide[..., 1:65].double() @ exact) < 1e-6
    assert kernel(wide[..., 1:65].double()).dtype == torch.float64 and kernel(torch.empty(0, 64)).shape == (0, 20)
    odd = torch.randn(65).bfloat16()[1:]
    assert odd.storage_offset() == 1 and error(kernel(odd), odd.double() @ exact) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "rows"), [(5, 3), (5, 41), (3, 8), (12, 3)])
def test_experts(experts: int, rows: int, dtype: torch.dtype) -> None:
    """Some experts have no row, and some rows no expert."""
    given = [random_weight(8, 33, 96, 32, False, seed=seed) for seed in range(experts)]
    kernels = [TritonLinear(one) for one in given]
    joined = TritonLinear.join(kernels)
    assert all(torch.equal(k.codes(), w.codes) for k, w in zip(kernels, given, strict=True))
    chosen = torch.randint(1, experts + 1, (rows,), generator=torch.Generator().manual_seed(rows)).sort().values
    offsets = torch.searchsorted(chosen, torch.arange(experts + 2), out_int32=True)
    x = torch.randn(rows, 96).to(dtype)
    y = joined(x, offsets)
    exact = torch.stack(
        [x[r].double() @ dense(given[e]).T if e < experts else torch.zeros(33) for r, e in enumerate(chosen.tolist())]
    )
    assert y.dtype == dtype and error(y, exact) < TOLERANCE[dtype]
    assert not y[chosen == experts].any()


def test_experts_of_unlike_layouts_run_one_by_one() -> None:
    given = [random_weight(4, 16, 64, 32, sym) for sym in (True, False)]
    joined, x = TritonLinear.join([TritonLinear(one) for one in given]), torch.randn(5, 64)
    y = joined(x, torch.tensor([0, 2, 4, 5], dtype=torch.int32))
    exact = [x[:2].double() @ dense(given[0]).T, x[2:4].double() @ dense(given[1]).T, torch.zeros(1, 16)]
    assert error(y, torch.cat(exact)) < 1e-6 and not y[4].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_compiles_without_a_break(rows: int) -> None:
    kernel = TritonLinear(random_weight(8, 20, 64, 32, True))
    x = torch.randn(rows, 64)
    compiled = torch.compile(lambda x: kernel(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), kernel(x) * 2)


def test_the_operators_are_described_rightly() -> None:
    kernels = [TritonLinear(random_weight(8, 20, 64, 32, False, seed=seed)) for seed in range(2)]
    packed = [torch.stack([k.get_buffer(name) for k in kernels]) for name in ("words", "scales", "zeros")]
    args = (*packed, torch.tensor([0, 2, 3, 3], dtype=torch.int32), *kernels[0].form)
    torch.library.opcheck(triton_experts, (torch.randn(3, 64), *args))
    one = kernels[0]
    torch.library.opcheck(
        torch.ops.auto_round.triton_linear.default, (torch.randn(3, 64), one.words, one.scales, one.zeros, *one.form)
    )


@pytest.mark.parametrize("g_idx", [False, True])
def test_in_a_packed_layer(g_idx: bool) -> None:
    gen = torch.Generator().manual_seed(3)
    fmt = int_format(4, 16, False, "gptq_zp+-1")
    layers = []
    given = random_weight(4, 32, 64, 16, False)
    for _ in range(2):
        layer = QuantLinear(64, 32, fmt, bias=True, g_idx=g_idx)
        layer.qweight, layer.qzeros = GPTQ_V1.words(given.codes, given.zeros, 4)
        layer.scales = given.scales.T.contiguous()
        layer.bias = torch.linspace(-1, 1, 32)
        if g_idx:
            layer.g_idx = (torch.randperm(64, generator=gen.manual_seed(1)) // 16).int()
        layer.prepare()
        layers.append(layer)
    layers[1].use_kernel(TritonLinear)
    x = torch.randn(3, 64)
    assert error(layers[1](x), layers[0](x).double()) < 1e-6
    first, second = layers[0].state_dict(), layers[1].state_dict()
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
