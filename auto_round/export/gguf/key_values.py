"""Key values of a GGUF file, with their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from auto_round.export.gguf.package import gguf_package


class KeyValue(NamedTuple):
    """One key value: what `gguf.GGUFWriter.add_key_value` takes.

    Attributes:
        key: full key, such as "llama.block_count".
        value: a number, text, bool, or a list of them.
        kind: a `gguf.GGUFValueType`.
        item_kind: the type of a list's items; None for anything else.
    """

    key: str
    value: Any
    kind: Any
    item_kind: Any = None


def key_value(key: str, value: Any, kind: str) -> KeyValue:
    """A key value of the type called `kind`, such as "uint32". A list's `kind` is the type of its items."""
    types = gguf_package().GGUFValueType
    own = types[kind.upper()]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return KeyValue(key, list(value), types.ARRAY, own)
    return KeyValue(key, value, own)


def stored_bytes(pair: KeyValue) -> int:
    """Bytes that a key value takes in a file's header: lengths are 8 bytes, types 4."""
    value = pair.value
    if pair.item_kind is not None:
        size = 4 + 8 + sum(_item_bytes(item, pair.item_kind.name) for item in value)
    else:
        size = _item_bytes(value, pair.kind.name)
    return 8 + len(pair.key.encode()) + 4 + size


def _item_bytes(value: Any, kind: str) -> int:
    if kind == "STRING":
        return 8 + len(value if isinstance(value, bytes) else str(value).encode())
    return 1 if kind == "BOOL" else int("".join(filter(str.isdigit, kind))) // 8
