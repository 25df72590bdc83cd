from __future__ import annotations

import math
import statistics

import pytest

from auto_round.eval.measures import Estimate, EvalResult, perplexity, weighted_mean


def test_equal_weights_give_the_usual_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 5.5]
    got = weighted_mean(values, [7.0] * 4)
    assert got.value == pytest.approx(statistics.mean(values))
    assert got.stderr == pytest.approx(statistics.stdev(values) / 2)


def test_weights() -> None:
    assert weighted_mean([1.0, 4.0], [1.0, 3.0]).value == pytest.approx(3.25)


def test_one_window_has_no_error() -> None:
    assert weighted_mean([2.0], [9.0]) == Estimate(2.0, None)


def test_perplexity_by_the_delta_method() -> None:
    got = perplexity(Estimate(2.0, 0.1))
    assert got.value == pytest.approx(math.exp(2.0)) and got.stderr == pytest.approx(math.exp(2.0) * 0.1)
    assert perplexity(Estimate(1e6, 0.1)) == Estimate(math.inf)


def test_render_shows_each_measure_with_its_error() -> None:
    result = EvalResult(
        model="m", text="t", perplexity=Estimate(21.5, 0.5), nll=Estimate(3.07, 0.02), windows=3, tokens=30, seqlen=11,
        bos=True, dtype="float32", device="cpu", seconds=1.0, reference="r", kl=Estimate(0.0000123, 0.000002),
        agreement=Estimate(0.91, 0.01),
    )  # fmt: skip
    text = result.render()
    for part in ("m against r", "21.500 ± 0.500", "1.23e-05 ± 2.00e-06", "0.9100 ± 0.0100", "3 windows of 11", "BOS"):
        assert part in text
    assert result.to_dict()["kl"] == {"value": 0.0000123, "stderr": 0.000002}
