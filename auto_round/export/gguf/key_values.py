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
