"""What one calibration document is, and how rows of files and data sets become documents.

A document is a text, a conversation, or token ids that somebody else has made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.errors import DataError

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
