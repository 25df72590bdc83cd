"""Convert dataset rows and Python objects to calibration documents: a text, a conversation or token ids.

Rows come from files and hub datasets. Python objects are lists of strings or ids, tensors, dicts, a DataLoader,
or any other iterable; two-dimensional tensors and columns of lists are batches, which are split into samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class TokenDocument:
    """Token ids given by the user; `mask` 0 marks padding, `labels` -100 a position that is not to be learned."""

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


def document_from_row(row: Any, where: str) -> Document:
    """The document in one row: a string, or a mapping with a text, a conversation or token ids under a usual key.

    Keys are tried in this order: `input_ids`; `messages`, `conversations`, `conversation`; `text`, `content`, `code`,
    `document`, `body`; then a question (`instruction`, `question`, `prompt`, `query`, `input`) with its answer
    (`output`, `response`, `answer`, `completion`, `chosen`), which make a conversation of two messages. `where` names
    the row in errors. Raises DataError when nothing fits.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        if "input_ids" in row:
            return _tokens(row, where)
        for key in CHAT_KEYS:
            if row.get(key):
                return conversation(row[key], f"{where}, key {key!r}")
        if "role" in row and "content" in row:
            return conversation([row], where)
        for key in TEXT_KEYS:
            if isinstance(row.get(key), str):
                return row[key]
        dialogue = _question_and_answer(row)
        if dialogue:
            return dialogue
        if any(key in row and not row[key] for key in (*TEXT_KEYS, *CHAT_KEYS)):
            return ""  # a row that is empty, not one that is wrong; it is counted among the short ones
        raise DataError(
            f"{where} has the keys {sorted(map(str, row))} and no text under any of them; use a key such as 'text', "
            "'messages' or 'input_ids'"
        )
    if isinstance(row, list) and row and all(isinstance(m, Mapping) for m in row):
        return conversation(row, where)
    if is_ids(row):
        return TokenDocument(list(row))
    raise DataError(f"{where} is a {type(row).__name__}; a document is a string, an object, or a list of token ids")


def conversation(messages: Any, where: str) -> list[Message] | str:
    """Messages as `role`/`content` pairs, from those or from `from`/`value` pairs. A plain string stays one."""
    if isinstance(messages, str):
        return messages
    result: list[Message] = []
    for message in messages if isinstance(messages, Iterable) else ():
        if not isinstance(message, Mapping):
            break
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            break
        result.append({"role": _ROLES.get(role.lower(), role.lower()), "content": _flat(content)})
    else:
        if result:
            return result
    raise DataError(
        f"{where} is no conversation; write a list of objects with 'role' and 'content' (or 'from' and 'value')"
    )


def plain_text(messages: Iterable[Message]) -> str:
    """A conversation without a template: the contents, one below the other."""
    return "\n".join(m["content"] for m in messages if m["content"])


def is_ids(value: Any) -> bool:
    """Whether `value` is a non-empty list or tuple of whole numbers."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    )


def _tokens(row: Mapping[str, Any], where: str) -> TokenDocument:
    columns: dict[str, list[int] | None] = {}
    for key in ("input_ids", "attention_mask", "labels"):
        value = row.get(key)
        if value is None:
            columns[key] = None
        elif isinstance(value, Sequence) and (is_ids(value) or not len(value)):
            columns[key] = list(value)
        else:
            raise DataError(f"{where} has {key!r} that is no flat list of whole numbers; write one row per sample")
    return TokenDocument(columns["input_ids"] or [], columns["attention_mask"], columns["labels"])


def _question_and_answer(row: Mapping[str, Any]) -> list[Message]:
    asked = [row[k] for k in ASK_KEYS if isinstance(row.get(k), str) and row[k]]
    answers = [row[k] for k in ANSWER_KEYS if isinstance(row.get(k), str) and row[k]]
    messages = [{"role": "user", "content": "\n".join(asked)}] if asked else []
    return messages + [{"role": "assistant", "content": a} for a in answers[:1]]


def _flat(content: Any) -> str:
    """Text of a message whose content is a string or a list of parts such as `{"type": "text", "text": "..."}`."""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return "\n".join(p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))
    return ""


# Documents from Python objects: lists of strings or ids, tensors, dicts, a DataLoader, anything that can be iterated.
#
# Tensors of two dimensions, and columns of lists, are batches and are taken apart into samples.

_TOKEN_KEYS = ("input_ids", "attention_mask", "labels")
IGNORED = -100


def documents_from_object(data: Any, seed: int) -> Iterator[Document]:
    """Documents of a user's object, in its own order.

    `data` is what `load_calibration` takes other than a dataset string. A DataLoader that shuffles draws from a random
    state made from `seed`; the state of the program is put back. Raises ConfigError when `data` is not one of the
    known kinds, DataError for a sample that is not.
    """
    if isinstance(data, (Mapping, torch.Tensor)) or is_ids(data) or _is_conversation(data):
        yield from documents_from_item(data, "the dataset")
        return
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ConfigError(
            f"dataset is a {type(data).__name__}; give a dataset string, a list of strings or of token ids, or a "
            "DataLoader"
        )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:  # samplers draw their seed when the first item is asked for
        items = iter(data)
        first = list(_first_item(items))
    finally:
        torch.set_rng_state(state)
    count = 0
    for group in (first, items):
        for item in group:
            yield from documents_from_item(item, f"item {count} of the dataset")
            count += 1


def _first_item(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        yield item
        return


def documents_from_item(item: Any, where: str) -> Iterator[Document]:
    """Documents of one item, which may be a batch; `where` names it in errors. Raises DataError when it is neither."""
    if hasattr(item, "data") and isinstance(item.data, Mapping) and not isinstance(item, Mapping):
        item = item.data  # BatchEncoding and other UserDicts
    item = _to_tensor(item)
    if isinstance(item, Mapping) and "input_ids" in item:
        yield from _from_columns(item, where)
    elif isinstance(item, Mapping) and (lists := _text_columns(item)):
        for row in zip(*lists.values(), strict=True):
            yield document_from_row(dict(zip(lists, row, strict=True)), where)
    elif isinstance(item, torch.Tensor):
        yield from _from_columns({"input_ids": item}, where)
    elif isinstance(item, (str, Mapping)) or is_ids(item) or _is_conversation(item):
        yield document_from_row(item, where)
    elif isinstance(item, (list, tuple)):
        parts = [_to_tensor(part) for part in item]
        keys = _columns_of(parts)
        if keys:
            yield from _from_columns(dict(zip(keys, parts, strict=True)), where)
            return
        for part in parts:
            yield from documents_from_item(part, where)
    else:
        raise DataError(
            f"{where} is a {type(item).__name__}; an item is a string, a list or tensor of token ids, or a dict with "
            "'input_ids' or 'text'"
        )


def _from_columns(columns: Mapping[str, Any], where: str) -> Iterator[TokenDocument]:
    """Samples of a dict of `[T]` or `[B, T]` ids, masks and labels."""
    rows = {k: _id_rows(columns[k], f"{k!r} of {where}") for k in _TOKEN_KEYS if columns.get(k) is not None}
    sizes = {k: len(v) for k, v in rows.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"{where} holds different numbers of samples: {sizes}; give one row of each per sample")
    for i in range(sizes["input_ids"]):
        parts = {k: v[i] for k, v in rows.items()}
        yield TokenDocument(parts["input_ids"], parts.get("attention_mask"), parts.get("labels"))


def _id_rows(value: Any, where: str) -> list[list[int]]:
    """A `[T]` or `[B, T]` tensor or list as lists of ints."""
    value = _to_tensor(value)
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            raise DataError(f"{where} has the dtype {value.dtype}; token ids are whole numbers")
        if value.dim() not in (1, 2):
            raise DataError(f"{where} has {value.dim()} dimensions; give [tokens] or [samples, tokens]")
        value = value.to(torch.int64).tolist()
    if is_ids(value):
        return [list(value)]
    if isinstance(value, (list, tuple)):
        rows = [r.tolist() if isinstance(r, torch.Tensor) else r for r in map(_to_tensor, value)]
        if all(is_ids(r) for r in rows):
            return [list(r) for r in rows]
    raise DataError(f"{where} is no list of whole numbers; give [tokens] or [samples, tokens]")


def _text_columns(item: Mapping[str, Any]) -> dict[str, list[str]]:
    """The columns of a batch of texts, as a DataLoader makes one from rows of strings. Empty for a single row."""
    texts = {k: item[k] for k in (*TEXT_KEYS, *ASK_KEYS, *ANSWER_KEYS) if k in item}
    if not all(isinstance(v, (list, tuple)) and all(isinstance(t, str) for t in v) for v in texts.values()):
        return {}
    return {k: list(v) for k, v in texts.items()}


def _columns_of(parts: list[Any]) -> tuple[str, ...]:
    """What the tensors of a tuple are, where they are columns, as a TensorDataset gives them: (ids, mask), (ids,
    labels) or (ids, mask, labels). Empty where each is a sample, or several, of its own."""
    if len(parts) not in (2, 3) or not all(isinstance(p, torch.Tensor) and p.dim() == 2 for p in parts):
        return ()
    if len({p.shape for p in parts}) > 1:
        return ()
    ids, second = parts[:2]
    if bool(((second == 0) | (second == 1)).all()) and not torch.equal(ids, second):
        return _TOKEN_KEYS[: len(parts)]
    if len(parts) == 2 and bool(((second == ids) | (second == IGNORED)).all()) and bool((second == IGNORED).any()):
        return ("input_ids", "labels")
    return ()


def _is_conversation(item: Any) -> bool:
    return (
        isinstance(item, (list, tuple))
        and bool(item)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in item)
    )


def _to_tensor(value: Any) -> Any:
    """numpy arrays as tensors, everything else as it is."""
    if type(value).__module__.startswith("numpy") and hasattr(value, "dtype") and hasattr(value, "shape"):
        return torch.as_tensor(value)
    return value
