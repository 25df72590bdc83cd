"""From text to windows of token ids, all of one length."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import ConfigError, DataError


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises DataError when it is missing, unreadable, not text or empty."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"evaluation text {str(path)!r} is not a file; give a UTF-8 text file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise DataError(f"evaluation text {str(path)!r} is not UTF-8 text ({err.reason} at byte {err.start})") from err
    except OSError as err:
        raise DataError(f"evaluation text {str(path)!r} cannot be read: {err.strerror}") from err
    if not text.strip():
        raise DataError(f"evaluation text {str(path)!r} is empty; give a file with text")
    return text


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS token in front of a text, as Gemma's and Llama's do."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return len(ids) > 0 and int(ids[0]) == int(bos)


def make_windows(
    texts: Sequence[str], tokenizer: Any, *, seqlen: int, max_windows: int | None = None, add_bos: bool | None = None
) -> tuple[list[torch.Tensor], bool]:
    """Cut texts into consecutive windows that do not overlap.

    Texts are joined by a blank line, as one stream; a remainder shorter than a window is dropped, except when it is
    all there is. With BOS every window begins with it and carries `seqlen` - 1 tokens of text.

    Args:
        add_bos: None asks the tokenizer (see `adds_bos`).

    Returns:
        int64 [T] windows on the CPU, and whether they begin with BOS.

    Raises:
        ConfigError: for a length or count that makes no window, or BOS wanted and unknown to the tokenizer.
        DataError: when there is no text, or fewer than two tokens.
    """
    if seqlen < 2:
        raise ConfigError(f"seqlen={seqlen} is too short to predict anything; use 2 or more")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} leaves nothing to measure; use 1 or more, or None for all")
    bos = adds_bos(tokenizer) if add_bos is None else add_bos
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos and bos_id is None:
        raise ConfigError("a BOS token was asked for, but the tokenizer has none; leave out add_bos")
    stream: list[int] = []
    body = seqlen - int(bos)
    wanted = None if max_windows is None else body * max_windows
    for text in _pieces(texts):
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if wanted is not None and len(stream) >= wanted:
            break
    count = len(stream) // body
    parts = [
        stream[i * body : (i + 1) * body] for i in range(count if max_windows is None else min(count, max_windows))
    ]
    if not parts and len(stream) + int(bos) >= 2:
        parts = [stream]
    if not parts:
        raise DataError(f"the evaluation text has {len(stream)} tokens; at least 2 are needed, better {seqlen} or more")
    front = [int(bos_id)] if bos and bos_id is not None else []
    return [torch.tensor([*front, *part], dtype=torch.long) for part in parts], bos


def _pieces(texts: Sequence[str], size: int = 1 << 16) -> list[str]:
    """Texts in pieces of about `size` characters, cut at line ends, so that a large file is not tokenized whole."""
    pieces: list[str] = []
    for text in texts:
        if not text:
            continue
        start = 0
        while start < len(text):
            end = text.rfind("\n", start + size // 2, start + size) + 1 if len(text) - start > size else 0
            end = end or min(len(text), start + size)
            pieces.append(text[start:end])
            start = end
        pieces[-1] += "\n\n"
    return pieces
