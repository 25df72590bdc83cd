from __future__ import annotations

import math

import pytest
import torch

from auto_round.eval import measures as module
from auto_round.eval.measures import token_kl, token_nll, top1_agreement


def test_nll_by_hand() -> None:
    # p = (1/4, 3/4) and then (1/2, 1/2); the last position predicts nothing.
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0], [9.0, -9.0]])
    got = token_nll(logits, torch.tensor([0, 1, 0]))
    assert torch.allclose(got, torch.tensor([math.log(4 / 3), math.log(2.0)]))


def test_nll_of_equal_logits() -> None:
    got = token_nll(torch.zeros(1, 4, 5), torch.tensor([[1, 2, 3, 4]]))
    assert torch.allclose(got, torch.full((1, 3), math.log(5.0)))


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    want = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    got = token_kl((p.log() + 3.0).unsqueeze(0), (q.log() - 7.0).unsqueeze(0))
    assert got.shape == (1,)
    assert float(got) == pytest.approx(want, abs=1e-6)


def test_kl_ignores_impossible_tokens_and_is_infinite_the_other_way_round() -> None:
    impossible = torch.tensor([[0.0, 0.0, -math.inf]])
    flat = torch.zeros(1, 3)
    assert float(token_kl(impossible, flat)) == pytest.approx(math.log(1.5), abs=1e-6)
    assert math.isinf(float(token_kl(flat, impossible)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 7, 11).to(dtype), torch.randn(2, 7, 11).to(dtype)
    ids = torch.randint(0, 11, (2, 7))
    whole = token_nll(p, ids), token_kl(p, q)
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 25)
    assert torch.equal(token_nll(p, ids), whole[0])
    assert torch.equal(token_kl(p, q), whole[1])
    # Against the textbook form, in float64.
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert torch.allclose(whole[1].double(), (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-6)


def test_top1() -> None:
    a = torch.tensor([[[1.0, 2.0], [3.0, 2.0]]])
    b = torch.tensor([[[0.0, 5.0], [0.0, 1.0]]])
    assert top1_agreement(a, b).tolist() == [[True, False]]
