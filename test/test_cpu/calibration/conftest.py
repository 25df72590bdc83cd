"""A small offline tokenizer: one id per byte, BOS in front, a padding token of its own."""

from __future__ import annotations

from typing import Any

import pytest

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(bos: bool = True) -> Any:
    """A byte-level `PreTrainedTokenizerFast` with 256 bytes and the tokens <bos>, <eos>, <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<bos>", "<eos>", "<pad>"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Adds <bos> in front of every text."""
    return build_tokenizer()


@pytest.fixture(scope="module")
def plain_tokenizer() -> Any:
    """Adds no special tokens and has no chat template."""
    plain = build_tokenizer(bos=False)
    plain.chat_template = None
    return plain
