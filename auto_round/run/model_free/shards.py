"""Output shards of a model-free run: planned offsets, positional writes, read-back checks and digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from auto_round.errors import ConfigError, OutputError, VerifyError
from auto_round.files import DTYPE_NAMES, bytes_of, safetensors_header, sync_folder
from auto_round.formats.base import TensorSpecs
from auto_round.run.model_free.unit_processor import Chunk
from auto_round.run.model_free.units import Unit, tensor_bytes

_ALIGN = 8
_CHUNK_BYTES = 1 << 20  # of a file that is read back at a time
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that cannot reserve space

WriteRecord = tuple[str, int, int, int]
"""(tensor, offset in it, bytes, CRC-32 of them) of one write."""


@dataclass(frozen=True)
class Shard:
    """Plan of one output file.

    Attributes:
        name: final file name.
        header: the bytes before the tensors.
        offsets: of each tensor in the file.
        size: of the whole file.
        units: indices of the units that write to it.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All output files, and the index of the file of each tensor."""

    shards: tuple[Shard, ...]
    shard_of: Mapping[str, int] = field(default_factory=dict)


def plan_layout(units: Sequence[Unit], tensors: TensorSpecs, files: Sequence[Path], max_size: int) -> Layout:
    """One output file for each input file, split at `max_size` bytes.

    A unit belongs to the last of the files that it reads, so that input files can be fetched and deleted in order.
    Units that write parts of one tensor are in one file.

    Args:
        files: input files in processing order.
    """
    rank = {file: i for i, file in enumerate(files)}
    owner = [max((rank[f] for f in unit.files), default=0) for unit in units]
    latest: dict[str, int] = {}
    for unit, own in zip(units, owner, strict=True):
        for name in unit.outputs:
            latest[name] = max(latest.get(name, 0), own)
    parts: list[list[int]] = []
    for index in range(len(files)):
        mine = [i for i, unit in enumerate(units) if max(latest[n] for n in unit.outputs) == index]
        parts += _split_units(mine, units, tensors, max_size)
    count = len(parts)
    shards = []
    shard_of: dict[str, int] = {}
    for position, members in enumerate(parts):
        names = dict.fromkeys(name for i in members for name in units[i].outputs)
        shard_of |= dict.fromkeys(names, position)
        name = "model.safetensors" if count == 1 else f"model-{position + 1:05d}-of-{count:05d}.safetensors"
        shards.append(_shard(name, list(names), tensors, members))
    return Layout(tuple(shards), shard_of)


def _split_units(members: Sequence[int], units: Sequence[Unit], tensors: TensorSpecs, max_size: int) -> list[list[int]]:
    """Split units into groups whose tensors fit into `max_size`; units with a common tensor stay in one group."""
    last: dict[str, int] = {name: i for i in members for name in units[i].outputs}  # last unit that writes to a tensor
    parts: list[list[int]] = []
    size, open_until = 0, -1
    seen: set[str] = set()
    for i in members:
        new = [name for name in units[i].outputs if name not in seen]
        own = sum(tensor_bytes(tensors[name]) for name in new)
        if not parts or (size + own > max_size and i > open_until and size):
            parts.append([])
            size = 0
        parts[-1].append(i)
        seen.update(new)
        size += own
        open_until = max([open_until, *(last[name] for name in units[i].outputs)])
    return parts


def _shard(name: str, names: Sequence[str], tensors: TensorSpecs, members: Sequence[int]) -> Shard:
    # Readers view the bytes in place, so every tensor must start aligned to its dtype: odd sizes come last.
    even = [n for n in names if tensor_bytes(tensors[n]) % _ALIGN == 0]
    odd = sorted((n for n in names if tensor_bytes(tensors[n]) % _ALIGN), key=lambda n: -tensors[n][1].itemsize)
    for tensor in names:
        if tensors[tensor][1] not in DTYPE_NAMES:
            raise ConfigError(f"tensor {tensor!r} has dtype {tensors[tensor][1]}, which safetensors files cannot hold")
    header, offsets, size = safetensors_header([(t, *tensors[t]) for t in (*even, *odd)], {"format": "pt"})
    return Shard(name, header, offsets, size, tuple(members))


def index_text(layout: Layout, tensors: TensorSpecs) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {name: layout.shards[layout.shard_of[name]].name for name in sorted(layout.shard_of)}
    total = sum(tensor_bytes(tensors[name]) for name in layout.shard_of)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


class ShardFile:
    """A shard while it is written at planned offsets, in any order, under a temporary name.

    Args:
        shard: its plan.
        partial: path while it is unfinished, on the disk of `final`.
        final: path of the finished file.
        resume: continue with the contents of `partial`; otherwise it is truncated.

    Raises:
        OutputError: the disk is full or not writable; the message names file and tensor.
    """

    def __init__(self, shard: Shard, partial: Path, final: Path, resume: bool) -> None:
        self.shard, self.partial, self.final, self._handle = shard, partial, final, -1
        try:
            flags = os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC)
            self._handle = os.open(partial, flags, 0o644)
            if not resume:
                _reserve(self._handle, shard.size)
                self._write_at(0, memoryview(shard.header), "its header")
        except OSError as error:
            self.close()
            raise self._failed("its header", error) from error

    def put(self, chunk: Chunk) -> WriteRecord:
        """Write one chunk. May be called from several threads for different chunks."""
        view = bytes_of(chunk.data)
        self._write_at(self.shard.offsets[chunk.name] + chunk.offset, view, chunk.name)
        return chunk.name, chunk.offset, len(view), zlib.crc32(view)

    def sync(self) -> None:
        """Sync everything that was written to disk."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise self._failed("its last bytes", error) from error

    def finish(self) -> None:
        """Sync the complete file and give it its final name."""
        self.sync()
        self.close()
        try:
            os.replace(self.partial, self.final)
            sync_folder(self.final.parent)
        except OSError as error:
            raise self._failed("its name", error) from error

    def close(self) -> None:
        """Close without finishing; a second call does nothing."""
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
            "folder, and run the same command again to resume"
        )


def _reserve(handle: int, size: int) -> None:
    """Reserve disk space for the whole file, if the system can, so that a full disk is detected before work is done."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    os.ftruncate(handle, size)


class FileCheck:
    """Reads a file back while it is written, from the front: computes its digest and compares checksums.

    What was read is dropped from the page cache, so that its pages are reused for writing: new pages can cost ten times
    as much as the write itself.

    Args:
        path: the file, finished or not.
        compare: compare the bytes with the records of what was written.
    """

    def __init__(self, path: Path, shard: Shard, compare: bool) -> None:
        self.shard, self._compare, self._path = shard, compare, path
        self._file = open(path, "rb", buffering=0)
        self._at = 0
        self._sha = hashlib.sha256()
        self._waiting: dict[int, WriteRecord] = {}

    def advance(self, chunk_records: Iterable[WriteRecord]) -> None:
        """Add records of chunks that are on disk, and read on until the first gap.

        Raises:
            VerifyError: a byte differs from what was written.
        """
        self._waiting |= {self.shard.offsets[record[0]] + record[1]: record for record in chunk_records if record[2]}
        begin = self._at
        if self._at == 0:
            front = self._file.read(len(self.shard.header))
            self._sha.update(front)
            self._at = len(front)
            if self._compare and front != self.shard.header:
                raise VerifyError(f"{self._path}: its header is not what was planned; do not use it, and report this")
        while (record := self._waiting.pop(self._at, None)) is not None:
            self._read(*record)
        if hasattr(os, "posix_fadvise") and self._at > begin:
            os.posix_fadvise(self._file.fileno(), begin, self._at - begin, os.POSIX_FADV_DONTNEED)

    def _read(self, name: str, _start: int, size: int, crc: int) -> None:
        found = 0
        while size:
            part = self._file.read(min(size, _CHUNK_BYTES))
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
            VerifyError: a part of it was never written.
        """
        if self._waiting and self._compare:
            after = self._waiting[min(self._waiting)][0]
            raise VerifyError(
                f"{self._path}: bytes from {self._at} on, before tensor {after}, were never written as planned"
            )
        if self._compare and self._at != self.shard.size:
            raise VerifyError(f"{self._path}: its last {self.shard.size - self._at} bytes were never written")
        while part := self._file.read(_CHUNK_BYTES):
            self._sha.update(part)
        return self._sha.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def file_digest(path: Path, shard: Shard, chunk_records: Iterable[WriteRecord], compare: bool) -> str:
    """SHA-256 of a finished file, compared with the records of all its chunks as in `FileCheck`."""
    check = FileCheck(path, shard, compare)
    try:
        check.advance(chunk_records)
        return check.digest()
    finally:
        check.close()
