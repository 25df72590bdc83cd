"""Tokenize documents into calibration samples of `seqlen` tokens; docs/datasets.md says what is dropped.

Texts get the special tokens that the tokenizer adds; in joined text its leading ones (such as BOS) also start every
sample, as models trained with one need it. Ids given by the user are used unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.calibration.data.documents import IGNORED_LABEL, TOKEN_KEYS, Document, Message, TokenDocument
from auto_round.errors import DataError

Sample = dict[str, torch.Tensor]
"""`input_ids` and `attention_mask`, int64 [seqlen], and `labels`, int64 [seqlen], when the user gave them."""

_BATCH = 64
# Texts are first truncated to this many characters per token, so that a book is not tokenized whole.
_CHARS_PER_TOKEN = 12


@dataclass
class DocumentStats:
    """The reading of one dataset: what is wanted, and statistics of its documents."""

    name: str
    seqlen: int  # tokens per sample
    concat: bool = False  # documents are joined
    named: bool = True  # it comes from a dataset string, where `concat=True` can be written
    num: int | None = None  # samples; None: a share of the rest
    seen: int = 0  # documents read
    kept: int = 0  # samples made
    short: int = 0  # documents with fewer than `seqlen` tokens
    repeats: int = 0  # documents dropped because one token repeats to the end
    shortest: int | None = None  # tokens; a document far longer than `seqlen` may be counted in part
    longest: int = 0
    total: int = 0

    def count(self, length: int) -> None:
        """Count one document of `length` tokens."""
        self.seen += 1
        self.total += length
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.longest = max(self.longest, length)

    def explain(self) -> str:
        """Describe what was read and dropped, in one sentence."""
        if not self.seen:
            return f"{self.name!r}: no document"
        documents = f"{self.seen} document{'s' if self.seen > 1 else ''}"
        what = f"{self.name!r}: {documents} of {self.shortest} to {self.longest} tokens"
        if self.concat:
            return f"{what}, {self.total} tokens joined, {self.kept} samples of {self.seqlen}"
        return (
            f"{what}, {self.kept} kept, {self.short} dropped as shorter than seqlen={self.seqlen}, {self.repeats} "
            "dropped as padding (one token repeated over more than half of it)"
        )

    def advice(self) -> str:
        """What the user can set to get samples."""
        if not self.total and (self.concat or not self.seen):
            return "give it some text"
        if self.concat:
            return f"set seqlen<={self.total} or give more text"
        if self.longest < self.seqlen:
            longest = f"set seqlen<={self.longest} or " if self.longest else ""
            return longest + ("add ':concat=True' to the dataset" if self.named else "give longer samples")
        return "give text that is not repeated padding"


def samples_of(
    documents: Iterable[Document], tokenizer: Any, stats: DocumentStats, apply_chat_template: bool = False,
    system_prompt: str | None = None,
) -> Iterator[Sample]:  # fmt: skip
    """Yield samples of `stats.seqlen` tokens on demand, and update `stats`. Raises DataError.

    Without `stats.concat` a document becomes at most one sample. Reads only as far as needed, in batches of 64 texts.
    """
    specials, seqlen = not apply_chat_template, stats.seqlen
    rendered = (_render(d, tokenizer, apply_chat_template, system_prompt) for d in documents)
    if stats.concat:
        yield from _concatenated(_encode(rendered, tokenizer, specials), _leading_tokens(tokenizer), stats)
        return
    for document in _encode(rendered, tokenizer, specials, seqlen):
        length = len(document.ids)
        stats.count(length)
        if length < seqlen:
            stats.short += 1
            continue
        is_text = document.mask is None  # ids given by the user have a mask here
        mask = document.mask or [1] * length
        # Leading padding is cut off first.
        start = min(mask.index(1), length - seqlen) if any(mask) else 0
        window = slice(start, start + seqlen)
        ids = document.ids[window]
        repeated = next((n for n, token in enumerate(reversed(ids)) if token != ids[-1]), seqlen)
        if not any(mask) or (is_text and repeated * 2 > seqlen):
            stats.repeats += 1
            continue
        stats.kept += 1
        yield _sample(ids, mask[window], None if document.labels is None else document.labels[window])


def _concatenated(documents: Iterable[TokenDocument], before: list[int], stats: DocumentStats) -> Iterator[Sample]:
    """Yield samples cut from all documents joined, each with the tokens `before`; padding is left out."""
    if len(before) >= stats.seqlen:
        raise DataError(f"seqlen={stats.seqlen} is too short for the {len(before)} special tokens of the tokenizer")
    ids: list[int] = []
    labels: list[int] = []
    has_labels = user_ids = False
    for document in documents:
        user_ids = user_ids or document.mask is not None
        has_labels = has_labels or document.labels is not None
        kept = [i for i in range(len(document.ids)) if document.mask is None or document.mask[i]]
        stats.count(len(kept))
        ids.extend(document.ids[i] for i in kept)
        labels.extend((document.labels or document.ids)[i] for i in kept)
        position = 0
        while True:
            lead = [] if user_ids or ids[position : position + len(before)] == before else before
            end = position + stats.seqlen - len(lead)
            if end > len(ids):
                break
            chunk_labels = [IGNORED_LABEL] * len(lead) + labels[position:end] if has_labels else None
            stats.kept += 1
            yield _sample(lead + ids[position:end], [1] * stats.seqlen, chunk_labels)
            position = end
        del ids[:position], labels[:position]


def _render(document: Document, tokenizer: Any, apply_chat_template: bool, system_prompt: str | None) -> Document:
    """Render a document as text, with the chat template on request; token ids are returned unchanged.

    A plain text becomes one user message. `system_prompt` replaces the conversation's own system message.
    """
    if not apply_chat_template:
        return "\n".join(m["content"] for m in document if m["content"]) if isinstance(document, list) else document
    if isinstance(document, TokenDocument):
        raise DataError("apply_chat_template needs text, but this dataset has token ids; leave apply_chat_template out")
    messages: list[Message] = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *(m for m in messages if m["role"] != "system")]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template; leave apply_chat_template out, or give tokenizer.chat_template"
        )
    prompts = messages[-1]["role"] == "user"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts))
    except Exception as error:  # templates raise anything, mostly jinja2's TemplateError
        raise DataError(
            f"the chat template rejects these messages ({error}); leave system_prompt out, or leave the template out"
        ) from error


def _encode(
    documents: Iterable[Document], tokenizer: Any, specials: bool, most_tokens: int | None = None
) -> Iterator[TokenDocument]:
    """Yield token documents in order. With `most_tokens`, a text is tokenized only as far as needed."""
    stream = iter(documents)
    limit = None if most_tokens is None else _CHARS_PER_TOKEN * most_tokens
    while batch := list(itertools.islice(stream, _BATCH)):
        texts = [d for d in batch if isinstance(d, str)]
        encoded = _ids(tokenizer, [text[:limit] for text in texts], specials)
        if limit is not None and most_tokens is not None:
            # A text whose truncated copy has too few tokens (long runs of spaces, say) is tokenized whole.
            for i, text in enumerate(texts):
                if len(text) > limit and len(encoded[i]) < most_tokens + 16:
                    (encoded[i],) = _ids(tokenizer, [text], specials)
        tokens = iter(encoded)
        for document in batch:
            if isinstance(document, TokenDocument):
                yield _checked_ids(document, tokenizer)
            else:
                yield TokenDocument(next(tokens))


def _ids(tokenizer: Any, texts: list[str], specials: bool) -> list[list[int]]:
    if not texts:
        return []
    if tokenizer is None:
        raise DataError("calibration text needs a tokenizer; give tokenizer=…, or give token ids instead of text")
    encoded = tokenizer(
        texts, add_special_tokens=specials, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _leading_tokens(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    if tokenizer is None:
        return []
    (bare,), (full,) = _ids(tokenizer, ["a"], specials=False), _ids(tokenizer, ["a"], specials=True)
    starts = range(len(full) - len(bare) + 1) if bare else ()
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _checked_ids(document: TokenDocument, tokenizer: Any) -> TokenDocument:
    """Check ids and add a mask: the one given, or one that is 0 on padding tokens at both ends.

    Padding is detected only when the tokenizer has a padding token that it uses for nothing else.
    """
    if any(t < 0 for t in document.ids):
        raise DataError(
            f"a sample has the token id {min(document.ids)}; ids are 0 or more (mark padding with attention_mask)"
        )
    if document.mask is not None:
        if any(m not in (0, 1) for m in document.mask):
            raise DataError(
                "a sample has an attention_mask with values other than 0 and 1; use 1 for tokens and 0 for padding"
            )
        return document
    mask = [1] * len(document.ids)
    pad = getattr(tokenizer, "pad_token_id", None)
    others = {getattr(tokenizer, f"{k}_token_id", None) for k in ("eos", "bos", "unk")}
    real = [i for i, token in enumerate(document.ids) if token != pad]
    if pad is not None and pad not in others and real:  # nothing but this token: not padding
        mask = [int(real[0] <= i <= real[-1]) for i in range(len(mask))]
    return TokenDocument(document.ids, mask, document.labels)


def _sample(ids: list[int], mask: list[int], labels: list[int] | None) -> Sample:
    columns = zip(TOKEN_KEYS, (ids, mask, labels), strict=True)
    return {key: torch.tensor(values, dtype=torch.int64) for key, values in columns if values is not None}
