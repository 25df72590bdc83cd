"""One output file while it is written: pieces at their places, in any order, under a name that no reader opens."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from auto_round.compressors.digest import bytes_of
from auto_round.compressors.model_free.layout import Shard
from auto_round.compressors.model_free.rounding import Piece
from auto_round.errors import OutputError
from auto_round.export.shard_writer import sync_folder

Mark = tuple[str, int, int, int]
"""(tensor, offset in it, bytes, CRC-32 of them): what was written."""


class ShardFile:
    """The file of a shard.

    Args:
        shard: its plan.
        partial: path while it is unfinished, on the disk of `final`.
        final: path of the finished file.
        keep: go on with what `partial` holds; else it is made anew.

    Raises:
        OutputError: the disk is full or not writable; the message names file and tensor.
    """

    def __init__(self, shard: Shard, partial: Path, final: Path, keep: bool) -> None:
        self.shard, self.partial, self.final = shard, partial, final
        try:
            flags = os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC)
            self._handle = os.open(partial, flags, 0o644)
        except OSError as error:
            raise self._failed("its header", error) from error
        try:
            if not keep:
                _reserve(self._handle, shard.size)
                self._write_at(0, memoryview(shard.header), "its header")
        except OSError as error:
            self.close()
            raise self._failed("its header", error) from error

    def put(self, piece: Piece) -> Mark:
        """Write one piece. May be called from several threads for different pieces."""
        view = bytes_of(piece.data)
        self._write_at(self.shard.offsets[piece.name] + piece.offset, view, piece.name)
        return piece.name, piece.offset, len(view), zlib.crc32(view)

    def sync(self) -> None:
        """Bring everything that was written to the disk."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise self._failed("its last bytes", error) from error

    def finish(self) -> None:
        """The file is whole: sync it and give it its final name."""
        self.sync()
        self.close()
        try:
            os.replace(self.partial, self.final)
            sync_folder(self.final.parent)
        except OSError as error:
            raise self._failed("its name", error) from error

    def close(self) -> None:
        """Close without finishing. Calling it again does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write_at(self, offset: int, view: memoryview, what: str) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._handle, view[done : done + (1 << 30)], offset + done)
        except OSError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {what} to {self.final} ({error.strerror or error}); free some space or choose another "
            "folder, and run the same command again: finished parts are kept"
        )


def _reserve(handle: int, size: int) -> None:
    """Make room for the whole file, so that a full disk shows before work is done; where the system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    os.ftruncate(handle, size)


_NOT_SUPPORTED = (22, 38, 95)  # EINVAL, ENOSYS, EOPNOTSUPP: file systems without reservation
