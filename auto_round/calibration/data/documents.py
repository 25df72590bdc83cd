"""Convert dataset rows and Python objects to calibration documents: a text, a conversation or token ids.

Objects are lists of strings or ids, tensors, dicts, a DataLoader, or any other iterable. Two-dimensional tensors and
columns of lists are batches, which are split into samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import ConfigError, DataError

Message = dict[str, str]
"""`{"role": "user", "content": "..."}`"""

TEXT_KEYS = ("text", "content", "code", "document", "body")
CHAT_KEYS = ("messages", "conversations", "conversation")
ASK_KEYS = ("instruction", "question", "prompt", "query", "input")
ANSWER_KEYS = ("output", "response", "answer", "completion", "chosen")
TOKEN_KEYS = ("input_ids", "attention_mask", "labels")
IGNORED_LABEL = -100
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


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
    """Yield the documents of a Python object in its own order.

    A DataLoader that shuffles draws from a random state made from `seed`; the global random state is restored.
    Raises ConfigError when `data` has an unsupported type, DataError for a bad sample.
    """
    if isinstance(data, (Mapping, torch.Tensor)) or _is_ids(data) or _is_conversation(data):
        yield from documents_from_item(data, "the dataset")
        return
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ConfigError(
            f"dataset is a {type(data).__name__}; give a dataset string, a list of strings or of token ids, or a "
            "DataLoader"
        )
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
    """The text or conversation under the first known key of a row, in the order of docs/datasets.md.

    A question and its answer become a conversation of two messages. Raises DataError when there is no known key.
    """
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
    """Names of the tensors of a tuple from a TensorDataset: (ids, mask), (ids, labels) or (ids, mask, labels).

    Empty when the tensors are separate samples.
    """
    if len(parts) not in (2, 3) or not all(isinstance(p, torch.Tensor) and p.dim() == 2 for p in parts):
        return ()
    if len({p.shape for p in parts}) > 1:
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
