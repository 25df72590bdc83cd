"""Journal of a model-free run beside its output: which units are on disk, so that the run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from auto_round._version import __version__
from auto_round.errors import OutputError
from auto_round.output.folders import PARTIAL, inspect_folder, path_inside
from auto_round.output.staging import ENTRY_FILE, publish_files, sync_and_hash
from auto_round.output.writer import sync_folder, write_text
from auto_round.run.journal import add_checksum, take_checksum
from auto_round.run.model_free.shards import Layout, WriteRecord

FOLDER = ".model_free"
LOCK = "lock"
BEGUN = "begun"
FAILED = "failed-"
READY = "ready-"
_MANIFEST = "manifest.json"
_CHECKED = "checked.json"
_STALE = "stale.json"


class Journal:
    """The journal of one output folder."""

    def __init__(self, folder: Path) -> None:
        self.output, self.folder = folder, folder / FOLDER
        self.whole = self.folder / "whole"

    def manifest(self) -> dict[str, Any] | None:
        """What the folder's unfinished run is, None where there is none. Raises OutputError when it cannot be read."""
        values = self._checked(_MANIFEST)
        return values if values is None or isinstance(values, dict) else {}

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
        write_text(self.folder, _MANIFEST, add_checksum(json.dumps(manifest)))
        sync_folder(self.folder)

    def resume_existing(self) -> None:
        """Have all finished files in `whole` again, where a run was stopped while it moved them out."""
        self.whole.mkdir(parents=True, exist_ok=True)
        for said in self.folder.glob(f"{READY}*"):
            said.unlink(missing_ok=True)  # of processes that are no more; others say it again
        names: list[str] | None = self._checked(_CHECKED)
        if names is None:
            return
        for name in sorted(names, key=lambda name: name != ENTRY_FILE):  # so that nothing opens what is not whole
            shown = path_inside(self.output, name)
            if shown.exists() and not (self.whole / name).exists():
                os.replace(shown, self.whole / name)
        sync_folder(self.output)
        (self.folder / _CHECKED).unlink()

    def publish(self, known: Mapping[str, str]) -> None:
        """All files are in `whole` and were checked: bring them to the disk and show them. `known`: SHA-256 of those
        that are on the disk already."""
        files = sync_and_hash(self.whole, known)
        stale = sorted(
            {*inspect_folder(self.output, (PARTIAL, FOLDER)).files, *(self._checked(_STALE) or ())} - {*files}
        )
        write_text(self.folder, _STALE, add_checksum(json.dumps(stale)))
        write_text(self.folder, _CHECKED, add_checksum(json.dumps(sorted({name.split("/")[0] for name in files}))))
        sync_folder(self.folder)
        publish_files(self.whole, self.output, files, stale)

    def partial(self, index: int) -> Path:
        """Where output file `index` is written."""
        return self.folder / f"{index + 1:05d}.partial"

    def _lines(self, index: int) -> Path:
        return self.folder / f"{index + 1:05d}.jsonl"

    def add(self, index: int, done: Mapping[int, Iterable[WriteRecord]], digests: Mapping[str, str]) -> None:
        """Units of an output file are on the disk, with what each wrote, and digests of layers among them."""
        values = {"units": {str(unit): list(marks) for unit, marks in done.items()}, "digests": digests}
        text = json.dumps(values, separators=(",", ":"))
        line = f"{zlib.crc32(text.encode()):08x} {text}\n"
        try:
            with open(self._lines(index), "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._lines(index)} ({error.strerror}); free some space") from error

    def done(self, index: int) -> dict[int, list[WriteRecord]]:
        """Units of an output file that are on the disk. A line that was cut short ends the reading."""
        found: dict[int, list[WriteRecord]] = {}
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
        lines, whole, found = data.splitlines(keepends=True), 0, []
        for number, line in enumerate(lines):
            mark, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or f"{zlib.crc32(text[:-1]):08x}".encode() != mark:
                if number + 1 < len(lines):
                    raise self._damaged(file, f"line {number + 1} is not what was written")
                break  # a line that was being written
            found.append(json.loads(text))
            whole += len(line)
        if whole != len(data):
            with open(file, "r+b") as handle:
                handle.truncate(whole)
        return found

    def note_digest(self, index: int, digest: str) -> None:
        """Output file `index` is finished, and this is its SHA-256."""
        write_text(self.folder, self._digest_file(index), add_checksum(json.dumps(digest)))

    def has_digest(self, index: int) -> bool:
        """Whether output file `index` is finished, and its SHA-256 known."""
        return (self.folder / self._digest_file(index)).is_file()

    def digest(self, index: int) -> str | None:
        """SHA-256 of output file `index`, None while it is not finished."""
        return self._checked(self._digest_file(index))

    def check_finished(self, index: int, name: str, digest: str) -> None:
        """Raises OutputError when `digest`, of what is on the disk, is not what was noted."""
        if digest != self.digest(index):
            raise self._damaged(self.whole / name, "its bytes are not those that were written")

    @staticmethod
    def _digest_file(index: int) -> str:
        return f"{index + 1:05d}.sha256"

    def _checked(self, name: str) -> Any:
        """The value in a file, None when there is no file."""
        file = self.folder / name
        try:
            return json.loads(take_checksum(file.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from error

    def _damaged(self, file: Path, why: str) -> OutputError:
        return OutputError(
            f"{file} is damaged: {why}. Start anew with --no_resume (resume=False), or remove {self.folder}"
        )

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
