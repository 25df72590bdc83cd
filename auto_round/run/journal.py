"""On-disk journal of a run: checksummed, atomically written files of finished units and activation streams.

    run.json                   the run's settings, data, weights and versions
    manifest.json              the valid files among those below, with their sizes and checksums
    unit-0003.safetensors      the layers of the fourth block (the last one: non-block layers)
    full-0004.safetensors      the activations that the fifth block takes as input; also quantized-, smoke_sample-

Each file is written under a temporary name, synced to disk and renamed. The manifest is written after all files
that it names, and the activations before the last block are removed after it. So a kill at any moment leaves
either the state before or the state after.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from auto_round import envs
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import OutputError
from auto_round.modeling.files.safetensors import DTYPES, empty_mmap
from auto_round.output.writer import bytes_of, sync_folder, write_text

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Names of dtypes in safetensors headers."""
_ALIGN = 8
_CHUNK_BYTES = 16 << 20  # of a tensor in memory that is written at a time
_ROWS_BYTES = 1 << 20  # of a tensor in a file that is copied at a time
_FOLDER_NAME = "resume"
_RUN, _MANIFEST = "run.json", "manifest.json"


def add_checksum(text: str) -> str:
    """`text` with a line before it that holds its CRC-32."""
    return f"{zlib.crc32(text.encode()):08x}\n{text}\n"


def take_checksum(data: bytes) -> str:
    """The text that `add_checksum` wrote as `data`. Raises ValueError when the checksum does not match."""
    head, _, text = data.partition(b"\n")
    if not text.endswith(b"\n") or f"{zlib.crc32(text[:-1]):08x}".encode() != head:
        raise ValueError("its bytes are not those that were written")
    return text[:-1].decode()


def safetensors_header(
    specs: Iterable[tuple[str, Sequence[int], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Header of a safetensors file with these tensors (name, shape, dtype) in this order, without gaps.

    Returns (the bytes before the tensors, offset of each tensor in the file, size of the file).
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name, shape, dtype in specs:
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
    front = len(text).to_bytes(8, "little") + text
    return front, {name: len(front) + start for name, start in starts.items()}, len(front) + end


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | DiskTensor], metadata: Any = None) -> list[int]:
    """Write a safetensors file atomically, with `metadata` as JSON in its header. Returns its size and CRC-32.

    Raises OutputError when the disk is full or cannot be written.
    """
    # Decreasing item sizes keep every tensor aligned to its dtype without gaps.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    specs = [(name, tensors[name].shape, tensors[name].dtype) for name in order]
    head, _, size = safetensors_header(specs, {"metadata": json.dumps(metadata)})
    crc = zlib.crc32(head)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(head)
            for name in order:
                for part in _parts(tensors[name]):
                    chunk = bytes_of(part)  # the only part of a device tensor that is copied to the CPU at a time
                    file.write(chunk)
                    crc = zlib.crc32(chunk, crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable_error(path, error) from error
    return [size, crc]


def _parts(tensor: torch.Tensor | DiskTensor) -> Iterator[torch.Tensor]:
    """Split a tensor, so that little of it is in memory at a time."""
    if isinstance(tensor, DiskTensor):
        rows = max(1, _ROWS_BYTES * tensor.shape[0] // max(1, tensor.nbytes))
        yield from (tensor[at : at + rows] for at in range(0, tensor.shape[0], rows))
    else:
        yield from tensor.detach().contiguous().reshape(-1).split(_CHUNK_BYTES)


def _read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """(offset of the first tensor, header) of an open safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    return 8 + length, json.loads(file.read(length))


def read_tensors(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and metadata of a file with the size and CRC-32 `mark` that `write_tensors` returned.

    Raises OutputError when it does not match them.
    """
    data = empty_mmap((mark[0],), torch.uint8)
    view = data.numpy().data
    _read(path, mark, lambda at, size: view[at : at + size])
    start, header = _read_header(BytesIO(view))
    metadata = json.loads(header.pop("__metadata__")["metadata"])
    tensors = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        tensors[name] = data[first:last].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


class _JournalFile:
    """Read-only storage of `DiskTensor`s in a journal file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int, into: memoryview) -> None:
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                while done < len(into):
                    count = file.readinto(into[done : done + _CHUNK_BYTES])
                    if not count:
                        raise damaged_error(self.path, "it ends early")
                    done += count
        except FileNotFoundError as error:
            raise damaged_error(self.path, "it is missing") from error

    def write(self, start: int, data: memoryview) -> None:
        raise OSError(f"{self.path} is only read")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> DiskTensor:
        raise OSError(f"{self.path} is only read")


def tensors_in_file(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor | DiskTensor], Any]:
    """`read_tensors` with tensors that are read from the file on access.

    Raises OutputError when the file does not match `mark`.
    """
    check_file(path, mark)
    with open(path, "rb") as handle:
        start, header = _read_header(handle)
    metadata = json.loads(header.pop("__metadata__")["metadata"])
    file = _JournalFile(path)
    return {
        name: DiskTensor(file, start + e["data_offsets"][0], torch.Size(e["shape"]), DTYPES[e["dtype"]])
        for name, e in header.items()
    }, metadata


def read_rows(path: Path, mark: list[int], name: str, into: DiskTensor) -> None:
    """Copy the tensor `name` of a file row by row. Raises OutputError when the file does not match `mark`."""
    stored = tensors_in_file(path, mark)[0][name]
    for row in range(into.shape[0]):
        into[row] = stored[row]


def check_file(path: Path, mark: list[int]) -> None:
    """Raise OutputError when a file does not match its size and CRC-32. Reads it in chunks."""
    buffer = memoryview(bytearray(min(mark[0], _CHUNK_BYTES)))
    _read(path, mark, lambda _, size: buffer[:size])


def _read(path: Path, mark: list[int], buffer: Callable[[int, int], memoryview]) -> None:
    """Read a file in chunks into `buffer(offset, size)`, and compare size and CRC-32."""
    size, crc = mark
    try:
        if path.stat().st_size != size:
            raise damaged_error(path, f"it has {path.stat().st_size} bytes, not {size}")
        done = found = 0
        with open(path, "rb", buffering=0) as file:
            while done < size:
                chunk = buffer(done, min(_CHUNK_BYTES, size - done))
                count = file.readinto(chunk)
                if not count:
                    raise damaged_error(path, "it ends early")
                found = zlib.crc32(chunk[:count], found)
                done += count
    except FileNotFoundError as error:
        raise damaged_error(path, "it is missing") from error
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise damaged_error(path, f"it cannot be read: {error.strerror}") from error
    if found != crc:
        raise damaged_error(path, "its bytes are not those that were written")


def unwritable_error(path: Path, error: OSError) -> OutputError:
    """The error for a journal file that cannot be written."""
    return OutputError(
        f"cannot write the journal file {path} ({error.strerror or error}); free some space, set AR_WORK_SPACE to "
        "another disk, or do without a journal (--no_resume)"
    )


def damaged_error(path: Path, why: str) -> OutputError:
    """The error for a damaged journal."""
    return OutputError(
        f"the journal of the interrupted run is damaged: {path}: {why}; start anew with --overwrite or --no_resume "
        "(overwrite=True or resume=False)"
    )


def journal_folder(output: Path) -> Path:
    """The journal folder of runs that write to `output`."""
    path = os.path.abspath(output.expanduser())
    digest = hashlib.sha256(path.encode()).hexdigest()[:12]
    return envs.resume_folder() / _FOLDER_NAME / f"{output.name or 'out'}-{digest}"


class Journal:
    """The journal of one run; `load` reads an existing one.

    Attributes:
        run: identity of the run, plain values.
        units: finished units in order: {"name", "file", "mark", "weights"}; "weights" is a checksum of the original
            weights.
        streams: file name and mark of each stream after the last unit, by kind.
        done: by format, SHA-256 by file name of its folder once that is complete and checked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self.units: list[dict[str, Any]] = []
        self.streams: dict[str, list[Any]] = {}
        self.done: dict[str, dict[str, str]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether it records no finished work."""
        return not self.units and not self.done

    def load(self) -> None:
        """Read the manifests. Raises OutputError when they are damaged."""
        self.run = self._read(_RUN) or {}
        state = (self._read(_MANIFEST) if self.run else None) or {"units": [], "streams": {}, "done": {}}
        self.units, self.streams, self.done = state["units"], state["streams"], state["done"]

    def _files(self) -> list[list[Any]]:
        """(name, mark) of every file."""
        return [*([unit["file"], unit["mark"]] for unit in self.units), *self.streams.values()]

    def check(self) -> None:
        """Compare the checksum of every file. Raises OutputError naming the first damaged one."""
        for name, mark in self._files():
            check_file(self.folder / name, mark)

    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(mark[0] for _, mark in self._files())

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start a new journal. Raises OutputError when the work space cannot be written."""
        self.remove()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the journal {self.folder} cannot be made ({error.strerror}); set AR_WORK_SPACE to a folder that can "
                "be written, or do without a journal (--no_resume)"
            ) from error
        self.run = dict(run)
        self._write(_RUN, self.run)

    def unit(self, index: int, in_file: bool = False) -> tuple[dict[str, torch.Tensor | DiskTensor], Any]:
        """Tensors and metadata of a finished unit; with `in_file` the tensors are read on access. Raises OutputError
        when its file is damaged."""
        path, mark = self.folder / self.units[index]["file"], self.units[index]["mark"]
        if in_file:
            return tensors_in_file(path, mark)
        tensors, metadata = read_tensors(path, mark)
        return dict(tensors), metadata

    def _stream_file(self, kind: str) -> tuple[Path, list[int]]:
        if kind not in self.streams:
            raise damaged_error(self.folder / _MANIFEST, f"it names no {kind} stream")
        name, mark = self.streams[kind]
        return self.folder / name, mark

    def stream(self, kind: str) -> torch.Tensor:
        """Hidden states [N, T, H] after the last unit. Raises OutputError when their file is damaged."""
        return read_tensors(*self._stream_file(kind))[0]["hidden"]

    def stream_into(self, kind: str, target: DiskTensor) -> None:
        """Copy the hidden states after the last unit into a file, row by row."""
        read_rows(*self._stream_file(kind), "hidden", target)

    def write_unit(
        self, name: str, tensors: Mapping[str, torch.Tensor | DiskTensor], metadata: Any, weights: int
    ) -> dict[str, Any]:
        """Write the file of the next unit. Its record, which is returned, becomes valid by `commit`."""
        file = f"unit-{len(self.units):04d}.safetensors"
        mark = write_tensors(self.folder / file, tensors, metadata)
        return {"name": name, "file": file, "mark": mark, "weights": weights}

    def write_stream(self, kind: str, hidden: torch.Tensor | DiskTensor) -> list[Any]:
        """Write the file of a stream after the next unit, and return its record."""
        file = f"{kind}-{len(self.units) + 1:04d}.safetensors"
        return [file, write_tensors(self.folder / file, {"hidden": hidden})]

    def commit(self, unit: dict[str, Any], streams: dict[str, list[Any]]) -> None:
        """Record a finished unit and all streams after it; the streams before it are removed."""
        self._commit([*self.units, unit], streams, self.done)

    def complete(self, fmt: str, files: Mapping[str, str]) -> None:
        """Record that all files of a format are in its folder's `.partial` on disk and were checked."""
        self._commit(self.units, self.streams, {**self.done, fmt: dict(files)})

    def drop_units(self) -> None:
        """Reduce the journal of a finished run to its identity and the folders that it wrote."""
        self._commit([], {}, self.done)

    def remove_uncommitted(self) -> None:
        """Remove files that a killed run was writing or about to remove."""
        valid = {_RUN, _MANIFEST, *(name for name, _ in self._files())}
        for path in self.folder.iterdir():
            if path.name not in valid:
                path.unlink()

    def remove(self) -> None:
        """Remove the journal and its empty parent folders. Raises OutputError when it cannot be removed."""
        try:
            (self.folder / _MANIFEST).unlink()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise OutputError(f"the journal {self.folder} cannot be removed ({error.strerror})") from error
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in (self.folder.parent, self.folder.parent.parent):
            try:
                parent.rmdir()
            except OSError:  # it holds something else
                break
        self._reset()

    def _commit(
        self, units: list[dict[str, Any]], streams: dict[str, list[Any]], done: dict[str, dict[str, str]]
    ) -> None:
        """Write the manifest, then remove the files that it no longer names."""
        before = {name for name, _ in self._files()}
        self._sync()
        self._write(_MANIFEST, {"units": units, "streams": streams, "done": done})
        self.units, self.streams, self.done = units, streams, done
        for name in before - {name for name, _ in self._files()}:
            (self.folder / name).unlink(missing_ok=True)

    def _write(self, name: str, value: Any) -> None:
        write_text(self.folder, name, add_checksum(json.dumps(value)))
        self._sync()

    def _sync(self) -> None:
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise unwritable_error(self.folder, error) from error

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        try:
            value = json.loads(take_checksum(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise damaged_error(path, str(error)) from error
        return value if isinstance(value, dict) else None
