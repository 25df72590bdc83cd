"""JSON from files that may come from anywhere: an object, each of whose keys is there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auto_round.errors import ModelError

_LARGEST = 200_000_000  # bytes; the index of the largest checkpoints has a hundredth of it


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """The object that some bytes of UTF-8 hold.

    Args:
        what: what they are, for messages: "the header of model.safetensors".

    Raises ModelError when it is no JSON, no object, nested beyond what can be read, or names something twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelError(f"{what} names {twice!r} twice; fetch the file again")
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{what} is not JSON ({reason}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} is not a JSON object; fetch the file again")
    return value


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file. Raises ModelError as `parse_object` does, and when the file cannot be read."""
    try:
        size = file.stat().st_size
        if size > _LARGEST:
            raise ModelError(f"{file} has {size} bytes, which is no configuration; fetch the model again")
        raw = file.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    return parse_object(raw, str(file))
