"""The scale search against the plain grid and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import auto_round.codecs.int as search
from auto_round.codecs.int import QuantParams, from_codes, integer_qparams, search_qparams, to_codes


def error(groups: torch.Tensor, grid: QuantParams, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error of each group, float64 [rows, groups]."""
    wrong = (from_codes(to_codes(groups, grid), grid) - groups).double().square()
    return (wrong if importance is None else wrong * importance.double()).sum(-1)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**20), st.sampled_from([2, 3, 4, 5, 8]), st.booleans(), st.booleans(), st.integers(1, 40),
    st.sampled_from([1e-6, 1e-2, 1.0, 1e4]), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_never_worse_than_the_plain_grid(
    seed: int, bits: int, sym: bool, weighted: bool, size: int, magnitude: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(3, 4, size, generator=generator) * magnitude
    groups[0, 0] = 0.0
    groups[1, 1] = magnitude
    importance = torch.rand(4, size, generator=generator) ** 4 if weighted else None
    found = search_qparams(groups, bits, sym, importance, dtype)
    plain = integer_qparams(groups, bits, sym, scale_dtype=dtype)
    assert torch.equal(found.scale, found.scale.to(dtype).float())
    assert bool(torch.isfinite(found.scale).all()) and bool((found.scale != 0).all())
    if isinstance(found.zero, torch.Tensor):
        assert torch.equal(found.zero, found.zero.round())
        assert bool((found.zero >= 0).all()) and bool((found.zero <= 2**bits - 1).all())
    used = None if importance is None else importance / importance.mean() + 1e-4
    before, after = error(groups, plain, used), error(groups, found, used)
    assert bool((after <= before * (1 + 1e-4) + 1e-12 * magnitude**2).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits, least", [(2, 0.8), (3, 0.85), (4, 0.93), (8, 1.0)])
def test_better_on_average(bits: int, sym: bool, least: float) -> None:
    groups = torch.randn(32, 8, 64, generator=torch.Generator().manual_seed(0))
    ratio = (
        error(groups, search_qparams(groups, bits, sym)).mean()
        / error(groups, integer_qparams(groups, bits, sym)).mean()
    )
    assert ratio < least


@pytest.mark.parametrize("sym", [True, False])
def test_importance_is_heeded(sym: bool) -> None:
    groups = torch.randn(64, 1, 32, generator=torch.Generator().manual_seed(1))
    importance = torch.full((1, 32), 0.01)
    importance[0, :4] = 10.0
    heeded, not_heeded = search_qparams(groups, 3, sym, importance), search_qparams(groups, 3, sym)
    assert error(groups, heeded, importance).mean() < 0.9 * error(groups, not_heeded, importance).mean()


@pytest.mark.parametrize("bits, slack", [(2, 1.1), (3, 1.2)])
def test_close_to_brute_force_symmetric(bits: int, slack: float) -> None:
    """Against 4000 scales of either sign for each group."""
    groups = torch.randn(200, 1, 16, generator=torch.Generator().manual_seed(2))
    top = groups.abs().amax(-1, keepdim=True)
    best = torch.full((200, 1), float("inf"), dtype=torch.float64)
    for step in torch.linspace(0.05, 2.0, 2000).tolist():
        for sign in (1, -1):
            scale = (top * (sign * step / 2 ** (bits - 1))).half().float()
            best = torch.minimum(best, error(groups, QuantParams(scale, float(2 ** (bits - 1)), bits)))
    found = error(groups, search_qparams(groups, bits, True))
    assert bool((found >= best * (1 - 1e-3)).all())
    assert found.mean() <= best.mean() * slack


def test_close_to_brute_force_asymmetric() -> None:
    groups = torch.randn(100, 1, 16, generator=torch.Generator().manual_seed(3)) + 0.3
    span = groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)
    best = torch.full((100, 1), float("inf"), dtype=torch.float64)
    for step, zero in itertools.product(torch.linspace(0.4, 1.2, 400).tolist(), range(4)):
        scale = (span * (step / 3)).half().float()
        best = torch.minimum(best, error(groups, QuantParams(scale, torch.full_like(scale, zero), 2)))
    found = error(groups, search_qparams(groups, 2, False))
    assert found.mean() <= best.mean() * 1.2


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = torch.randn(20, 3, 16, generator=torch.Generator().manual_seed(4))
    for sym in (True, False):
        whole = search_qparams(groups, 4, sym)
        with monkeypatch.context() as patch:
            patch.setattr(search, "_CHUNK_ELEMENTS", 3 * 16 * 3)
            pieces = search_qparams(groups, 4, sym)
        assert torch.equal(whole.scale, pieces.scale)
        assert torch.equal(torch.as_tensor(whole.zero), torch.as_tensor(pieces.zero))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_useless_importance_counts_as_none(bad: float) -> None:
    groups = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(5))
    found = search_qparams(groups, 4, True, torch.full((2, 8), bad))
    assert torch.equal(found.scale, search_qparams(groups, 4, True).scale)
