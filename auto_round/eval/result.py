"""What an evaluation found: means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error, estimated from the spread between windows (None for one window)."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        size = abs(self.value)
        style = ".2e" if 0 < size < 1e-3 else (".4f" if size < 10 else ".3f")
        return f"{self.value:{style}}" + ("" if self.stderr is None else f" ± {self.stderr:{style}}")


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Mean of per-window means, weighted by their token counts, and its standard error.

    The error is that of a ratio estimator: sqrt(n / (n - 1) * sum w^2 (x - mean)^2) / sum w, which for equal weights
    is the usual s / sqrt(n). Tokens of one window depend on each other, so windows are the independent units.
    """
    total = math.fsum(weights)
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    n = len(values)
    if n < 2:
        return Estimate(mean)
    spread = math.fsum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return Estimate(mean, math.sqrt(n / (n - 1) * spread) / total)


def perplexity(nll: Estimate) -> Estimate:
    """exp of a mean negative log-likelihood; the error by the delta method."""
    try:
        value = math.exp(nll.value)
    except OverflowError:
        return Estimate(math.inf)
    return Estimate(value, None if nll.stderr is None else value * nll.stderr)


@dataclass(frozen=True)
class EvalResult:
    """Quality of a model on a text.

    Attributes:
        model, reference, text: what was measured, against what (None: nothing), on what.
        perplexity: exp of `nll`.
        nll: mean negative log-likelihood per predicted token, in nats.
        reference_perplexity: the same of the reference.
        kl: mean KL(reference || model) per token, in nats.
        agreement: fraction of positions where both rank the same token first.
        windows, tokens: how many windows and predicted tokens were measured.
        seqlen, bos: tokens per window, and whether each began with the BOS token.
        dtype, device: in which the model was run.
        seconds: wall time of the forward passes and measures.
    """

    model: str
    text: str
    perplexity: Estimate
    nll: Estimate
    windows: int
    tokens: int
    seqlen: int
    bos: bool
    dtype: str
    device: str
    seconds: float
    reference: str | None = None
    reference_perplexity: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(measure, value) pairs for a table."""
        rows = [("perplexity", str(self.perplexity))]
        if self.reference_perplexity is not None:
            rows.append(("perplexity of the reference", str(self.reference_perplexity)))
        if self.kl is not None:
            rows.append(("mean KL divergence (nats)", str(self.kl)))
        if self.agreement is not None:
            rows.append(("top-1 agreement", str(self.agreement)))
        return rows

    def describe(self) -> str:
        """On what it was measured, as one line."""
        bos = ", BOS in front of each" if self.bos else ""
        return (
            f"{self.windows} windows of {self.seqlen} tokens of {self.text}{bos}; {self.tokens} predicted tokens; "
            f"{self.dtype} on {self.device}; ± is one standard error over windows"
        )

    def render(self) -> str:
        """A plain text table."""
        width = max(len(name) for name, _ in self.rows())
        lines = [self.model if self.reference is None else f"{self.model} against {self.reference}"]
        lines += [f"  {name:<{width}}  {value}" for name, value in self.rows()]
        return "\n".join([*lines, f"  {self.describe()}"])
