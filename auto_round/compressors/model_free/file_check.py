"""Reading a file back while it grows: bytes against what was written, the digest, and the page cache given back."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from auto_round.compressors.model_free.layout import Shard
from auto_round.compressors.model_free.shard_file import Mark
from auto_round.errors import VerifyError

_AT_ONCE = 1 << 20


class FileCheck:
    """Follows what is on the disk from the front of a file.

    What was read is dropped from the page cache: nobody reads it again soon, and the next pages that are written are
    those; where memory is handed to the machine on demand, fresh ones cost ten times as much as the writing.

    Args:
        path: the file, finished or not.
        compare: check that the bytes are those that were written, and that there are no others.
    """

    def __init__(self, path: Path, shard: Shard, compare: bool) -> None:
        self.shard, self._compare, self._path = shard, compare, path
        self._file = open(path, "rb", buffering=0)
        self._at = 0
        self._sha = hashlib.sha256()
        self._waiting: dict[int, Mark] = {}

    def advance(self, marks: Iterable[Mark]) -> None:
        """These pieces are on the disk now; go on as far as there is no gap.

        Raises:
            VerifyError: a byte is not what was written.
        """
        self._waiting |= {self.shard.offsets[mark[0]] + mark[1]: mark for mark in marks if mark[2]}
        begin = self._at
        if self._at == 0:
            front = self._file.read(len(self.shard.header))
            self._sha.update(front)
            self._at = len(front)
            if self._compare and front != self.shard.header:
                raise VerifyError(f"{self._path}: its header is not what was planned; do not use it, and report this")
        while (mark := self._waiting.pop(self._at, None)) is not None:
            self._read(*mark)
        if hasattr(os, "posix_fadvise") and self._at > begin:
            os.posix_fadvise(self._file.fileno(), begin, self._at - begin, os.POSIX_FADV_DONTNEED)

    def _read(self, name: str, _start: int, size: int, crc: int) -> None:
        found = 0
        while size:
            part = self._file.read(min(size, _AT_ONCE))
            if not part:
                raise VerifyError(f"{self._path} ends inside tensor {name}")
            self._sha.update(part)
            found = zlib.crc32(part, found) if self._compare else 0
            size -= len(part)
            self._at += len(part)
        if self._compare and found != crc:
            raise VerifyError(f"{self._path}: tensor {name} is not what was written; do not use it, and report this")

    def digest(self) -> str:
        """SHA-256 of the whole file.

        Raises:
            VerifyError: part of it was never written.
        """
        if self._waiting and self._compare:
            after = self._waiting[min(self._waiting)][0]
            raise VerifyError(
                f"{self._path}: bytes from {self._at} on, before tensor {after}, were never written as planned"
            )
        if self._compare and self._at != self.shard.size:
            raise VerifyError(f"{self._path}: its last {self.shard.size - self._at} bytes were never written")
        while part := self._file.read(_AT_ONCE):
            self._sha.update(part)
        return self._sha.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def file_digest(path: Path, shard: Shard, marks: Iterable[Mark], compare: bool) -> str:
    """SHA-256 of a finished file. `marks`: everything that was written to it. Raises what `FileCheck` raises."""
    check = FileCheck(path, shard, compare)
    try:
        check.advance(marks)
        return check.digest()
    finally:
        check.close()
