"""Stage an output folder: lock it, write into its `.partial`, and publish all files when they are complete.

The file that a loader opens first is moved last, so a folder is empty, holds only `.partial`, or is complete. During
the move `.partial/swap.json` lists the new files and those of an earlier run, so that the next run finishes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from auto_round.errors import OutputError
from auto_round.files import file_sha256, path_inside, sync_folder, write_text
from auto_round.output.folders import PARTIAL, SWAP, remove_files

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 20  # behind the owner's text, which other processes can still read

    def _lock(file: int) -> None:
        """Raise BlockingIOError when another process holds the lock."""
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(file, 0, os.SEEK_SET)

    def _is_locked(file: int) -> bool:
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        try:
            os.read(file, 1)  # a locked byte cannot be read
        except PermissionError:
            return True
        return False
else:
    import fcntl

    def _lock(file: int) -> None:
        """Raise BlockingIOError when another process holds the lock."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_locked(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two queries do not block each other
        except BlockingIOError:
            return True
        return False


def is_lock_held(path: Path) -> bool:
    """Whether a live process holds the lock at `path`; True on file systems without locks. The query holds a shared
    lock for a moment; a FolderLock taken then needs `patience`."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _is_locked(file)
    except OSError:
        return True
    finally:
        os.close(file)


class FolderLock:
    """A file lock that the operating system frees when its process ends, with the owner's process id and host.

    Raises OutputError, which names the owner and the folder `what`, when another one holds it after `patience` seconds.
    """

    def __init__(self, path: Path, what: Path, patience: float = 0) -> None:
        self.path, self._file = path, -1
        until = time.monotonic() + patience
        while self._file < 0:
            try:
                self._file = self._take(what)
            except OutputError as error:
                if not isinstance(error.__cause__, BlockingIOError) or time.monotonic() >= until:
                    raise
                time.sleep(0.01)

    def _take(self, what: Path) -> int:
        """Descriptor of the locked file, or -1 when its owner has just removed it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the owner has just removed the folder
            return -1
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror}); choose another folder") from error
        try:
            _lock(file)
        except BlockingIOError as error:
            owner = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise OutputError(
                f"output folder {what} is being written by {owner}; wait for it, stop it, or choose another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        try:
            same = os.fstat(file).st_ino == os.stat(self.path).st_ino
        except FileNotFoundError:
            same = False
        if not same:
            os.close(file)
            return -1
        with suppress(OSError):  # on a full disk the lock holds without this text
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return file

    def release(self) -> None:
        """Remove the file and free the lock; a second call does nothing."""
        if self._file >= 0:
            if os.name == "posix":
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1
            if os.name != "posix":  # there an open file cannot be removed, nor one that the next run has locked
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


LOCK = "lock"
ENTRY_FILE = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class Staging:
    """The locked `.partial` folder, `path`, of one output `folder`; a context manager.

    `retain`: leave unpublished files in place on close: those of an interrupted run, until `clear`, and those that are
    to be resumed or inspected. Raises OutputError when another run works on the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / PARTIAL
        self._lock = FolderLock(self.path / LOCK, folder)
        # Finish an interrupted swap; a swap.json that was cut short means that no file was moved.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            swap = json.loads((self.path / SWAP).read_text(encoding="utf-8"))
            self._swap([str(name) for name in swap["files"]], [str(name) for name in swap["stale"]])
        self.retain = bool(_entries(self.path))

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the files of an earlier run, but not those to `keep`."""
        self.retain = bool(keep)
        for path in (entry for entry in _entries(self.path) if entry.name not in keep):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise OutputError(f"cannot remove {path} ({error.strerror}), which an earlier run left") from error

    def publish(self, files: Iterable[str], stale: Iterable[str] = ()) -> None:
        """Move finished files into the output folder, and remove the `stale` ones of an earlier run. An interrupted
        call may be repeated. Raises OutputError when a file cannot be moved."""
        new = list(files)
        old = sorted({*stale} - {*new})
        write_text(self.path / SWAP, json.dumps({"files": new, "stale": old}))
        sync_folder(self.path)
        self.retain = True  # an interrupted move is finished later
        self._swap(new, old)

    def _swap(self, files: Iterable[str], stale: Iterable[str]) -> None:
        publish_files(self.path, self.folder, files, stale)
        (self.path / SWAP).unlink(missing_ok=True)
        self.retain = False

    def close(self) -> None:
        """Remove unpublished files, unless `retain`, and unlock the folder."""
        if not self.retain:
            self.clear()
        self._lock.release()
        if self.path.is_dir() and not any(self.path.iterdir()):
            with suppress(OSError):  # another run has locked it meanwhile
                self.path.rmdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def sync_and_hash(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Sync all files of a folder, hidden ones left out, to disk and return SHA-256 by name. `known`: digests that were
    computed before. Raises OutputError when the disk is full."""
    found = {}
    try:
        shown = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
        for path in sorted(p for entry in shown for p in [entry, *entry.rglob("*")] if p.is_file()):
            name = path.relative_to(folder).as_posix()
            found[name] = (known or {}).get(name) or file_sha256(path)
            with open(path, "rb" if os.name == "posix" else "r+b") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder} to disk ({error.strerror or error}); free some space") from error
    return found


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def publish_files(path: Path, folder: Path, files: Iterable[str], stale: Iterable[str] = ()) -> None:
    """Move `files` from `path` to `folder` on the same disk, config.json or a .gguf file last; the `stale` files of an
    earlier run and weights of other names are removed before that. An interrupted call may be repeated."""
    tops = dict.fromkeys(name.split("/")[0] for name in files)
    first = [name for name in tops if name != ENTRY_FILE and not name.endswith(".gguf")]
    try:
        for name in (*first, *(old := list(stale))):
            path_inside(folder, name)
        if (path / ENTRY_FILE).exists() or ENTRY_FILE in old:  # from here on no loader opens the old model
            (folder / ENTRY_FILE).unlink(missing_ok=True)
            sync_folder(folder)
        for name in first:
            _move(path, folder, name)
        if ENTRY_FILE in tops:
            for found in list(folder.iterdir()):
                if _WEIGHTS.fullmatch(found.name) and found.name not in tops:
                    found.unlink()
        remove_files(folder, old)
        sync_folder(folder)
        for name in tops:
            _move(path, folder, name)
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot move the files in {path} to {folder} ({error.strerror or error})") from error


def _move(path: Path, folder: Path, name: str) -> None:
    if not (path / name).exists():  # already moved
        return
    if (path / name).is_dir():
        shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(path / name, folder / name)


def all_files_present(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether all these files (SHA-256 by name) are unchanged in a folder or still in its `.partial`."""
    for name, digest in files.items():
        at = next((p for p in (folder / PARTIAL / name, folder / name) if p.is_file()), None)
        if at is None or file_sha256(at) != digest:
            return False
    return True
