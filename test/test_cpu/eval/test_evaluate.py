from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import ConfigError, ModelError, NumericsError
from auto_round.eval import evaluate, window_logits
from auto_round.eval.measures import make_windows


def naive(model: Any, reference: Any, ids: torch.Tensor) -> tuple[float, float, float]:
    """NLL, KL and agreement of one window, written as plainly as can be, in float64."""
    p = reference(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
    q = model(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
    nll = [-math.log(float(q[t, ids[t + 1]])) for t in range(len(ids) - 1)]
    kl = [sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[t], q[t], strict=True)) for t in range(len(p))]
    same = [int(p[t].argmax()) == int(q[t].argmax()) for t in range(len(p))]
    return sum(nll) / len(nll), sum(kl) / len(kl), sum(same) / len(same)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_agrees_with_the_plain_computation(
    model: Any, other_model: Any, tokenizer: Any, text: str, batch_size: int
) -> None:
    got = evaluate(model, texts=[text], tokenizer=tokenizer, reference=other_model, seqlen=40, batch_size=batch_size)
    windows, _ = make_windows([text], tokenizer, seqlen=40)
    with torch.no_grad():
        rows = [naive(model, other_model, w) for w in windows]
    n = len(rows)
    means = [sum(r[i] for r in rows) / n for i in range(3)]
    errors = [math.sqrt(sum((r[i] - means[i]) ** 2 for r in rows) / (n - 1) / n) for i in range(3)]
    assert got.kl is not None and got.agreement is not None
    for estimate, mean, error in zip((got.nll, got.kl, got.agreement), means, errors, strict=True):
        assert estimate.value == pytest.approx(mean, rel=1e-5, abs=1e-9)
        assert estimate.stderr == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert got.perplexity.value == pytest.approx(math.exp(means[0]), rel=1e-5)
    assert (got.windows, got.tokens, got.seqlen) == (5, 5 * 39, 40)


def test_a_model_against_itself(model: Any, tokenizer: Any, text: str) -> None:
    got = evaluate(model, texts=[text], tokenizer=tokenizer, reference=model, seqlen=40)
    assert got.kl is not None and got.agreement is not None and got.reference_perplexity is not None
    assert abs(got.kl.value) < 1e-9 and got.agreement.value == 1.0
    assert got.reference_perplexity.value == got.perplexity.value


def test_cached_reference_logits_give_the_same(model: Any, other_model: Any, tokenizer: Any, text: str) -> None:
    windows, _ = make_windows([text], tokenizer, seqlen=40)
    cached = window_logits(other_model, windows)
    first = evaluate(model, texts=[text], tokenizer=tokenizer, reference=other_model, seqlen=40)
    second = evaluate(model, texts=[text], tokenizer=tokenizer, reference_logits=cached, seqlen=40, batch_size=2)
    assert first.kl is not None and second.kl is not None
    assert second.kl.value == pytest.approx(first.kl.value, rel=1e-5)
    with pytest.raises(ConfigError, match="5"):
        evaluate(model, texts=[text], tokenizer=tokenizer, reference_logits=cached[:3], seqlen=40)


def test_from_a_folder_and_a_file(saved: Path, model: Any, tokenizer: Any, text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    got = evaluate(str(saved), path=file, seqlen=40)
    want = evaluate(model, texts=[text], tokenizer=tokenizer, seqlen=40)
    assert got.nll.value == pytest.approx(want.nll.value, rel=1e-6)
    assert got.kl is None and got.text == str(file)


def test_default_text_is_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="auto_round"):
        got = evaluate(str(saved), seqlen=32, max_windows=2)
    assert "no evaluation text was given" in caplog.text and "bundled" in got.text


def test_mode_is_restored(model: Any, tokenizer: Any, text: str) -> None:
    model.train()
    model.model.norm.eval()
    evaluate(model, texts=[text], tokenizer=tokenizer, seqlen=40, max_windows=1)
    assert model.training and not model.model.norm.training


def test_nan_is_named(model: Any, tokenizer: Any, text: str) -> None:
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NumericsError, match="NaN in window 0"):
        evaluate(model, texts=[text], tokenizer=tokenizer, seqlen=40)


def test_other_vocabulary(model: Any, tokenizer: Any, text: str) -> None:
    from transformers import LlamaForCausalLM

    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": 80})
    with pytest.raises(ModelError, match="differ in shape"):
        evaluate(model, texts=[text], tokenizer=tokenizer, reference=LlamaForCausalLM(config), seqlen=40)
    small = LlamaForCausalLM(type(model.config)(**{**model.config.to_dict(), "vocab_size": 20}))
    with pytest.raises(ModelError, match="the model.s own tokenizer"):
        evaluate(small, texts=[text], tokenizer=tokenizer, seqlen=40)


def test_missing_models(tmp_path: Path, tokenizer: Any, text: str) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelError):
            evaluate(str(folder), texts=[text], tokenizer=tokenizer)


def test_contradicting_arguments(model: Any, tokenizer: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="texts and path"):
        evaluate(model, texts=[text], path="x", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="batch_size"):
        evaluate(model, texts=[text], tokenizer=tokenizer, batch_size=0)
