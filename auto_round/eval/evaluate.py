"""Measure a causal language model on text: perplexity, and KL divergence and top-1 agreement with a reference."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch

from auto_round.calibration.data.sources import held_out_documents
from auto_round.errors import AutoRoundError, ConfigError, ModelError, NumericsError, first_line
from auto_round.eval.measures import (
    EvalResult,
    make_windows,
    perplexity,
    read_text,
    token_kl,
    token_nll,
    top1_agreement,
    weighted_mean,
)
from auto_round.inference.linear import compute_dtype_for
from auto_round.logger import logger
from auto_round.modeling.build import load_config
from auto_round.modeling.checkpoint import load_dequantized
from auto_round.modeling.config import largest, read_value, text_config
from auto_round.modeling.files.dequantized import is_readable, quantization_of
from auto_round.modeling.files.folder import model_folder

ModelLike = str | PathLike[str] | torch.nn.Module

HELD_OUT = "bundled text that calibration leaves out"
DEFAULT_SEQLEN = 512
DEFAULT_WINDOWS = 64
# Errors of Transformers for damaged files, unknown settings, missing packages, unsupported models and quantizations.
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, NotImplementedError)


def evaluate(
    model_or_path: ModelLike, *, texts: Sequence[str] | None = None, path: str | PathLike[str] | None = None,
    tokenizer: Any = None, reference: ModelLike | None = None, reference_logits: Sequence[torch.Tensor] | None = None,
    seqlen: int = DEFAULT_SEQLEN, max_windows: int | None = DEFAULT_WINDOWS, batch_size: int = 1,
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, add_bos: bool | None = None,
    trust_remote_code: bool = False, backend: str | None = None,
) -> EvalResult:  # fmt: skip
    """Perplexity of a model on text and, with a reference, mean KL(reference || model) and top-1 agreement.

    `device`, `dtype` and `backend` are for models given by path.

    Args:
        model_or_path: folder or hub id of a checkpoint, quantized or not, or a model, which is not moved.
        texts, path: documents, or one UTF-8 file; default: the part of the bundled text that calibration does not use.
        tokenizer: default: the one saved with the model.
        reference: full-precision model to compare with.
        reference_logits: instead of `reference`: its logits [T, V] per window, as `window_logits` returns them.
        seqlen, max_windows: tokens per window, and how many windows at most (None: all).
        dtype: None keeps the checkpoint's, except that a CPU without matrix instructions for it computes in float32.
        add_bos: start each window with BOS; None: if the tokenizer does.

    Raises ConfigError for invalid settings, DataError for unusable text, ModelError for a model that cannot be opened
    or has another vocabulary than the reference, NumericsError for NaN in the logits.
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
        documents, text_name = held_out_documents(), HELD_OUT
        logger.info("no evaluation text was given: using %s; give one with --eval_text or path=", text_name)
    tokenizer = load_tokenizer(model_or_path, trust_remote_code) if tokenizer is None else tokenizer
    windows, bos = make_windows(documents, tokenizer, seqlen=seqlen, max_windows=max_windows, add_bos=add_bos)
    if reference_logits is not None and len(reference_logits) != len(windows):
        raise ConfigError(f"reference_logits has {len(reference_logits)} windows, the text gives {len(windows)}")

    load = functools.partial(load_model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model = load(model_or_path, backend=backend)
    other = load(reference, dequantized=True) if reference is not None else None
    start = time.perf_counter()
    means: defaultdict[str, list[float]] = defaultdict(list)  # by measure, of each window
    with torch.no_grad(), _eval_mode(model, other):
        for first in range(0, len(windows), batch_size):
            ids = torch.stack(windows[first : first + batch_size])
            logits = _logits(model, ids, "model", first)
            against = None
            if other is not None:
                against = _logits(other, ids, "reference", first)
            elif reference_logits is not None:
                against = torch.stack(list(reference_logits[first : first + batch_size]))
            found = {"nll": token_nll(logits, ids)}
            if against is not None:
                if against.shape != logits.shape:
                    raise ModelError(
                        f"the logits of model and reference differ in shape, {list(logits.shape)} and "
                        f"{list(against.shape)}; the reference must be the model before quantization, with the same "
                        "tokenizer"
                    )
                against = against.to(logits.device)
                found["reference_nll"] = token_nll(against, ids)
                found["kl"] = token_kl(against[:, :-1], logits[:, :-1])
                found["agreement"] = top1_agreement(against[:, :-1], logits[:, :-1])
            for measure, per_token in found.items():
                means[measure] += per_token.double().mean(-1).tolist()
            logger.debug("evaluated %d of %d windows", min(first + batch_size, len(windows)), len(windows))
    tokens = [float(window.numel() - 1) for window in windows]
    estimates = {measure: weighted_mean(values, tokens) for measure, values in means.items()}
    compared = "kl" in estimates
    name, reference_name = (_origin(m) or type(m).__name__ for m in (model_or_path, reference))
    if reference is None:
        reference_name = "cached logits"
    return EvalResult(
        model=name, text=text_name, perplexity=perplexity(estimates["nll"]), nll=estimates["nll"],
        windows=len(windows), tokens=int(sum(tokens)), seqlen=windows[0].numel(), bos=bos,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."), device=str(_device_of(model)),
        seconds=time.perf_counter() - start, reference=reference_name if compared else None,
        reference_perplexity=perplexity(estimates["reference_nll"]) if compared else None,
        kl=estimates.get("kl"), agreement=estimates.get("agreement"),
    )  # fmt: skip


def window_logits(model: torch.nn.Module, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [T, V] of each int64 [T] window, on the CPU in the model's dtype, for `evaluate(reference_logits=...)`."""
    with torch.no_grad(), _eval_mode(model):
        return [_logits(model, w.unsqueeze(0), "reference", i)[0].cpu() for i, w in enumerate(windows)]


def _logits(model: torch.nn.Module, ids: torch.Tensor, what: str, first: int) -> torch.Tensor:
    vocab = largest(getattr(model, "config", None), "vocab_size")
    if vocab and int(ids.max()) >= vocab:
        raise ModelError(
            f"the tokenizer produced token {int(ids.max())}, but the {what} has a vocabulary of {vocab}; "
            "use the model's own tokenizer"
        )
    logits = model(input_ids=ids.to(_device_of(model)), use_cache=False).logits
    if bool(torch.isnan(logits).any()):
        raise NumericsError(
            f"the logits of the {what} contain NaN in window {first} or its batch; its weights are damaged"
        )
    return logits


@contextlib.contextmanager
def _eval_mode(*models: torch.nn.Module | None) -> Iterator[None]:
    """Put models into evaluation mode, then restore the mode of each module."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device_of(model: torch.nn.Module) -> torch.device:
    getter: Any = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter is not None else None
    return next((model if embedding is None else embedding).parameters(), next(model.parameters())).device


def _origin(model: ModelLike | None) -> str:
    """A given name or path; of a model object the one that it was loaded from, "" if it is not known."""
    if isinstance(model, torch.nn.Module):
        return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return str(model)


def load_tokenizer(source: ModelLike, trust_remote_code: bool = False) -> Any:
    """The tokenizer saved with a model. Raises ConfigError when its folder is not known, ModelError."""
    from transformers import AutoTokenizer

    name = _origin(source)
    if not name:
        raise ConfigError("the model object has no name or path; give its tokenizer as tokenizer=")
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as err:  # tokenizers raise errors of any type
        raise ModelError(f"the tokenizer of {name!r} cannot be opened: {first_line(err)}; give tokenizer=") from err


def load_model(
    source: ModelLike, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    trust_remote_code: bool = False, dequantized: bool = False, backend: str | None = None,
) -> torch.nn.Module:  # fmt: skip
    """A causal language model in evaluation mode; a model object is returned unchanged.

    `device` "auto" is all of them. `dequantized`: dequantize an FP8 or MXFP4 checkpoint to the full-precision model
    that quantization starts from. Raises ConfigError for a backend that is unknown or has no layers to run, ModelError
    when the checkpoint cannot be opened.
    """
    if isinstance(source, torch.nn.Module):
        return source
    from transformers import AutoModelForCausalLM

    name = str(source)
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    try:
        config = load_config(folder, trust_remote_code=trust_remote_code)
        saved = read_value(text_config(config), "dtype") or torch.float32
        wanted = dtype or compute_dtype_for("cpu" if device == "auto" else device, saved)
        if dequantized and is_readable(quantization_of(config)):
            return load_dequantized(folder, wanted, device, trust_remote_code=trust_remote_code)
        ours = _loader_kwargs(config, name, backend)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=wanted, device_map=device if device == "auto" else {"": str(device)},
                trust_remote_code=trust_remote_code, **ours,
            )  # fmt: skip
    except AutoRoundError:
        raise
    except _LOADING_ERRORS as err:
        raise ModelError(f"{name!r} cannot be opened as a causal language model: {first_line(err)}") from err
    return model.eval()


def _loader_kwargs(config: Any, name: str, backend: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that open GPTQ and AWQ checkpoints with this package and select the backend."""
    quantization = getattr(config, "quantization_config", None)
    values = quantization if isinstance(quantization, dict) else {}
    method = str(values.get("quant_method", ""))
    foreign = method in ("gptq", "awq")
    if backend is not None and not (foreign or "auto-round" in method or "auto_round" in method):
        what = f"in format {method!r}, which Transformers runs" if method else "not quantized"
        raise ConfigError(f"backend {backend!r} has nothing to run: {name!r} is {what}; leave the backend out")
    if not foreign and backend is None:
        return {}
    if method == "gptq" and "meta" in values:  # GPTQModel's record of its settings, which Transformers refuses
        config.quantization_config = {key: value for key, value in values.items() if key != "meta"}
    from transformers import AutoRoundConfig

    return {"quantization_config": AutoRoundConfig(**({} if backend is None else {"backend": backend}))}
