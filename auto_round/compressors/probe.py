"""A few tokens that go through the quantized model before and after saving."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.calibration.builtin import held_out_documents
from auto_round.logger import logger

_TOKENS = 64


def probe_samples(tokenizer: Any, vocab_size: int, most: int | None) -> list[dict[str, torch.Tensor]]:
    """One sample of at most 64 tokens: packaged text that calibration never reads, or counted ids without a tokenizer.

    Args:
        tokenizer: the model's, or None.
        vocab_size: ids from there on are not used.
        most: positions the model has, None when it has no limit.
    """
    length = min(_TOKENS, most or _TOKENS)
    ids: list[int] = []
    if tokenizer is not None:
        text = held_out_documents()[0][: 16 * length]
        try:
            ids = [i for i in tokenizer(text)["input_ids"] if i < vocab_size][:length]
        except Exception as error:  # a tokenizer without its vocabulary raises whatever it likes
            logger.warning("the tokenizer cannot read text (%s); the check after saving takes other tokens", error)
    if len(ids) < 2:  # any ids do: the same ones are compared before and after
        ids = [(7 * i + 3) % vocab_size for i in range(length)]
    tensor = torch.tensor(ids, dtype=torch.int64)
    return [{"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}]
