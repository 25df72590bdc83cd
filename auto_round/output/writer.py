"""Write safetensors shards one tensor at a time, with bounded memory, under temporary names until they are complete.

File layout (safetensors): 8 bytes little-endian header length N, N bytes of JSON padded with spaces, then the
tensors' bytes without gaps. Tensors are written as they arrive; space for the header is reserved at the front and
filled last, so a shard is never held in memory. A checkpoint below `_SMALL` bytes is buffered and gets a header
of exact size. `AtomicOutput` is the base of this writer and of the GGUF writer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import torch

from auto_round.errors import ConfigError, OutputError
from auto_round.output.folders import path_inside

_Self = TypeVar("_Self", bound="AtomicOutput")


class AtomicOutput(ABC):
    """A writer whose files appear under their names together or not at all.

    As a context manager: a normal exit finishes the files, an exception removes them.
    """

    _finished = False

    @abstractmethod
    def finish(self) -> object:
        """Rename the written files to their final names."""

    @abstractmethod
    def abort(self) -> None:
        """Remove unfinished files."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._finished:
            try:
                self.finish()
            except BaseException:
                self.abort()
                raise


DEFAULT_SHARD_SIZE = 1_000_000_000
_SMALL = 8 << 20
_ALIGN = 8
_DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint32: "U32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Parse a size in bytes: `5000000`, `"500MB"` or `"2GiB"`. Raises ConfigError for anything else or below 1 byte."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ConfigError(f"{name}={size!r} is not a size; give bytes, or a text such as '500MB' or '5GB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy when it is contiguous on the CPU."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def sync_folder(folder: Path) -> None:
    """Sync the directory entries of a folder to disk, where the system can. Raises OutputError when that fails."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            raise OutputError(f"names in {folder} cannot be written ({error.strerror}); free some space") from error
        finally:
            os.close(handle)


def header_entry_bytes(name: str, dimensions: int) -> int:
    """Upper bound of a tensor's entry in the header: offsets and dimensions have up to 20 digits."""
    return len(json.dumps(name)) + 90 + 21 * dimensions


class _Shard:
    """One shard under a temporary name."""

    def __init__(self, path: Path, header_capacity: int) -> None:
        self.path, self.size = path, 0
        self._header_capacity = header_capacity
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = 64
        self._buffered: list[tuple[str, torch.Tensor]] = []
        self._file: BinaryIO | None = None
        self._offset = 0

    def fits(self, name: str, tensor: torch.Tensor, max_size: int) -> bool:
        header = self._header_bytes + header_entry_bytes(name, tensor.dim())
        return self.size == 0 or (self.size + tensor.nbytes <= max_size and header <= self._header_capacity)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.size += tensor.nbytes
        self._header_bytes += header_entry_bytes(name, tensor.dim())
        if self._file is None and self.size > _SMALL:
            self._open(max(self._header_capacity, self._header_bytes))
        if self._file is None or tensor.nbytes % _ALIGN:
            # Readers view the bytes in place, so every tensor must start aligned to its dtype: odd sizes come last.
            # A copy, because the caller may change the tensor, and because a view would keep its storage alive.
            self._buffered.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def close(self) -> None:
        if self._file is None:
            self._open(None)
        for name, tensor in sorted(self._buffered, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        self._buffered.clear()
        assert self._file is not None
        text = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._header_capacity)
        try:
            self._file.seek(0)
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path} ({error.strerror}); free some space")

    def discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing flushes the buffer, on a disk that may be full
                self._file.close()
        self.path.unlink(missing_ok=True)

    def _open(self, capacity: int | None) -> None:
        """Create the file with `capacity` bytes for the header, or as many as the buffered tensors need."""
        if capacity is None:
            self._buffered.sort(key=lambda item: (item[1].nbytes % _ALIGN != 0, -item[1].element_size()))
            for name, tensor in self._buffered:
                self._add_header_entry(name, tensor)
            capacity = len(json.dumps(self._header, separators=(",", ":")).encode())
            self._offset = 0
        self._header_capacity = -(-capacity // _ALIGN) * _ALIGN
        try:
            self._file = open(self.path, "wb")
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror})") from error
        self._file.seek(8 + self._header_capacity)
        buffered, self._buffered = self._buffered, []
        for name, tensor in buffered:
            if tensor.nbytes % _ALIGN:
                self._buffered.append((name, tensor))
            else:
                self._write(name, tensor)

    def _add_header_entry(self, name: str, tensor: torch.Tensor) -> None:
        end = self._offset + tensor.nbytes
        dtype, offsets = _DTYPE_NAMES[tensor.dtype], [self._offset, end]
        self._header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        self._offset = end

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        assert self._file is not None
        self._add_header_entry(name, tensor)
        if tensor.numel():
            try:
                self._file.write(bytes_of(tensor))
            except OSError as error:
                raise self._failed(error) from error


class ShardWriter(AtomicOutput):
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and their index, into one folder.

    The same tensors in the same order give the same bytes.

    Args:
        folder: an existing folder.
        max_shard_size: bytes, or a text such as "5GB". A larger single tensor gets a shard of its own.
        stem: start of the file names.
        header: bytes of the header entries of all tensors (`header_entry_bytes`) if known; otherwise enough for a
            large shard is reserved.
    """

    def __init__(
        self, folder: str | os.PathLike[str], max_shard_size: int | str = DEFAULT_SHARD_SIZE, stem: str = "model",
        header: int | None = None,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise OutputError(f"output folder {self.folder} does not exist; make it first")
        self.max_shard_size = parse_size(max_shard_size)
        self._stem = stem
        if path_inside(self.folder, f"{stem}.safetensors").parent != self.folder.resolve():
            raise OutputError(f"file name {stem!r} is not a plain name; give one without folders")
        self._header_capacity = min(max(self.max_shard_size // 1024, 64 << 10), 4 << 20)
        if header is not None:
            self._header_capacity = min(self._header_capacity, header + 64)
        self._shards: list[_Shard] = []
        self._shard_of: dict[str, int] = {}
        self.total_size = 0
        self.sha256: dict[str, str] = {}
        """SHA-256 of each finished shard by file name."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            OutputError: a duplicate name, a finished writer, or a full disk.
            ConfigError: safetensors has no such dtype.
        """
        if self._finished:
            raise OutputError(f"tensor {name!r} came after the checkpoint was finished")
        if name in self._shard_of:
            raise OutputError(f"tensor {name!r} is given twice; each name may be written once")
        if tensor.dtype not in _DTYPE_NAMES:
            raise ConfigError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors files cannot hold")
        tensor = tensor.detach().to("cpu").contiguous()
        if not self._shards or not self._shards[-1].fits(name, tensor, self.max_shard_size):
            if self._shards:
                self._shards[-1].close()
            path = self.folder / f".{self._stem}-{len(self._shards) + 1:05d}.partial"
            self._shards.append(_Shard(path, self._header_capacity))
        self._shards[-1].add(name, tensor)
        self._shard_of[name] = len(self._shards) - 1
        self.total_size += tensor.nbytes

    def finish(self) -> list[Path]:
        """Rename the shards, write the index last, and return the paths of the shards.

        Files of an earlier checkpoint with the same stem are removed: its index first, its other shards last.
        """
        if self._finished:
            raise OutputError("the checkpoint was finished already")
        if not self._shards:
            raise OutputError("no tensor was written; there is no checkpoint to finish")
        self._shards[-1].close()
        count = len(self._shards)
        index_path = self.folder / f"{self._stem}.safetensors.index.json"
        index_path.unlink(missing_ok=True)
        names = [
            f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            for i in range(count)
        ]
        for shard, name in zip(self._shards, names, strict=True):
            self.sha256[name] = file_sha256(shard.path)
            os.replace(shard.path, self.folder / name)
        if count > 1:
            weight_map = {name: names[i] for name, i in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_text(self.folder, index_path.name, json.dumps(index, indent=2) + "\n")
        pattern = re.compile(re.escape(self._stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
        for path in self.folder.iterdir():
            if pattern.fullmatch(path.name) and path.name not in names:
                path.unlink()
        sync_folder(self.folder)
        self._finished = True
        return [self.folder / name for name in names]

    def abort(self) -> None:
        """Remove unfinished files."""
        if not self._finished:
            for shard in self._shards:
                shard.discard()
            for name in self.sha256:  # shards that `finish` renamed before it failed
                (self.folder / name).unlink(missing_ok=True)
            self._finished = True


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(folder: str | os.PathLike[str], name: str, text: str) -> Path:
    """Write `folder/name` atomically. Raises OutputError when it cannot be written or the name leads outside."""
    target = path_inside(folder, name)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {target} ({error.strerror})") from error
    return target


def write_json(folder: str | os.PathLike[str], name: str, value: Any) -> Path:
    """`write_text` of `value` as indented JSON with sorted keys, so that equal values give equal files."""
    return write_text(folder, name, json.dumps(value, indent=2, sort_keys=True) + "\n")
