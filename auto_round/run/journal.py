"""On-disk journal of a run: checksummed, atomically written files of finished units and activation streams.

    run.json                   the run's settings, data, weights and versions
    manifest.json              the valid files among those below, with their sizes and checksums
    unit-0003.safetensors      what was written of the fourth block, and its results (the last: non-block layers)
    full-0004.safetensors      the activations that the fifth block takes as input; also quantized-, smoke_sample-

Each file is written under a temporary name, synced to disk and renamed. The manifest is written after all files
that it names, and the activations before the last block are removed after it. So a kill at any moment leaves
either the state before or the state after.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from auto_round import envs
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import OutputError
from auto_round.files import DTYPES, add_checksum, bytes_of, safetensors_header, sync_folder, take_checksum, write_text
from auto_round.modeling.files.safetensors import empty_mmap
from auto_round.output.writer import damaged_error

Tensors = Mapping[str, torch.Tensor | DiskTensor]
_CHUNK_BYTES = 16 << 20  # of a tensor in memory that is written at a time, or of a file that is checked
_ROWS_BYTES = 1 << 20  # of a tensor in a file that is copied at a time
_FOLDER_NAME = "resume"
_RUN, _MANIFEST = "run.json", "manifest.json"


def write_tensors(path: Path, tensors: Tensors, metadata: Any = None) -> list[int]:
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


def read_tensors(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and metadata of a file with the size and CRC-32 `mark` that `write_tensors` returned.

    Raises OutputError when it does not match them.
    """
    check_file(path, mark)
    with open(path, "rb") as file:
        start, header = _read_header(file)
        metadata = json.loads(header.pop("__metadata__")["metadata"])
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            data = empty_mmap((last - first,), torch.uint8)
            file.seek(start + first)
            file.readinto(data.numpy().data)
            tensors[name] = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


def read_rows(path: Path, mark: list[int], name: str, into: DiskTensor) -> None:
    """Copy the tensor `name` of a file row by row. Raises OutputError when the file does not match `mark`."""
    check_file(path, mark)
    with open(path, "rb") as file:
        start, header = _read_header(file)
        file.seek(start + header[name]["data_offsets"][0])
        row = torch.empty(into.shape[1:], dtype=into.dtype)
        for index in range(into.shape[0]):
            file.readinto(bytes_of(row))
            into[index] = row


def _read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """(offset of the first tensor, header) of an open safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    return 8 + length, json.loads(file.read(length))


def check_file(path: Path, mark: list[int]) -> None:
    """Raise OutputError when a file does not match its size and CRC-32."""
    size, crc = mark
    found = 0
    try:
        if path.stat().st_size != size:
            raise damaged_error(path, f"it has {path.stat().st_size} bytes, not {size}")
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                found = zlib.crc32(chunk, found)
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

    def unit(self, index: int) -> tuple[dict[str, torch.Tensor], Any]:
        """Tensors and metadata of a finished unit. Raises OutputError when its file is damaged."""
        return read_tensors(self.folder / self.units[index]["file"], self.units[index]["mark"])

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

    def write_unit(self, name: str, tensors: Tensors, metadata: Any, weights: int) -> dict[str, Any]:
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
        write_text(self.folder / name, add_checksum(json.dumps(value)))
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
