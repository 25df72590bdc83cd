"""Take the machine out of what is published: of a path only the last part is told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# From the root, the home or the current folder; not the middle of a word, a hub id or an address.
_PATH = re.compile(r"(?<![\w/:.~\\-])(?:~|\.{1,2})?(?:/[^\s/,;:'\"`|()\[\]{}<>*?\\]+)+/?")


def shown_path(text: str) -> str:
    """The last part of a path of this machine; anything else as it is."""
    looks = text.startswith(("/", "~", "./", "../"))
    if text and (looks or os.path.exists(os.path.expanduser(text))):
        return os.path.basename(os.path.abspath(os.path.expanduser(text)))
    return text


def shown_dataset(text: str) -> str:
    """A data set as the user named it, `name:option=value` joined by commas, without the folders of files."""
    return ",".join(_shown_piece(piece) for piece in text.split(","))


def _shown_piece(piece: str) -> str:
    head, colon, options = piece.partition(":")
    stripped = head.strip()
    shown = options.split(":") if colon else []
    parts = [key + equals + shown_path(value) for key, equals, value in (option.partition("=") for option in shown)]
    return ":".join([head.replace(stripped, shown_path(stripped)) if stripped else head, *parts])


def without_paths(value: Any, known: Iterable[str] = ()) -> Any:
    """`value` with every path in its texts cut to the last part; keys of mappings too.

    Args:
        value: of JSON's types.
        known: paths that may appear, in any spelling, with spaces in them or relative.
    """
    spellings: dict[str, str] = {}
    for path in known:
        whole = Path(path).expanduser()
        if whole.is_absolute() or whole.exists():
            name = os.path.basename(os.path.abspath(whole))
            spellings |= {
                spelling: name for spelling in (path, str(whole), os.path.abspath(whole), str(whole.resolve()))
            }
    longest = sorted((s for s in spellings if "/" in s or os.sep in s), key=len, reverse=True)

    def cut(text: str) -> str:
        for spelling in longest:
            text = text.replace(spelling, spellings[spelling])
        return _PATH.sub(lambda match: os.path.basename(match[0].rstrip("/")) or match[0], text)

    def walk(part: Any) -> Any:
        if isinstance(part, str):
            return cut(part)
        if isinstance(part, Mapping):
            return {cut(key) if isinstance(key, str) else key: walk(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [walk(item) for item in part]
        return part

    return walk(value)
