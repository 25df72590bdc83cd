"""Text with a checksum in front, so that a file of a journal is what was written or is told to be damaged."""

from __future__ import annotations

import zlib


def add_checksum(text: str) -> str:
    """CRC-32 in a line of its own, then `text` and the end of a line."""
    return f"{zlib.crc32(text.encode()):08x}\n{text}\n"


def take_checksum(data: bytes) -> str:
    """What `add_checksum` was given. Raises ValueError when these are not the bytes that it made."""
    head, _, text = data.partition(b"\n")
    if not text.endswith(b"\n") or f"{zlib.crc32(text[:-1]):08x}".encode() != head:
        raise ValueError("its bytes are not those that were written")
    return text[:-1].decode()
