"""Measure a causal language model on text: perplexity, and divergence from a reference model."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from auto_round.errors import ConfigError, ModelError, NumericsError
from auto_round.eval.default_text import held_out_text
from auto_round.eval.loading import load_model, load_tokenizer
from auto_round.eval.loss import token_kl, token_nll, top1_agreement
from auto_round.eval.result import EvalResult, perplexity, weighted_mean
from auto_round.eval.windows import make_windows, read_text
from auto_round.logger import logger
from auto_round.modeling.config_values import largest

ModelLike = str | PathLike[str] | torch.nn.Module

DEFAULT_SEQLEN = 512
DEFAULT_WINDOWS = 64


@dataclass
class _Sums:
    """Per-window means and token counts."""

    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)


def evaluate(
    model_or_path: ModelLike,
    *,
    texts: Sequence[str] | None = None,
    path: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    reference: ModelLike | None = None,
    reference_logits: Sequence[torch.Tensor] | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    max_windows: int | None = DEFAULT_WINDOWS,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    add_bos: bool | None = None,
    trust_remote_code: bool = False,
    backend: str | None = None,
) -> EvalResult:
    """Perplexity of a model on text and, with a reference, mean KL(reference || model) and top-1 agreement.

    One batch of windows at a time goes through the model and then the reference, so memory holds both models and the
    logits of one batch of each. All measures cover the same positions: every token of a window but its first.

    Args:
        model_or_path: folder or hub id of a checkpoint (quantized ones too), or a model, which stays where it is.
        texts, path: documents, or one UTF-8 file; neither takes a part of the text bundled for calibration.
        tokenizer: default: the one saved with the model.
        reference: full-precision model to compare with.
        reference_logits: instead of `reference`: its logits [T, V] per window, as `window_logits` returns them.
        seqlen, max_windows: tokens per window, and how many windows at most (None: all).
        batch_size: windows per forward pass.
        device, dtype: for models given by path. dtype None keeps the checkpoint's, except that a CPU without matrix
            instructions for it computes in float32.
        add_bos: start each window with BOS; None does as the tokenizer does.
        trust_remote_code: allow a checkpoint's own Python files to run.
        backend: what runs the quantized layers of a model given by path; None is the best that can.

    Raises:
        ConfigError: contradicting or useless settings.
        DataError: text that is missing, unreadable or empty.
        ModelError: a model that does not open, or does not share its vocabulary with the reference.
        NumericsError: NaN in the logits.
    """
    if texts is not None and path is not None:
        raise ConfigError("both texts and path were given; give one")
    if reference is not None and reference_logits is not None:
        raise ConfigError("both reference and reference_logits were given; give one")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not allowed; use 1 or more")
    if path is not None:
        documents, text_name = [read_text(path)], str(path)
    elif texts is not None:
        documents, text_name = list(texts), f"{len(texts)} given texts"
    else:
        documents, text_name = held_out_text()
        logger.info("no evaluation text was given: measuring on %s; give one with --eval_text or path=", text_name)
    tokenizer = load_tokenizer(model_or_path, trust_remote_code) if tokenizer is None else tokenizer
    windows, bos = make_windows(documents, tokenizer, seqlen=seqlen, max_windows=max_windows, add_bos=add_bos)
    if reference_logits is not None and len(reference_logits) != len(windows):
        raise ConfigError(f"reference_logits has {len(reference_logits)} windows, the text gives {len(windows)}")

    load = functools.partial(load_model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model = load(model_or_path, backend=backend)
    other = load(reference, dequantized=True) if reference is not None else None
    start = time.perf_counter()
    sums = _Sums()
    with torch.no_grad(), _eval_mode(model), _eval_mode(other):
        for first in range(0, len(windows), batch_size):
            ids = torch.stack(windows[first : first + batch_size])
            logits = _logits(model, ids, "model", first)
            against = None
            if other is not None:
                against = _logits(other, ids, "reference", first)
            elif reference_logits is not None:
                against = torch.stack(list(reference_logits[first : first + batch_size]))
            _measure(sums, logits, against, ids)
            logger.debug("evaluated %d of %d windows", min(first + batch_size, len(windows)), len(windows))
    nll = weighted_mean(sums.nll, sums.tokens)
    compared = bool(sums.kl)
    return EvalResult(
        model=_name(model_or_path),
        reference=_name(reference) if reference is not None else ("cached logits" if compared else None),
        text=text_name,
        perplexity=perplexity(nll),
        nll=nll,
        reference_perplexity=perplexity(weighted_mean(sums.reference_nll, sums.tokens)) if compared else None,
        kl=weighted_mean(sums.kl, sums.tokens) if compared else None,
        agreement=weighted_mean(sums.agreement, sums.tokens) if compared else None,
        windows=len(windows),
        tokens=int(sum(sums.tokens)),
        seqlen=windows[0].numel(),
        bos=bos,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=str(_device_of(model)),
        seconds=time.perf_counter() - start,
    )


def window_logits(model: torch.nn.Module, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [T, V] of each int64 [T] window, on the CPU in the model's dtype: for use as `reference_logits`."""
    with torch.no_grad(), _eval_mode(model):
        return [_logits(model, w.unsqueeze(0), "reference", i)[0].cpu() for i, w in enumerate(windows)]


def _measure(sums: _Sums, logits: torch.Tensor, against: torch.Tensor | None, ids: torch.Tensor) -> None:
    """Add a batch: logits [B, T, V] of the model and of the reference, ids [B, T]."""
    predicted = ids.shape[1] - 1
    sums.tokens.extend([float(predicted)] * ids.shape[0])
    sums.nll.extend(_means(token_nll(logits, ids)))
    if against is None:
        return
    if against.shape != logits.shape:
        raise ModelError(
            f"model and reference give logits of different shape, {list(logits.shape)} and {list(against.shape)}; "
            "the reference must be the model before quantization, with the same tokenizer"
        )
    against = against.to(logits.device)
    sums.reference_nll.extend(_means(token_nll(against, ids)))
    sums.kl.extend(_means(token_kl(against[:, :-1], logits[:, :-1])))
    sums.agreement.extend(_means(top1_agreement(against[:, :-1], logits[:, :-1])))


def _means(per_token: torch.Tensor) -> list[float]:
    return [float(v) for v in per_token.double().mean(-1)]


def _logits(model: torch.nn.Module, ids: torch.Tensor, what: str, first: int) -> torch.Tensor:
    vocab = largest(getattr(model, "config", None), "vocab_size")
    if vocab and int(ids.max()) >= vocab:
        raise ModelError(
            f"the tokenizer gives token {int(ids.max())}, the {what} has a vocabulary of {vocab}; "
            "they do not belong together"
        )
    logits = model(input_ids=ids.to(_device_of(model)), use_cache=False).logits
    if bool(torch.isnan(logits).any()):
        raise NumericsError(
            f"the logits of the {what} hold NaN in window {first} or its batch; its weights are damaged"
        )
    return logits


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module | None) -> Iterator[None]:
    """Dropout off, and as it was afterwards."""
    training = {m for m in model.modules() if m.training} if model is not None else set()
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device_of(model: torch.nn.Module) -> torch.device:
    getter: Any = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter is not None else None
    return next((model if embedding is None else embedding).parameters(), next(model.parameters())).device


def _name(model: ModelLike) -> str:
    if isinstance(model, torch.nn.Module):
        return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return str(model)
