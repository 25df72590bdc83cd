"""Truncations and single bit flips of a file, and what a reader makes of them."""

from __future__ import annotations

import io
import json
import pickletools
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.errors import AutoRoundError

_SLOW_S = 20.0
_ROOM_BYTES = 1 << 30


def truncations(data: bytes, head: int, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`count` cuts: half of them within the first `head` bytes, empty files and the last byte among them. As many as
    there are where a file is shorter."""
    drawn = random.Random(seed)
    sizes = {size for size in (0, 1, 7, 8, len(data) - 1, head) if 0 <= size < len(data)}
    while len(sizes) < min(count, len(data)):
        sizes.add(drawn.randrange(head) if len(sizes) % 2 else drawn.randrange(len(data)))
    for size in sorted(sizes)[:count]:
        yield f"cut to {size}", data[:size]


def flips(data: bytes, where: Sequence[int], count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`count` different single bits of the bytes at `where` turned over."""
    for place in random.Random(seed).sample(range(len(where) * 8), min(count, len(where) * 8)):
        byte, bit = where[place // 8], place % 8
        changed = bytearray(data)
        changed[byte] ^= 1 << bit
        yield f"bit {bit} of byte {byte}", bytes(changed)


@dataclass
class Outcome:
    """Counts, and what went wrong, in words."""

    injected: int = 0
    detected: int = 0
    same: int = 0
    wrong: list[str] = field(default_factory=list)


def judge(
    damage: Iterator[tuple[str, bytes]], file: Path, read: Callable[[], Any], right: Any,
    confirm: Callable[[Any], None] | None = None,
) -> Outcome:  # fmt: skip
    """Put each damaged content into the file and read it.

    Args:
        read: the reader; its result is compared with `right`.
        confirm: what the product does next with another result than `right` (opening the model, say), which must
            refuse it with a typed error.
    """
    outcome = Outcome()
    for what, content in damage:
        file.write_bytes(content)
        outcome.injected += 1
        started = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = read()
            if found != right and confirm is not None:
                confirm(found)
            if found == right:
                outcome.same += 1
            else:
                outcome.wrong.append(f"{what}: read as something else without a word")
        except AutoRoundError as error:
            outcome.detected += 1
            if not str(error).strip():
                outcome.wrong.append(f"{what}: an error without words")
        except Exception as error:
            outcome.wrong.append(f"{what}: {type(error).__name__}: {error}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if time.monotonic() - started > _SLOW_S or grown > _ROOM_BYTES:
            outcome.wrong.append(f"{what}: took {time.monotonic() - started:.0f} s and {grown} bytes")
    return outcome


def report(record: Callable[..., None], reader: str, found: dict[str, list[Outcome]]) -> None:
    """Give the outcomes of each kind of damage to `record`, and raise AssertionError for what went wrong."""
    for kind, parts in found.items():
        counts = [sum(getattr(part, what) for part in parts) for what in ("injected", "detected", "same")]
        record(f"{reader}: {kind}", *counts, sum(len(part.wrong) for part in parts))
    wrong = [line for parts in found.values() for part in parts for line in part.wrong]
    assert not wrong, "\n".join(wrong[:20])


def safetensors_head(data: bytes) -> int:
    """Bytes before the tensors'."""
    return 8 + int.from_bytes(data[:8], "little")


def around_tensors(file: Path) -> list[int]:
    """Places of the bytes of a pickle that are no tensor's: those of an archive's other records and of its lists."""
    data = file.read_bytes()
    if not zipfile.is_zipfile(file):
        stream = io.BytesIO(data)
        for _ in range(5):  # a mark, a version, this machine's sizes, the tensors by name, the names of their data
            list(pickletools.genops(stream))
        return list(range(stream.tell()))
    places = set(range(len(data)))
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                name, extra = struct.unpack_from("<HH", data, record.header_offset + 26)
                start = record.header_offset + 30 + name + extra  # behind the record's own header
                places.difference_update(range(start, start + record.file_size))
    return sorted(places)


def json_object(text: bytes) -> dict[str, Any]:
    return dict(json.loads(text))
