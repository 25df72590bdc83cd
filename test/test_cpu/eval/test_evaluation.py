"""The wrapper of lm-eval: what is handed over, and what is said without the package."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.eval.evaluation import simple_evaluate, simple_evaluate_user_model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm-eval that remembers how it was called."""
    seen: dict[str, Any] = {}
    package, models, hf = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))

    def evaluate(**kwargs: Any) -> dict[str, Any]:
        seen["evaluate"] = kwargs
        return {"results": {"piqa": 1.0}}

    package.simple_evaluate = evaluate  # type: ignore[attr-defined]
    hf.HFLM = lambda **kwargs: seen.setdefault("model", kwargs)  # type: ignore[attr-defined]
    for module in (package, models, hf):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_names_are_handed_over(calls: dict[str, Any]) -> None:
    found = simple_evaluate("hf", "pretrained=x", tasks=["piqa"], batch_size=2, limit=3)
    assert found == {"results": {"piqa": 1.0}}
    assert calls["evaluate"]["model_args"] == "pretrained=x" and calls["evaluate"]["tasks"] == ["piqa"]
    assert calls["evaluate"]["limit"] == 3 and calls["evaluate"]["batch_size"] == 2


def test_a_model_object(calls: dict[str, Any]) -> None:
    model, tokenizer = torch.nn.Linear(2, 2), object()
    simple_evaluate_user_model(model, tokenizer, tasks="piqa", batch_size="auto:8", limit=5)
    assert calls["model"]["pretrained"] is model and calls["model"]["tokenizer"] is tokenizer
    assert calls["evaluate"]["model"] is calls["model"] and calls["evaluate"]["limit"] == 5
    with pytest.raises(UnsupportedError, match="multimodal models"):
        simple_evaluate_user_model(model, tokenizer, mllm=True)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match='pip install "lm-eval'):
        simple_evaluate("hf", tasks=["piqa"])
