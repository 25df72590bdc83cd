"""Evaluate on lm-eval's tasks, under the names of AutoRound 0.x (`simple_evaluate`)."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.errors import ConfigError
from auto_round.eval.evaluate import load_tokenizer
from auto_round.later import MULTIMODAL, refuse


def simple_evaluate(
    model: Any, model_args: str | dict[str, Any] | None = None, batch_size: int | str | None = None,
    limit: int | float | None = None, max_batch_size: int | None = None, device: str | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """What `lm_eval.simple_evaluate` returns for the same arguments. Raises ConfigError without lm-eval."""
    return _lm_eval().simple_evaluate(
        model=model, model_args=model_args, batch_size=batch_size, limit=limit, max_batch_size=max_batch_size,
        device=device, **kwargs,
    )  # fmt: skip


def simple_evaluate_user_model(
    user_model: torch.nn.Module, tokenizer: Any = None, batch_size: int | str | None = 1,
    limit: int | float | None = None, max_batch_size: int | None = 64, eval_model_dtype: str = "auto",
    add_bos_token: bool = False, mllm: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """The same for a model object, which keeps its dtype; `tokenizer` None takes the one in the model's folder. Raises
    ConfigError when lm-eval is not installed or no tokenizer is known, UnsupportedError for `mllm`."""
    if mllm:
        refuse(MULTIMODAL, "mllm=True")
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=user_model, tokenizer=tokenizer if tokenizer is not None else load_tokenizer(user_model),
        batch_size=1 if batch_size is None else batch_size, max_batch_size=max_batch_size, dtype=eval_model_dtype,
        add_bos_token=add_bos_token,
    )  # fmt: skip
    return lm_eval.simple_evaluate(
        model=wrapped, model_args=None, batch_size=batch_size, max_batch_size=max_batch_size, limit=limit, **kwargs
    )


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(
            'evaluation on tasks needs the package lm-eval, which is not installed here: pip install "lm-eval[hf]"; '
            "auto_round.eval.evaluate measures perplexity without it"
        ) from error
    return lm_eval
