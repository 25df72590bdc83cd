"""On-disk journal of a run: checksummed, atomically written files of finished units and activation streams.

    run.json                   what the run is: settings, data, weights, versions
    manifest.json              which of the files below count, with their sizes and checksums
    unit-0003.safetensors      the layers of the fourth block (the last one: non-block layers)
    full-0004.safetensors      the activations that the fifth block takes as input; also quantized-, probe-

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round import envs
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import OutputError
from auto_round.modeling.files.safetensors import DTYPES, empty_mmap
from auto_round.output.writer import sync_folder, write_text


def add_checksum(text: str) -> str:
    """CRC-32 in a line of its own, then `text` and the end of a line."""
    return f"{zlib.crc32(text.encode()):08x}\n{text}\n"


def take_checksum(data: bytes) -> str:
    """What `add_checksum` was given. Raises ValueError when these are not the bytes that it made."""
    head, _, text = data.partition(b"\n")
    if not text.endswith(b"\n") or f"{zlib.crc32(text[:-1]):08x}".encode() != head:
        raise ValueError("its bytes are not those that were written")
    return text[:-1].decode()


# Files of the journal: tensors and facts, written whole or not at all, and checked before they are used.
#
# A file is an ordinary safetensors file; facts are JSON in its metadata. Who writes it notes its size and CRC-32.

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8
_AT_ONCE = 16 << 20
_PIECE = 1 << 20


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | DiskTensor], metadata: Any = None) -> list[int]:
    """Write a file under a temporary name, bring it to the disk and give it its name. Returns its size and CRC-32.

    Raises OutputError when the disk is full or cannot be written.
    """
    # Falling item sizes keep every tensor where its dtype may start, without holes.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"metadata": json.dumps(metadata)}}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
    head = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(head)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(head)
            for name in order:
                for part in _parts(tensors[name]):
                    piece = raw_bytes(part)  # not more than that of what lies on an accelerator
                    file.write(piece)
                    crc = zlib.crc32(piece, crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable_error(path, error) from error
    return [len(head) + at, crc]


def _parts(tensor: torch.Tensor | DiskTensor) -> Iterator[torch.Tensor]:
    """A tensor piece by piece, so that little of it is in memory twice, or at all."""
    if isinstance(tensor, DiskTensor):
        rows = max(1, _PIECE * tensor.shape[0] // max(1, tensor.nbytes))
        yield from (tensor[at : at + rows] for at in range(0, tensor.shape[0], rows))
    else:
        yield from tensor.detach().contiguous().reshape(-1).split(_AT_ONCE)


def read_rows(path: Path, mark: list[int], name: str, into: DiskTensor) -> None:
    """The tensor `name` of a file, row by row. Raises OutputError when it is not what was written."""
    check_file(path, mark)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(start)
        for row in range(into.shape[0]):
            data = bytearray(into.nbytes // into.shape[0])
            file.readinto(data)
            into[row] = torch.frombuffer(data, dtype=into.dtype).view(into.shape[1:])


def read_tensors(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and facts of a file that `write_tensors` noted as `mark`.

    Raises OutputError when it is not what was written.
    """
    data = empty_mmap((mark[0],), torch.uint8)
    view = data.numpy().data
    _read(path, mark, lambda at, size: view[at : at + size])
    length = int.from_bytes(bytes(view[:8]), "little")
    header = json.loads(bytes(view[8 : 8 + length]))
    metadata = json.loads(header.pop("__metadata__")["metadata"])
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = data[first:last].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


class _JournalFile:
    """A file that is only read, at explicit places."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int, into: memoryview) -> None:
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                while done < len(into):
                    count = file.readinto(into[done : done + _AT_ONCE])
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
    """What `read_tensors` gives, but tensors are read from the file when they are asked for.

    Raises OutputError when it is not what was written.
    """
    check_file(path, mark)
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    metadata = json.loads(header.pop("__metadata__")["metadata"])
    written = _JournalFile(path)
    return {
        name: DiskTensor(written, 8 + length + e["data_offsets"][0], torch.Size(e["shape"]), DTYPES[e["dtype"]])
        for name, e in header.items()
    }, metadata


def check_file(path: Path, mark: list[int]) -> None:
    """Raise OutputError when a file is not what was written. Little of it is in memory at a time."""
    room = memoryview(bytearray(min(mark[0], _AT_ONCE)))
    _read(path, mark, lambda _, size: room[:size])


def _read(path: Path, mark: list[int], room: Callable[[int, int], memoryview]) -> None:
    """Read a file piece by piece into `room(offset, size)`, and compare size and CRC-32."""
    size, crc = mark
    try:
        if path.stat().st_size != size:
            raise damaged_error(path, f"it has {path.stat().st_size} bytes, not {size}")
        done = found = 0
        with open(path, "rb", buffering=0) as file:
            while done < size:
                piece = room(done, min(_AT_ONCE, size - done))
                count = file.readinto(piece)
                if not count:
                    raise damaged_error(path, "it ends early")
                found = zlib.crc32(piece[:count], found)
                done += count
    except FileNotFoundError as error:
        raise damaged_error(path, "it is missing") from error
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise damaged_error(path, f"it cannot be read: {error.strerror}") from error
    if found != crc:
        raise damaged_error(path, "its bytes are not those that were written")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, from the CPU, without a copy where they lie there in a row."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def unwritable_error(path: Path, error: OSError) -> OutputError:
    """What to say when a part of the journal cannot be written."""
    return OutputError(
        f"cannot write the journal file {path} ({error.strerror or error}); free some space, set AR_WORK_SPACE to "
        "another disk, or do without a journal (--no_resume)"
    )


def damaged_error(path: Path, why: str) -> OutputError:
    """What to say of a journal that cannot be trusted."""
    return OutputError(
        f"the journal of the interrupted run is damaged: {path}: {why}; start anew with --overwrite or --no_resume "
        "(overwrite=True or resume=False)"
    )


# The journal of one run: what is finished, and the state to go on from, in a folder of the work space.
#
# run.json                   what the run is: settings, data, weights, versions
# manifest.json              which of the files below count, with their sizes and checksums
# unit-0003.safetensors      the layers of the fourth block (one more after the blocks: what is outside them)
# full-0004.safetensors      the activations that the fifth block is fed; also quantized-, probe-
#
# Every file is written under a temporary name, brought to the disk and renamed; the manifest comes after all that it
# names, and the activations before the last block are removed after it. So a kill at any moment leaves the state before
# or the state after, never one between.

_FOLDER_NAME = "resume"
_RUN, _MANIFEST = "run.json", "manifest.json"


def journal_folder(output: Path) -> Path:
    """Where the journal of runs into this folder is."""
    path = os.path.abspath(output.expanduser())
    return (
        envs.resume_folder() / _FOLDER_NAME / f"{output.name or 'out'}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    )


class Journal:
    """One journal; `load` reads what is there.

    Attributes:
        run: what the run is, plain values.
        units: finished ones in order: {"name", "file", "mark", "weights"}; "weights" is a checksum of the weights that
            it was made from.
        streams: file name and mark of each stream after the last unit, by kind.
        done: by format, SHA-256 by file name of its folder, if that is complete and checked.
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
        """Whether nothing would be lost without it."""
        return not self.units and not self.done

    def load(self) -> None:
        """Read the manifests. Raises OutputError when they are damaged."""
        self.run = self._read(_RUN) or {}
        state = (self._read(_MANIFEST) if self.run else None) or {"units": [], "streams": {}, "done": {}}
        self.units, self.streams, self.done = state["units"], state["streams"], state["done"]

    def check(self) -> None:
        """Read every file and compare its checksum. Raises OutputError naming the first that is damaged."""
        files = [*((unit["file"], unit["mark"]) for unit in self.units), *self.streams.values()]
        for name, mark in files:
            check_file(self.folder / name, mark)

    def nbytes(self) -> int:
        """Bytes that the files take."""
        return sum(mark[0] for _, mark in [*((u["file"], u["mark"]) for u in self.units), *self.streams.values()])

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start anew. Raises OutputError when the work space cannot be written."""
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
        """Tensors and facts of a finished unit; if `in_file`, tensors to be read from there. Raises OutputError when
        its file is damaged."""
        path, mark = self.folder / self.units[index]["file"], self.units[index]["mark"]
        if in_file:
            return tensors_in_file(path, mark)
        tensors, metadata = read_tensors(path, mark)
        return dict(tensors), metadata

    def stream(self, kind: str) -> torch.Tensor:
        """Hidden states [N, T, H] after the last unit. Raises OutputError when their file is damaged."""
        if kind not in self.streams:
            raise damaged_error(self.folder / _MANIFEST, f"it names no {kind} stream")
        name, mark = self.streams[kind]
        return read_tensors(self.folder / name, mark)[0]["hidden"]

    def stream_into(self, kind: str, target: DiskTensor) -> None:
        """The same into a file, row by row."""
        if kind not in self.streams:
            raise damaged_error(self.folder / _MANIFEST, f"it names no {kind} stream")
        name, mark = self.streams[kind]
        read_rows(self.folder / name, mark, "hidden", target)

    def add(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Any, weights: int,
        streams: Mapping[str, torch.Tensor | DiskTensor],
    ) -> None:  # fmt: skip
        """A unit is finished: write it, with the streams after it.

        Raises OutputError when the disk is full.
        """
        unit = self.write_unit(name, tensors, metadata, weights)
        self.commit(unit, {kind: self.write_stream(kind, hidden) for kind, hidden in streams.items()})

    def write_unit(
        self, name: str, tensors: Mapping[str, torch.Tensor | DiskTensor], metadata: Any, weights: int
    ) -> dict[str, Any]:
        """The next unit's file, which does not count before `commit` is given what this returns."""
        file = f"unit-{len(self.units):04d}.safetensors"
        mark = write_tensors(self.folder / file, tensors, metadata)
        return {"name": name, "file": file, "mark": mark, "weights": weights}

    def write_stream(self, kind: str, hidden: torch.Tensor | DiskTensor) -> list[Any]:
        """The same for a stream after that unit."""
        file = f"{kind}-{len(self.units) + 1:04d}.safetensors"
        return [file, write_tensors(self.folder / file, {"hidden": hidden})]

    def commit(self, unit: dict[str, Any], streams: dict[str, list[Any]]) -> None:
        """From now on the unit counts, with all streams after it. Those before it are removed."""
        old = self.streams
        self._commit([*self.units, unit], streams, self.done)
        self._drop(old)

    def complete(self, fmt: str, files: Mapping[str, str]) -> None:
        """All files of a format are on the disk in its folder's `.partial` and were checked."""
        self._commit(self.units, self.streams, {**self.done, fmt: dict(files)})

    def drop_units(self) -> None:
        """The run is over: only what it was and which folders it made is kept."""
        files = {unit["name"]: [unit["file"]] for unit in self.units} | self.streams
        self._commit([], {}, self.done)
        self._drop(files)

    def remove_uncommitted(self) -> None:
        """Remove files that a run was writing when it was killed, or was about to remove."""
        counted = {_RUN, _MANIFEST} | {unit["file"] for unit in self.units} | {n for n, _ in self.streams.values()}
        for path in self.folder.iterdir():
            if path.name not in counted:
                path.unlink()

    def remove(self) -> None:
        """Leave nothing, and no empty folders. Raises OutputError when it cannot be removed."""
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
        """What counts from now on, on the disk first."""
        self._sync()
        self._write(_MANIFEST, {"units": units, "streams": streams, "done": done})
        self.units, self.streams, self.done = units, streams, done

    def _drop(self, files: Mapping[str, list[Any]]) -> None:
        for name, *_ in files.values():
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
