"""Token windows of a text, per-token measures on logits (in slices of positions), and means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from auto_round.errors import ConfigError, DataError

SLICE_ELEMENTS = 1 << 23  # logits per slice: 32 MiB as float32


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises DataError when it is missing, unreadable, not text or empty."""
    file, what = Path(path).expanduser(), f"evaluation text {str(path)!r}"
    if not file.is_file():
        raise DataError(f"{what} is not a file; give a UTF-8 text file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise DataError(f"{what} is not UTF-8 text ({err.reason} at byte {err.start})") from err
    except OSError as err:
        raise DataError(f"{what} cannot be read: {err.strerror}") from err
    if not text.strip():
        raise DataError(f"{what} is empty; give a file with text")
    return text


def make_windows(
    texts: Sequence[str], tokenizer: Any, *, seqlen: int, max_windows: int | None = None, add_bos: bool | None = None
) -> tuple[list[torch.Tensor], bool]:
    """Cut texts, joined by a blank line, into consecutive windows that do not overlap.

    A remainder shorter than a window is dropped unless it is the only window. With `add_bos` (None: if the tokenizer
    prepends BOS) each window has BOS and `seqlen` - 1 tokens of text.

    Returns int64 [T] windows on the CPU, and whether they begin with BOS. Raises ConfigError for an invalid setting,
    DataError for fewer than two tokens of text.
    """
    if seqlen < 2:
        raise ConfigError(f"seqlen={seqlen} is too short to predict anything; use 2 or more")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} leaves nothing to measure; use 1 or more, or None for all")
    bos_id: Any = getattr(tokenizer, "bos_token_id", None)
    if add_bos is None:
        add_bos = bos_id is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos_id]
    if add_bos and bos_id is None:
        raise ConfigError("a BOS token was requested, but the tokenizer has none; leave out add_bos")
    front = [int(bos_id)] if add_bos else []
    stream: list[int] = []
    body = seqlen - len(front)
    for text in _chunks(texts):
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if max_windows is not None and len(stream) >= body * max_windows:
            break
    if len(stream) + len(front) < 2:
        raise DataError(f"the evaluation text has {len(stream)} tokens; at least 2 are needed, better {seqlen} or more")
    parts = [stream[i * body : (i + 1) * body] for i in range(len(stream) // body)][:max_windows] or [stream]
    return [torch.tensor([*front, *part], dtype=torch.long) for part in parts], add_bos


def _chunks(texts: Sequence[str], size: int = 1 << 16) -> list[str]:
    """Split texts at line ends into chunks of about `size` characters, so that only as many as needed are tokenized."""
    chunks: list[str] = []
    for text in filter(None, texts):
        start = 0
        while start < len(text):
            end = text.rfind("\n", start + size // 2, start + size) + 1 if len(text) - start > size else 0
            end = end or min(len(text), start + size)
            chunks.append(text[start:end])
            start = end
        chunks[-1] += "\n\n"
    return chunks


def _slices(positions: int, vocab: int) -> list[slice]:
    step = max(1, SLICE_ELEMENTS // max(1, vocab))
    return [slice(i, min(i + step, positions)) for i in range(0, positions, step)]


def token_nll(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each next token, in nats: float32 [B, T - 1] of logits [B, T, V] and ids [B, T]."""
    flat = logits[..., :-1, :].reshape(-1, logits.shape[-1])
    target = input_ids[..., 1:].reshape(-1)
    out = torch.empty(flat.shape[0], dtype=torch.float32, device=logits.device)
    for part in _slices(*flat.shape):
        out[part] = F.cross_entropy(flat[part].float(), target[part].to(logits.device), reduction="none")
    return out.view(input_ids[..., 1:].shape)


def token_kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of each position's next-token distribution, in nats: float32 [...] of logits [..., V]."""
    vocab = reference.shape[-1]
    p, q = reference.reshape(-1, vocab), other.reshape(-1, vocab)
    out = torch.empty(p.shape[0], dtype=torch.float32, device=reference.device)
    for part in _slices(*p.shape):
        log_p = p[part].float().log_softmax(-1)
        log_q = q[part].to(reference.device).float().log_softmax(-1)
        prob = log_p.exp()
        terms = (prob * (log_p - log_q)).masked_fill_(prob == 0, 0.0)  # impossible tokens add nothing
        out[part] = terms.sum(-1, dtype=torch.float64).float()
    return out.view(reference.shape[:-1])


def top1_agreement(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool [...]: both logits [..., V] have their largest value at the same token."""
    return reference.argmax(-1) == other.argmax(-1).to(reference.device)


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
    """Mean of per-window means, weighted by their token counts, and the standard error of this ratio estimator."""
    total, n = math.fsum(weights), len(values)
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    if n < 2:
        return Estimate(mean)
    spread = math.fsum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return Estimate(mean, math.sqrt(n / (n - 1) * spread) / total)


def perplexity(nll: Estimate) -> Estimate:
    """exp of a mean negative log-likelihood, with its error by the delta method."""
    if nll.value > 709.78:  # more than a double holds
        return Estimate(math.inf)
    value = math.exp(nll.value)
    return Estimate(value, None if nll.stderr is None else value * nll.stderr)


@dataclass(frozen=True)
class EvalResult:
    """Quality of a model on a text."""

    model: str  # its name, as those below
    text: str
    perplexity: Estimate  # exp of `nll`
    nll: Estimate  # mean negative log-likelihood per predicted token, in nats
    windows: int
    tokens: int  # predicted ones
    seqlen: int  # tokens per window
    bos: bool  # each window began with the BOS token
    dtype: str  # of the model
    device: str
    seconds: float  # wall time of the forward passes and measures
    reference: str | None = None
    reference_perplexity: Estimate | None = None
    kl: Estimate | None = None  # mean KL(reference || model) per token, in nats
    agreement: Estimate | None = None  # fraction of positions where both rank the same token first

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(measure, value) pairs for a table."""
        measures = {
            "perplexity": self.perplexity, "perplexity of the reference": self.reference_perplexity,
            "mean KL divergence (nats)": self.kl, "top-1 agreement": self.agreement,
        }  # fmt: skip
        return [(name, str(value)) for name, value in measures.items() if value is not None]

    def describe(self) -> str:
        """The text, its windows, dtype and device, as one line."""
        bos = ", each with BOS" if self.bos else ""
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
