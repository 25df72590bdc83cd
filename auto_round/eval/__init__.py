"""Measuring a model: perplexity, KL divergence and top-1 agreement on text, with standard errors."""

from __future__ import annotations

from auto_round.eval.evaluate import evaluate, window_logits
from auto_round.eval.measures import Estimate, EvalResult, token_kl, token_nll, top1_agreement

__all__ = ["Estimate", "EvalResult", "evaluate", "token_kl", "token_nll", "top1_agreement", "window_logits"]
