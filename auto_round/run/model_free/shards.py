"""Output shards of a model-free run: planned offsets, positional writes, read-back checks and digests."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from auto_round.errors import ConfigError, OutputError, VerifyError
from auto_round.formats.base import TensorSpecs
from auto_round.modeling.files.safetensors import DTYPES
from auto_round.output.verify import bytes_of
from auto_round.output.writer import sync_folder
from auto_round.run.model_free.unit_processor import Chunk
from auto_round.run.model_free.units import Unit

_ALIGN = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        name: final file name.
        header: everything before the tensors' bytes.
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
    """All output files, and which of them holds a tensor."""

    shards: tuple[Shard, ...]
    shard_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(shard.size for shard in self.shards)


def plan_layout(units: Sequence[Unit], tensors: TensorSpecs, files: Sequence[Path], max_size: int) -> Layout:
    """One output file for each input file, cut where it would pass `max_size` bytes.

    A unit belongs to the last of the files that it reads, so that input files can come and go one after the other.
    Units that write parts of one tensor stay together.

    Args:
        files: of the input, in the order in which they are worked on.
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
    """Runs of units whose tensors fit into `max_size`; units with a tensor in common are never parted."""
    together: dict[str, int] = {}
    for i in members:
        for name in units[i].outputs:
            together[name] = i  # the last unit that writes to it
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
        open_until = max([open_until, *(together[name] for name in units[i].outputs)])
    return parts


def tensor_bytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of a tensor of that shape and dtype."""
    count = spec[1].itemsize
    for size in spec[0]:
        count *= size
    return count


def _shard(name: str, names: Sequence[str], tensors: TensorSpecs, members: Sequence[int]) -> Shard:
    """Readers view the bytes in place, so every tensor starts where its dtype may: odd sizes come last."""
    even = [n for n in names if tensor_bytes(tensors[n]) % _ALIGN == 0]
    odd = sorted((n for n in names if tensor_bytes(tensors[n]) % _ALIGN), key=lambda n: -tensors[n][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    at = 0
    for tensor in (*even, *odd):
        shape, dtype = tensors[tensor]
        if dtype not in _NAMES:
            raise ConfigError(f"tensor {tensor!r} has dtype {dtype}, which safetensors files cannot hold")
        end = at + tensor_bytes(tensors[tensor])
        header[tensor] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        starts[tensor], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
    front = len(text).to_bytes(8, "little") + text
    return Shard(name, front, {t: len(front) + s for t, s in starts.items()}, len(front) + at, tuple(members))


def index_text(layout: Layout, tensors: TensorSpecs) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {name: layout.shards[layout.shard_of[name]].name for name in sorted(layout.shard_of)}
    total = sum(tensor_bytes(tensors[name]) for name in layout.shard_of)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


# One output file while it is written: pieces at their places, in any order, under a name that no reader opens.

WriteRecord = tuple[str, int, int, int]
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

    def put(self, chunk: Chunk) -> WriteRecord:
        """Write one piece. May be called from several threads for different pieces."""
        view = bytes_of(chunk.data)
        self._write_at(self.shard.offsets[chunk.name] + chunk.offset, view, chunk.name)
        return chunk.name, chunk.offset, len(view), zlib.crc32(view)

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


# Reading a file back while it grows: bytes against what was written, the digest, and the page cache given back.

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
        self._waiting: dict[int, WriteRecord] = {}

    def advance(self, chunk_records: Iterable[WriteRecord]) -> None:
        """These pieces are on the disk now; go on as far as there is no gap.

        Raises:
            VerifyError: a byte is not what was written.
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


def file_digest(path: Path, shard: Shard, chunk_records: Iterable[WriteRecord], compare: bool) -> str:
    """SHA-256 of a finished file. `chunk_records`: everything that was written to it. Raises what `FileCheck`
    raises."""
    check = FileCheck(path, shard, compare)
    try:
        check.advance(chunk_records)
        return check.digest()
    finally:
        check.close()
