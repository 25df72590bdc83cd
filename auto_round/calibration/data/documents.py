"""From dataset rows and Python objects to documents (a text, a conversation or token ids), and from those to samples.

In joined text the leading tokens that the tokenizer adds (such as BOS) also start every sample. Ids given by the user
are used unchanged. docs/datasets.md says what is taken and what is dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import ConfigError, DataError

Message = dict[str, str]  # `{"role": "user", "content": "..."}`

TEXT_KEYS = ("text", "content", "code", "document", "body")
CHAT_KEYS = ("messages", "conversations", "conversation")
ASK_KEYS = ("instruction", "question", "prompt", "query", "input")
ANSWER_KEYS = ("output", "response", "answer", "completion", "chosen")
TOKEN_KEYS = ("input_ids", "attention_mask", "labels")
IGNORED_LABEL = -100
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
Sample = dict[str, torch.Tensor]
"""`input_ids` and `attention_mask`, int64 [seqlen], and `labels`, int64 [seqlen], when the user gave them."""

_BATCH = 64
# Texts are first truncated to this many characters per token, so that a book is not tokenized whole.
_CHARS_PER_TOKEN = 12


@dataclass(frozen=True)
class TokenDocument:
    """Token ids given by the user; `mask` is 0 for padding, `labels` is -100 where a position has no loss."""

    ids: list[int]
    mask: list[int] | None = None
    labels: list[int] | None = None

    def __post_init__(self) -> None:
        for name, other in (("attention_mask", self.mask), ("labels", self.labels)):
            if other is not None and len(other) != len(self.ids):
                raise DataError(
                    f"a sample has {len(self.ids)} input_ids but {len(other)} values in {name}; give one for each token"
                )


Document = str | list[Message] | TokenDocument


def documents_from_object(data: Any, seed: int) -> Iterator[Document]:
    """Yield the documents of a Python object. Raises ConfigError for its type, DataError for a bad sample."""
    if isinstance(data, (Mapping, torch.Tensor)) or _is_ids(data) or _is_conversation(data):
        yield from documents_from_item(data, "the dataset")
        return
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        allowed = "a dataset string, a list of strings or of token ids, or a DataLoader"
        raise ConfigError(f"dataset is a {type(data).__name__}; give {allowed}")
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:  # samplers draw their seed when the first item is requested
        items = iter(data)
        first = list(itertools.islice(items, 1))
    finally:
        torch.set_rng_state(state)
    for count, item in enumerate(itertools.chain(first, items)):
        yield from documents_from_item(item, f"item {count} of the dataset")


def documents_from_item(item: Any, where: str) -> Iterator[Document]:
    """Yield the documents of one row or item, which may be a batch; `where` names it in errors. Raises DataError."""
    if hasattr(item, "data") and isinstance(item.data, Mapping) and not isinstance(item, Mapping):
        item = item.data  # BatchEncoding and other UserDicts
    item = _to_tensor(item)
    if isinstance(item, torch.Tensor):
        item = {"input_ids": item}
    if isinstance(item, (str, TokenDocument)):
        yield item
    elif isinstance(item, Mapping) and "input_ids" in item:
        yield from _token_documents(item, where)
    elif isinstance(item, Mapping):
        texts = {k: item[k] for k in (*TEXT_KEYS, *ASK_KEYS, *ANSWER_KEYS) if k in item}
        batched = all(isinstance(v, (list, tuple)) and all(isinstance(t, str) for t in v) for v in texts.values())
        if texts and batched:  # a batch that a DataLoader made from rows of strings
            for row in zip(*texts.values(), strict=True):
                yield document_from_row(dict(zip(texts, row, strict=True)), where)
        else:
            yield document_from_row(item, where)
    elif _is_ids(item):
        yield TokenDocument(list(item))
    elif _is_conversation(item):
        yield _conversation(item, where)
    elif isinstance(item, (list, tuple)):
        parts = [_to_tensor(part) for part in item]
        if keys := _columns_of(parts):
            yield from _token_documents(dict(zip(keys, parts, strict=True)), where)
        else:
            for part in parts:
                yield from documents_from_item(part, where)
    else:
        raise DataError(
            f"{where} is a {type(item).__name__}; an item is a string, a list or tensor of token ids, or a dict with "
            "'input_ids' or 'text'"
        )


def document_from_row(row: Mapping[str, Any], where: str) -> Document:
    """The text or conversation under the first known key of a row, in the order of docs/datasets.md, or DataError."""
    for key in CHAT_KEYS:
        if row.get(key):
            return _conversation(row[key], f"{where}, key {key!r}")
    if "role" in row and "content" in row:
        return _conversation([row], where)
    for key in TEXT_KEYS:
        if isinstance(row.get(key), str):
            return row[key]
    asked = [row[k] for k in ASK_KEYS if isinstance(row.get(k), str) and row[k]]
    answers = [row[k] for k in ANSWER_KEYS if isinstance(row.get(k), str) and row[k]]
    if asked or answers:
        question = [{"role": "user", "content": "\n".join(asked)}] if asked else []
        return question + [{"role": "assistant", "content": a} for a in answers[:1]]
    if any(key in row and not row[key] for key in (*TEXT_KEYS, *CHAT_KEYS)):
        return ""  # an empty row is valid; it is counted as too short
    raise DataError(
        f"{where} has the keys {sorted(map(str, row))} and no text under any of them; use a key such as 'text', "
        "'messages' or 'input_ids'"
    )


def _conversation(messages: Any, where: str) -> list[Message] | str:
    """Convert messages (`role`/`content` or `from`/`value` pairs) to `role`/`content`; return a string unchanged."""
    if isinstance(messages, str):
        return messages
    result: list[Message] = []
    for message in messages if isinstance(messages, Iterable) else ():
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            break
        content = message.get("content", message.get("value"))
        if isinstance(content, (list, tuple)):  # parts such as {"type": "text", "text": "..."}
            content = "\n".join(p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))
        text = content if isinstance(content, str) else ""
        result.append({"role": _ROLES.get(role.lower(), role.lower()), "content": text})
    else:
        if result:
            return result
    raise DataError(
        f"{where} is not a conversation; write a list of objects with 'role' and 'content' (or 'from' and 'value')"
    )


def _is_ids(value: Any) -> bool:
    return _all_in_list(value, lambda v: isinstance(v, int) and not isinstance(v, bool))


def _is_conversation(value: Any) -> bool:
    return _all_in_list(value, lambda v: isinstance(v, Mapping) and ("role" in v or "from" in v))


def _all_in_list(value: Any, matches: Callable[[Any], bool]) -> bool:
    """Whether `value` is a list or tuple with at least one entry, and all of them match."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(matches, value))


def _token_documents(columns: Mapping[str, Any], where: str) -> Iterator[TokenDocument]:
    """Yield the samples of a dict of `[T]` or `[B, T]` ids, masks and labels."""
    rows = {k: _id_rows(columns[k], f"{k!r} of {where}") for k in TOKEN_KEYS if columns.get(k) is not None}
    sizes = {k: len(v) for k, v in rows.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"{where} holds different numbers of samples: {sizes}; give one row of each per sample")
    for i in range(sizes["input_ids"]):
        parts = {k: v[i] for k, v in rows.items()}
        yield TokenDocument(parts["input_ids"], parts.get("attention_mask"), parts.get("labels"))


def _id_rows(value: Any, where: str) -> list[list[int]]:
    """Convert a `[T]` or `[B, T]` tensor or list to lists of integers."""
    value = _to_tensor(value)
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            raise DataError(f"{where} has the dtype {value.dtype}; token ids are integers")
        if value.dim() not in (1, 2):
            raise DataError(f"{where} has {value.dim()} dimensions; give [tokens] or [samples, tokens]")
        value = value.to(torch.int64).tolist()
    if isinstance(value, (list, tuple)):
        if _is_ids(value) or not value:
            return [list(value)]
        rows = [r.tolist() if isinstance(r, torch.Tensor) else r for r in map(_to_tensor, value)]
        if all(_is_ids(r) for r in rows):
            return [list(r) for r in rows]
    raise DataError(f"{where} is not a list of integers; give [tokens] or [samples, tokens]")


def _columns_of(parts: list[Any]) -> tuple[str, ...]:
    """Keys of a TensorDataset's columns (ids, mask), (ids, labels) or (ids, mask, labels); () for separate samples."""
    tensors = all(isinstance(p, torch.Tensor) and p.dim() == 2 for p in parts)
    if len(parts) not in (2, 3) or not tensors or len({p.shape for p in parts}) > 1:
        return ()
    ids, second = parts[:2]
    if bool(((second == 0) | (second == 1)).all()) and not torch.equal(ids, second):
        return TOKEN_KEYS[: len(parts)]
    ignored = second == IGNORED_LABEL
    labels = len(parts) == 2 and bool(((second == ids) | ignored).all()) and bool(ignored.any())
    return ("input_ids", "labels") if labels else ()


def _to_tensor(value: Any) -> Any:
    """Convert numpy arrays to tensors; return everything else unchanged."""
    if type(value).__module__.startswith("numpy") and hasattr(value, "dtype") and hasattr(value, "shape"):
        return torch.as_tensor(value)
    return value


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
        self.seen += 1
        self.total += length
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.longest = max(self.longest, length)

    def explain(self) -> str:
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
    """Yield samples of `stats.seqlen` tokens, reading only as far as needed, and update `stats`. Raises DataError."""
    specials, seqlen = not apply_chat_template, stats.seqlen
    rendered = (_render(d, tokenizer, apply_chat_template, system_prompt) for d in documents)
    if stats.concat:
        leading: list[int] = []  # special tokens that the tokenizer puts before a text
        if tokenizer is not None:
            (bare,), (full,) = (_ids(tokenizer, ["a"], own) for own in (False, True))
            starts = range(len(full) - len(bare) + 1) if bare else ()
            leading = next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])
        yield from _concatenated(_encode(rendered, tokenizer, specials), leading, stats)
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
    """Render a document as text, with the chat template on request; token ids are returned unchanged."""
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


def _checked_ids(document: TokenDocument, tokenizer: Any) -> TokenDocument:
    """Check ids and add a mask that is 0 on padding at both ends, if the tokenizer's padding token is nothing else."""
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
