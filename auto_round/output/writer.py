"""Write files at offsets under temporary names until they are complete, and safetensors shards one tensor at a time.

Tensors are written as they arrive; space for the header is reserved and filled last, so a shard is never in memory. A
writer can be resumed: it lists what it writes with checksums, and continues from that list after comparing the files.
"""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from auto_round import files
from auto_round.errors import ConfigError, OutputError

_Self = TypeVar("_Self", bound="AtomicOutput")
_AT_ONCE = 1 << 30  # Linux writes at most 2 GiB in one call
_CHUNK_BYTES = 1 << 20  # of a file that is compared at a time
NEW, KEEP = "w+b", "r+b"

Records = list[list[Any]]
"""What was written, as plain values: one list for each write, ending with the CRC-32 of its bytes."""


def damaged_error(path: Path, why: str, what: str = "journal") -> OutputError:
    """The error for a file of an interrupted run that cannot be used."""
    return OutputError(
        f"the {what} of the interrupted run is damaged: {path}: {why}; start anew with --overwrite or --no_resume "
        "(overwrite=True or resume=False)"
    )


class PartialFile:
    """A file under a temporary name. It is opened when it is first written, and again after `close`.

    Once it is open, several threads may write, and `sync` may be called meanwhile. All methods that write raise
    OutputError when the disk is full or the file cannot be written. `shown`: path in error messages. `mode`: NEW
    empties the file when it is first written, KEEP continues it.
    """

    def __init__(self, path: Path, shown: Path | None = None, mode: str = NEW) -> None:
        self.path, self._shown, self._mode = path, shown or path, mode
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes | memoryview, what: str) -> int:
        """Write bytes at an offset, and return their CRC-32. `what`: what they are, for the error message."""
        view, done = memoryview(data), 0
        with self._reported(f"{what} to "):
            file = self._open()
            while done < len(view):  # a write may be short
                part = view[done : done + _AT_ONCE]
                if hasattr(os, "pwrite"):
                    done += os.pwrite(file.fileno(), part, offset + done)
                else:
                    with self._lock:
                        file.seek(offset + done)
                        done += file.write(part)
        return zlib.crc32(view)

    def truncate(self, size: int) -> None:
        """Set the size of the file; new bytes are zeros."""
        with self._reported():
            self._open().truncate(size)

    def check(self, offset: int, size: int, crc: int) -> None:
        """Raise OutputError when these bytes of a resumed file have another CRC-32."""
        found = 0
        with self._reported():
            file = self._open()
            file.seek(offset)
            while size and (part := file.read(min(size, _CHUNK_BYTES))):
                found, size = zlib.crc32(part, found), size - len(part)
        if size or found != crc:
            raise damaged_error(self.path, "its bytes are not those that were written", "output")

    def sync(self) -> None:
        """Sync what was written to disk."""
        with self._lock, self._reported():
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock, suppress(OSError):
            if self._file is not None:
                file, self._file = self._file, None
                file.close()

    def seal(self, final: Path, digest: str | None = None) -> str:
        """Sync the file, rename it and return its SHA-256. `digest`: that, if it is known."""
        self.sync()
        self.close()
        with self._reported():
            digest = digest or files.file_sha256(self.path)
            os.replace(self.path, final)
        return digest

    def discard(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file, self._mode = open(self.path, self._mode, buffering=0), KEEP
        return self._file

    @contextmanager
    def _reported(self, what: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                message = f"cannot write {what}{self._shown} ({error.strerror or error}); free some space"
                raise OutputError(message) from error
            if self.path.parent.is_dir():
                raise damaged_error(self.path, "it is missing", "output") from error
            raise OutputError(f"cannot write {self._shown} ({error.strerror})") from error


class AtomicOutput(ABC):
    """A writer whose files appear under their names together or not at all. As a context manager: a normal exit
    finishes the files, an exception removes them. `sha256`: of each finished file by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial: list[PartialFile] = []
        self.sha256: dict[str, str] = {}
        self._finished = False
        self._records: Records = []
        if not folder.is_dir():
            raise OutputError(f"output folder {folder} does not exist; make it first")

    @abstractmethod
    def finish(self) -> object:
        """Rename the written files to their final names."""

    def take_records(self) -> Records:
        """What was written since the last call. It is on disk after `sync`."""
        records, self._records = self._records, []
        return records

    def sync(self) -> None:
        for file in list(self.partial):
            file.sync()

    def close(self) -> None:
        """Close unfinished files and keep them, to be resumed."""
        for file in self.partial:
            file.close()

    def abort(self) -> None:
        """Remove unfinished files, and finished ones if others could not be finished."""
        if not self._finished:
            for file in self.partial:
                file.discard()
            for name in self.sha256:
                (self.folder / name).unlink(missing_ok=True)
            self._finished = True

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None and not self._finished:
                self.finish()
        except BaseException:
            self.abort()
            raise
        if kind is not None:
            self.abort()


DEFAULT_SHARD_SIZE = 1_000_000_000
_FINAL_NAME = re.compile(r"model(?:-(\d{5})-of-\d{5})?\.safetensors")
_METADATA = {"format": "pt"}
_METADATA_BYTES = 64
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Parse a size in bytes: `5000000`, `"500MB"` or `"2GiB"`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ConfigError(f"{name}={size!r} is not a size; give bytes, or a text such as '500MB' or '5GB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def header_entry_bytes(name: str, dimensions: int) -> int:
    """Upper bound of a tensor's entry in the header: offsets and dimensions have up to 20 digits."""
    return len(json.dumps(name)) + 90 + 21 * dimensions


@dataclass
class _Shard:
    """One shard under a temporary name, with `capacity` bytes for the JSON text of the header.

    `written`: tensors in the file in order, `end` their bytes. `late`: tensors that are written last: readers view the
    bytes in place, so every tensor must start aligned to its dtype, and one with an odd size would shift those after
    it. `size`, `header_bytes`: of all tensors, and of their header entries at most.
    """

    file: PartialFile
    capacity: int
    written: list[tuple[str, tuple[int, ...], torch.dtype]] = field(default_factory=list)
    end: int = 0
    late: dict[str, torch.Tensor] = field(default_factory=dict)
    size: int = 0
    header_bytes: int = _METADATA_BYTES

    def append(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """Record the next tensor in the file. Returns its offset and size."""
        offset, size = 8 + self.capacity + self.end, prod(shape) * dtype.itemsize
        self.written.append((name, shape, dtype))
        self.end += size
        return offset, size


class ShardWriter(AtomicOutput):
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and their index, into an existing folder.

    The same tensors in the same order give the same bytes. A tensor larger than `max_shard_size` gets a shard of its
    own. `header`: bytes of the header entries of all tensors (`header_entry_bytes`) if known; otherwise enough for a
    large shard is reserved.
    """

    def __init__(
        self, folder: str | os.PathLike[str], max_shard_size: int | str = DEFAULT_SHARD_SIZE, header: int | None = None
    ) -> None:
        super().__init__(Path(folder))
        self.max_shard_size = parse_size(max_shard_size)
        self._header_capacity = min(max(self.max_shard_size // 1024, 64 << 10), 4 << 20)
        if header is not None:
            self._header_capacity = min(self._header_capacity, header + _METADATA_BYTES)
        self._shards: list[_Shard] = []
        self._shard_of: dict[str, int] = {}
        self._late: dict[str, torch.Tensor] = {}
        self.total_size = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Raises OutputError for a duplicate name, and ConfigError for a dtype of no file."""
        if self._finished:
            raise OutputError(f"tensor {name!r} came after the checkpoint was finished")
        if name in self._shard_of:
            raise OutputError(f"tensor {name!r} is given twice; each name may be written once")
        if tensor.dtype not in files.DTYPE_NAMES:
            raise ConfigError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors files cannot hold")
        tensor = tensor.detach().to("cpu").contiguous()
        entry = header_entry_bytes(name, tensor.dim())
        last = self._shards[-1] if self._shards else None
        if last is not None:
            if last.size + tensor.nbytes > self.max_shard_size or last.header_bytes + entry > last.capacity:
                self._write_late(last)
                last.file.sync()
                last.file.close()
                last = None
        if last is None:
            last = self._new_shard(entry)
            last.file.truncate(8 + last.capacity)
        self._count(last, name, tensor.shape, tensor.nbytes)
        if tensor.nbytes % files.ALIGNMENT:
            # A copy, because the caller may change the tensor, and because a view would keep its storage alive.
            last.late[name] = self._late[name] = tensor.clone()
            kind = files.DTYPE_NAMES[tensor.dtype]
            self._records.append([len(self._shards) - 1, name, list(tensor.shape), kind, None])
        else:
            self._write(last, name, tensor)

    def _count(self, shard: _Shard, name: str, shape: Sequence[int], nbytes: int) -> None:
        shard.size += nbytes
        shard.header_bytes += header_entry_bytes(name, len(shape))
        self._shard_of[name] = self._shards.index(shard)
        self.total_size += nbytes

    def _new_shard(self, first_entry: int, mode: str = NEW) -> _Shard:
        capacity = max(self._header_capacity, _METADATA_BYTES + first_entry)
        path = self.folder / f".model-{len(self._shards) + 1:05d}.partial"
        shard = _Shard(PartialFile(path, mode=mode), -(-capacity // files.ALIGNMENT) * files.ALIGNMENT)
        self.partial.append(shard.file)
        self._shards.append(shard)
        return shard

    def _write(self, shard: _Shard, name: str, tensor: torch.Tensor) -> None:
        offset, _ = shard.append(name, tuple(tensor.shape), tensor.dtype)
        crc = shard.file.write(offset, files.bytes_of(tensor), f"tensor {name!r}")
        self._records.append([self._shard_of[name], name, list(tensor.shape), files.DTYPE_NAMES[tensor.dtype], crc])

    def _write_late(self, shard: _Shard) -> None:
        for name, tensor in sorted(shard.late.items(), key=lambda item: -item[1].element_size()):
            self._write(shard, name, tensor)
        shard.late.clear()

    def take_late(self) -> dict[str, torch.Tensor]:
        """Tensors added since the last call that are not in a file yet; `restore` needs them."""
        late, self._late = self._late, {}
        return late

    def restore(self, records: Records, late: Mapping[str, torch.Tensor]) -> None:
        """Continue after all that an earlier writer returned by `take_records` and `take_late`. Raises OutputError when
        its files do not hold it any more."""
        # Shards that were renamed before the interruption get their temporary names again.
        for path in list(self.folder.iterdir()):
            if (match := _FINAL_NAME.fullmatch(path.name)) is not None:
                os.replace(path, self.folder / f".model-{match[1] or '00001'}.partial")
        for index, name, shape, dtype, crc in records:
            if index == len(self._shards):
                self._new_shard(header_entry_bytes(name, len(shape)), KEEP)
            shard = self._shards[index]
            if shard.late.pop(name, None) is None:
                self._count(shard, name, shape, prod(shape) * files.DTYPES[dtype].itemsize)
            if crc is None:
                shard.late[name] = late[name]
            else:
                shard.file.check(*shard.append(name, tuple(shape), files.DTYPES[dtype]), crc)
        for shard in self._shards[:-1]:
            shard.file.close()
        last = self._shards[-1]
        last.file.truncate(8 + last.capacity + last.end)

    def finish(self) -> list[Path]:
        """Rename the shards, write the index last, and return the paths of the shards. Files of an earlier checkpoint
        are removed: its index first, its other shards last."""
        if self._finished:
            raise OutputError("the checkpoint was finished already")
        if not self._shards:
            raise OutputError("no tensor was written; there is no checkpoint to finish")
        self._write_late(self._shards[-1])
        count = len(self._shards)
        index_path = self.folder / "model.safetensors.index.json"
        index_path.unlink(missing_ok=True)
        names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
        for shard, name in zip(self._shards, names, strict=True):
            front, _, _ = files.safetensors_header(shard.written, _METADATA, shard.capacity)
            shard.file.write(0, front, "the header")
            self.sha256[name] = shard.file.seal(self.folder / name)
        if count > 1:
            weight_map = {name: names[i] for name, i in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            files.write_text(index_path, json.dumps(index, indent=2) + "\n")
        for path in self.folder.iterdir():
            if _FINAL_NAME.fullmatch(path.name) and path.name not in names:
                path.unlink()
        files.sync_folder(self.folder)
        self._finished = True
        return [self.folder / name for name in names]
