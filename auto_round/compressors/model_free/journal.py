"""What is done already, kept beside the output so that a run that was killed can be gone on with.

    .model_free/manifest.json     what the run is: settings, plan, input files
    .model_free/00001.partial     an unfinished output file
    .model_free/lock              held by the process that works on the folder
    .model_free/begun             held by process 0 of several from when the rest is this run's
    .model_free/failed-00003      why process 3 gave up
    .model_free/ready-00003       process 3 has done its part
    .model_free/00001.jsonl       units of it whose bytes are on the disk, one line each time they were synced
    .model_free/whole/            finished files under their own names, until all are there and were checked
    .model_free/checked.json      the names of all files: they are being moved into the output folder

A line is written after the bytes that it speaks of were synced, and a line without its end counts as not written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from auto_round._version import __version__
from auto_round.compressors.model_free.layout import Layout
from auto_round.compressors.model_free.shard_file import Mark
from auto_round.errors import OutputError
from auto_round.export.disk import path_inside
from auto_round.export.shard_writer import sync_folder, write_json
from auto_round.export.staging import OPENS, seal, show

FOLDER = ".model_free"
LOCK = "lock"
BEGUN = "begun"
FAILED = "failed-"
READY = "ready-"
_MANIFEST = "manifest.json"
_CHECKED = "checked.json"


class Journal:
    """The journal of one output folder."""

    def __init__(self, folder: Path) -> None:
        self.output, self.folder = folder, folder / FOLDER
        self.whole = self.folder / "whole"

    def manifest(self) -> dict[str, Any] | None:
        """What the folder's unfinished run is, None where there is none. Raises OutputError when it cannot be read."""
        file = self.folder / _MANIFEST
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{file} cannot be read ({error}); remove {self.folder} to start anew") from error
        return values if isinstance(values, dict) else {}

    @property
    def is_open(self) -> bool:
        """Whether a run is there that is not over."""
        return (self.folder / _MANIFEST).is_file()

    def clear(self) -> None:
        """Remove what an earlier run left here, but the lock, and what other processes say: that may be of this run."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK and not path.name.startswith(FAILED):
                path.unlink()

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Start anew."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        self.clear()
        try:
            self.whole.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.whole} cannot be made ({error.strerror})") from error
        write_json(self.folder, _MANIFEST, manifest)
        sync_folder(self.folder)

    def go_on(self) -> None:
        """Have all finished files in `whole` again, where a run was stopped while it moved them out."""
        self.whole.mkdir(parents=True, exist_ok=True)
        for said in self.folder.glob(f"{READY}*"):
            said.unlink(missing_ok=True)  # of processes that are no more; others say it again
        file = self.folder / _CHECKED
        if not file.is_file():
            return
        names: list[str] = json.loads(file.read_text(encoding="utf-8"))
        for name in sorted(names, key=lambda name: name != OPENS):  # so that nothing opens what is not whole
            shown = path_inside(self.output, name)
            if shown.exists() and not (self.whole / name).exists():
                os.replace(shown, self.whole / name)
        sync_folder(self.output)
        file.unlink()

    def publish(self, known: Mapping[str, str]) -> None:
        """All files are in `whole` and were checked: bring them to the disk and show them. `known`: SHA-256 of those
        that are on the disk already."""
        files = seal(self.whole, known)
        write_json(self.folder, _CHECKED, sorted({name.split("/")[0] for name in files}))
        sync_folder(self.folder)
        show(self.whole, self.output, files)

    def partial(self, index: int) -> Path:
        """Where output file `index` is written."""
        return self.folder / f"{index + 1:05d}.partial"

    def _lines(self, index: int) -> Path:
        return self.folder / f"{index + 1:05d}.jsonl"

    def add(self, index: int, done: Mapping[int, Iterable[Mark]], digests: Mapping[str, str]) -> None:
        """Units of an output file are on the disk, with what each wrote, and digests of layers among them."""
        values = {"units": {str(unit): list(marks) for unit, marks in done.items()}, "digests": digests}
        line = json.dumps(values, separators=(",", ":")) + "\n"
        try:
            with open(self._lines(index), "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._lines(index)} ({error.strerror}); free some space") from error

    def done(self, index: int) -> dict[int, list[Mark]]:
        """Units of an output file that are on the disk. A line that was cut short ends the reading."""
        found: dict[int, list[Mark]] = {}
        for line in self._read(index):
            found |= {int(unit): [tuple(mark) for mark in marks] for unit, marks in line["units"].items()}
        return found

    def digests(self, index: int) -> dict[str, str]:
        """Digests of layers in an output file."""
        return {name: digest for line in self._read(index) for name, digest in line["digests"].items()}

    def _read(self, index: int) -> list[dict[str, Any]]:
        file = self._lines(index)
        if not file.is_file():
            return []
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            with open(file, "r+b") as handle:
                handle.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def forget(self, index: int) -> None:
        """Output file `index` is made from the start."""
        self._lines(index).unlink(missing_ok=True)

    def close(self) -> None:
        """The run is over: nothing of the journal is left."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def manifest_of(job: Mapping[str, Any], inputs: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """What has to be the same for a run to be gone on with.

    Args:
        job: everything that decides the result, as plain values.
        inputs: by file name, what identifies an input file.
    """
    digest = hashlib.sha256()
    for shard in layout.shards:
        digest.update(shard.name.encode() + shard.header)
    return {"version": __version__, "job": job, "inputs": inputs, "layout": digest.hexdigest()}
