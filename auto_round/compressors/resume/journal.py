"""The journal of one run: what is finished, and the state to go on from, in a folder of the work space.

    run.json                   what the run is: settings, data, weights, versions
    manifest.json              which of the files below count, with their sizes and checksums
    unit-0003.safetensors      the layers of the fourth block (one more after the blocks: what is outside them)
    full-0004.safetensors      the activations that the fifth block is fed; also quantized-, probe-

Every file is written under a temporary name, brought to the disk and renamed; the manifest comes after all that it
names, and the activations before the last block are removed after it. So a kill at any moment leaves the state before
or the state after, never one between.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from auto_round import envs
from auto_round.calibration.spill import SpilledTensor
from auto_round.compressors.resume.checked_text import add_checksum, take_checksum
from auto_round.compressors.resume.tensor_file import (
    check_file,
    damaged,
    read_rows,
    read_tensors,
    tensors_in_file,
    unwritable,
    write_tensors,
)
from auto_round.errors import OutputError
from auto_round.export.shard_writer import sync_folder, write_text

_ROOM = "resume"
_RUN, _MANIFEST = "run.json", "manifest.json"


def journal_folder(output: Path) -> Path:
    """Where the journal of runs into this folder is."""
    path = os.path.abspath(output.expanduser())
    return envs.resume_folder() / _ROOM / f"{output.name or 'out'}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


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

    def unit(self, index: int, in_file: bool = False) -> tuple[dict[str, torch.Tensor | SpilledTensor], Any]:
        """Tensors and facts of a finished unit; if `in_file`, tensors to be read from there. Raises OutputError when
        its file is damaged."""
        path, mark = self.folder / self.units[index]["file"], self.units[index]["mark"]
        if in_file:
            return tensors_in_file(path, mark)
        tensors, facts = read_tensors(path, mark)
        return dict(tensors), facts

    def stream(self, kind: str) -> torch.Tensor:
        """Hidden states [N, T, H] after the last unit. Raises OutputError when their file is damaged."""
        if kind not in self.streams:
            raise damaged(self.folder / _MANIFEST, f"it names no {kind} stream")
        name, mark = self.streams[kind]
        return read_tensors(self.folder / name, mark)[0]["hidden"]

    def stream_into(self, kind: str, room: SpilledTensor) -> None:
        """The same into a file, row by row."""
        if kind not in self.streams:
            raise damaged(self.folder / _MANIFEST, f"it names no {kind} stream")
        name, mark = self.streams[kind]
        read_rows(self.folder / name, mark, "hidden", room)

    def add(
        self, name: str, tensors: Mapping[str, torch.Tensor], facts: Any, weights: int,
        streams: Mapping[str, torch.Tensor | SpilledTensor],
    ) -> None:  # fmt: skip
        """A unit is finished: write it, with the streams after it.

        Raises OutputError when the disk is full.
        """
        unit = self.write_unit(name, tensors, facts, weights)
        self.commit(unit, {kind: self.write_stream(kind, hidden) for kind, hidden in streams.items()})

    def write_unit(
        self, name: str, tensors: Mapping[str, torch.Tensor | SpilledTensor], facts: Any, weights: int
    ) -> dict[str, Any]:
        """The next unit's file, which does not count before `commit` is given what this returns."""
        file = f"unit-{len(self.units):04d}.safetensors"
        mark = write_tensors(self.folder / file, tensors, facts)
        return {"name": name, "file": file, "mark": mark, "weights": weights}

    def write_stream(self, kind: str, hidden: torch.Tensor | SpilledTensor) -> list[Any]:
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

    def reduce(self) -> None:
        """The run is over: only what it was and which folders it made is kept."""
        files = {unit["name"]: [unit["file"]] for unit in self.units} | self.streams
        self._commit([], {}, self.done)
        self._drop(files)

    def tidy(self) -> None:
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
            raise unwritable(self.folder, error) from error

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        try:
            value = json.loads(take_checksum(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise damaged(path, str(error)) from error
        return value if isinstance(value, dict) else None
