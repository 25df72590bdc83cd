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
from auto_round.files import add_checksum, path_inside, sync_folder, take_checksum, write_text
from auto_round.output.folders import PARTIAL, inspect_folder
from auto_round.output.staging import ENTRY_FILE, publish_files, sync_and_hash
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
    """Resume state of a model-free run, in `.model_free` inside its output folder."""

    def __init__(self, folder: Path) -> None:
        self.output, self.folder = folder, folder / FOLDER
        self.whole = self.folder / "whole"

    def manifest(self) -> dict[str, Any] | None:
        """Identity of the folder's unfinished run, None without one. Raises OutputError when it cannot be read."""
        values = self._checked(_MANIFEST)
        return values if values is None or isinstance(values, dict) else {}

    @property
    def is_open(self) -> bool:
        """Whether there is an unfinished run."""
        return (self.folder / _MANIFEST).is_file()

    def clear(self) -> None:
        """Remove files of an earlier run, except the lock and failure files, which may be of this run's processes."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK and not path.name.startswith(FAILED):
                path.unlink()

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Start a new run."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        self.clear()
        try:
            self.whole.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.whole} cannot be created ({error.strerror})") from error
        write_text(self.folder / _MANIFEST, add_checksum(json.dumps(manifest)))
        sync_folder(self.folder)

    def resume_existing(self) -> None:
        """Move published files back into `whole` if a run was stopped while it moved them out."""
        self.whole.mkdir(parents=True, exist_ok=True)
        for signal_file in self.folder.glob(f"{READY}*"):
            signal_file.unlink(missing_ok=True)  # of ended processes; running ones create theirs again
        names: list[str] | None = self._checked(_CHECKED)
        if names is None:
            return
        for name in sorted(names, key=lambda name: name != ENTRY_FILE):  # so that no loader opens an incomplete folder
            published = path_inside(self.output, name)
            if published.exists() and not (self.whole / name).exists():
                os.replace(published, self.whole / name)
        sync_folder(self.output)
        (self.folder / _CHECKED).unlink()

    def publish(self, known: Mapping[str, str]) -> None:
        """Sync the checked files in `whole` to disk and publish them. `known`: SHA-256 of those that are synced."""
        files = sync_and_hash(self.whole, known)
        stale = sorted(
            {*inspect_folder(self.output, (PARTIAL, FOLDER)).files, *(self._checked(_STALE) or ())} - {*files}
        )
        write_text(self.folder / _STALE, add_checksum(json.dumps(stale)))
        write_text(self.folder / _CHECKED, add_checksum(json.dumps(sorted({name.split("/")[0] for name in files}))))
        sync_folder(self.folder)
        publish_files(self.whole, self.output, files, stale)

    def partial(self, index: int) -> Path:
        """Path of the unfinished output file `index`."""
        return self.folder / f"{index + 1:05d}.partial"

    def _lines(self, index: int) -> Path:
        return self.folder / f"{index + 1:05d}.jsonl"

    def add(self, index: int, done: Mapping[int, Iterable[WriteRecord]], digests: Mapping[str, str]) -> None:
        """Record units of an output file that are on disk, with what each wrote, and digests of their layers."""
        values = {"units": {str(unit): list(records) for unit, records in done.items()}, "digests": digests}
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
        """Units of an output file that are on disk; a truncated last line is ignored."""
        found: dict[int, list[WriteRecord]] = {}
        for line in self._read(index):
            found |= {int(unit): [tuple(record) for record in records] for unit, records in line["units"].items()}
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
            crc, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or f"{zlib.crc32(text[:-1]):08x}".encode() != crc:
                if number + 1 < len(lines):
                    raise self._damaged(file, f"line {number + 1} is not what was written")
                break  # the run was killed while it wrote this line
            found.append(json.loads(text))
            whole += len(line)
        if whole != len(data):
            with open(file, "r+b") as handle:
                handle.truncate(whole)
        return found

    def record_digest(self, index: int, digest: str) -> None:
        """Record the SHA-256 of the finished output file `index`."""
        write_text(self.folder / self._digest_file(index), add_checksum(json.dumps(digest)))

    def has_digest(self, index: int) -> bool:
        """Whether output file `index` is finished and its SHA-256 recorded."""
        return (self.folder / self._digest_file(index)).is_file()

    def digest(self, index: int) -> str | None:
        """SHA-256 of output file `index`; None until it is finished."""
        return self._checked(self._digest_file(index))

    def check_finished(self, index: int, name: str, digest: str) -> None:
        """Raise OutputError when `digest`, of the file on disk, is not the recorded one."""
        if digest != self.digest(index):
            raise self._damaged(self.whole / name, "its bytes are not those that were written")

    @staticmethod
    def _digest_file(index: int) -> str:
        return f"{index + 1:05d}.sha256"

    def _checked(self, name: str) -> Any:
        """The value in a checksummed file; None without the file."""
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
        """Discard the records of output file `index`, which is written from the start."""
        self._lines(index).unlink(missing_ok=True)

    def close(self) -> None:
        """End the run and remove the journal."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def manifest_of(job: Mapping[str, Any], inputs: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Identity of a run: it can be resumed if this is equal.

    Args:
        job: everything that changes the result, as plain values.
        inputs: identity of each input file by name.
    """
    digest = hashlib.sha256()
    for shard in layout.shards:
        digest.update(shard.name.encode() + shard.header)
    return {"version": __version__, "job": job, "inputs": inputs, "layout": digest.hexdigest()}
