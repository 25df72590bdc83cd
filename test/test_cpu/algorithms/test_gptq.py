"""Codes by feedback, against the quadratic form written out and against coordinate descent."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ggml_codes import descend_blocks, gptq_blocks

from auto_round.algorithms import gptq as column_feedback
from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.descent import damp
from auto_round.algorithms.gptq import factorize_hessian, shared_hessian_factors
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, ggml_scheme

WIDTH, OUT = 256, 24


def tokens(count: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """Channels that go together, around a mean, some larger than others."""
    mixing = torch.randn(40, width, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(count, 40, generator=generator) @ mixing + 2 * mixing[0]
    return (together + torch.randn(count, width, generator=generator)) * torch.linspace(0.5, 2, width)


def weight(out: int = OUT, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(2)) * 0.05


def form(found: GgmlBlocks, w: torch.Tensor, matrix: torch.Tensor) -> float:
    change = (found.dequantize() - w).double()
    return float(((change @ matrix.double()) * change).sum())


def test_the_factors_are_those_of_the_matrix() -> None:
    """A = M' diag(c) M in the order of the columns, with c from the definition."""
    square = tokens(400, 0).t() @ tokens(400, 0)
    found = factorize_hessian(square, 0.3)
    matrix = damp(square.clone(), 0.3).double()[found.order][:, found.order]
    unit = found.matrix.double().tril(-1) + torch.eye(WIDTH, dtype=torch.float64)
    inverse = torch.linalg.inv(unit)
    middle = inverse.t() @ matrix @ inverse
    torch.testing.assert_close(middle, middle.diagonal().diag(), rtol=0, atol=1e-4 * float(middle.diagonal().max()))
    assert bool((square.diagonal()[found.order].diff() <= 0).all())


@pytest.mark.parametrize("name", sorted(GGML_TYPES))
def test_each_code_is_the_nearest_to_what_the_ones_before_leave(name: str) -> None:
    x, w = tokens(500, 0), weight()
    kind = GGML_TYPES[name]
    given = factorize_hessian(x.t() @ x, 0.3)
    found = gptq_blocks(w, search_blocks(w, name), [given])
    change = (found.dequantize() - w).double()[:, given.order]
    step = found.step().abs().repeat_interleave(kind.group, 1).double()[:, given.order]
    codes = found.codes[:, given.order]
    left = change + change @ given.matrix.double().tril(-1).t()
    inside = (codes > (name == "Q8_0")) & (codes < kind.codes - 1)
    assert bool((left.abs() <= step * (0.5 + 1e-3))[inside].all())
    assert bool(inside.any())


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_better_than_two_passes_of_descent(name: str) -> None:
    x, w = tokens(500, 0), weight()
    square = x.t() @ x
    start = search_blocks(w, name, x.square().sum(0))
    found = gptq_blocks(w, start, [factorize_hessian(square, 0.3)])
    matrix = damp(square.clone(), 0.3)
    assert form(found, w, matrix) < form(descend_blocks(w, start, [square], 0.3, 2), w, matrix)
    for part in ("d", "scales", "dmin", "mins"):
        one, two = getattr(start, part), getattr(found, part)
        assert (one is None and two is None) or torch.equal(one, two), part


def test_bands_are_separate() -> None:
    x = torch.cat([tokens(600, 0), tokens(600, 3)], dim=1)
    w = torch.cat([weight(), weight().flip(0)], dim=1)
    bands = [factorize_hessian(part.t() @ part, 0.3) for part in x.split(WIDTH, dim=1)]
    whole = gptq_blocks(w, search_blocks(w, "Q4_K"), bands).dequantize()
    for index, part in enumerate(w.split(WIDTH, dim=1)):
        expected = gptq_blocks(part, search_blocks(part.contiguous(), "Q4_K"), [bands[index]]).dequantize()
        assert torch.equal(whole[:, index * WIDTH : (index + 1) * WIDTH], expected)


def test_scripted_or_not_and_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = tokens(500, 0), weight(40)
    start, bands = search_blocks(w, "Q4_K"), [factorize_hessian(x.t() @ x, 0.3)]
    whole = gptq_blocks(w.bfloat16(), start, bands).codes
    monkeypatch.setattr(column_feedback, "_scripted", lambda: column_feedback._round_block)
    assert torch.equal(gptq_blocks(w.bfloat16(), start, bands).codes, whole)
    monkeypatch.setattr(column_feedback, "row_slices", lambda _w: [slice(0, 13), slice(13, 40)])
    assert float((gptq_blocks(w.bfloat16(), start, bands).codes != whole).float().mean()) < 1e-3


def test_the_thread_count_does_not_change_a_bit() -> None:
    x, w = tokens(900, 0, 768), weight(192, 768)
    start, threads, results = search_blocks(w, "Q4_K"), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = factorize_hessian(x.t() @ x if not results else results[0][1], 0.3)
            results.append((gptq_blocks(w, start, [found]).codes, x.t() @ x if not results else results[0][1]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(codes, results[0][0]) for codes, _ in results)


def test_layers_of_the_same_inputs_share() -> None:
    x = tokens(300, 0)
    one, other = x.t() @ x, x.t() @ x
    module = torch.nn.Linear(WIDTH, OUT, bias=False)

    def task(input_hessians: list[torch.Tensor] | None) -> LayerTask:
        return LayerTask("a", module, weight(), ggml_scheme("Q4_K"), input_hessians=input_hessians, ggml="Q4_K")

    found = shared_hessian_factors([task([one]), task([one]), task([other]), task(None)], 0.3, torch.device("cpu"))
    assert set(found) == {id(one), id(other)}


def test_a_group_of_zeros_stays() -> None:
    x, w = tokens(300, 0), weight()
    w[:, :64] = 0
    w[3] = 0
    found = gptq_blocks(w, search_blocks(w, "Q4_K"), [factorize_hessian(x.t() @ x, 0.3)]).dequantize()
    assert bool((found[3] == 0).all()) and bool(torch.isfinite(found).all())


def test_it_is_scripted_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are rounded side by side, and Python cannot parse in two threads ("AST constructor recursion depth")."""
    calls: list[int] = []

    def slow(function: Any) -> Any:
        calls.append(1)
        time.sleep(0.1)
        return function

    monkeypatch.setattr(torch.jit, "script", slow)
    column_feedback._scripted.cache_clear()
    w, x = torch.randn(4, 256), torch.randn(300, 256)
    given, start = [factorize_hessian(x.t() @ x, 0.3)], search_blocks(w, "Q4_K")
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: gptq_blocks(w, start, given).dequantize(), range(4)))
    finally:
        column_feedback._scripted.cache_clear()
    assert len(calls) == 1 and all(torch.equal(one, found[0]) for one in found)
