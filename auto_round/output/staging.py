"""Stage an output folder: write into `.partial`, lock it, publish all files at once when they are complete.

All files are written into `.partial` inside the folder. Once complete, the caller records their digests and moves
the files into the folder (`Staging.publish`), the file that a loader opens first as the last one. So a folder is
empty, holds only `.partial`, or is complete; a folder that is overwritten stays complete until then. `FolderLock`
admits one run at a time.

During the move `.partial/swap.json` lists the new files and those of an earlier run: the next run that opens the
folder's staging finishes a move that was interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from auto_round.errors import OutputError
from auto_round.output.folders import PARTIAL, SWAP, path_inside, remove_files
from auto_round.output.writer import file_sha256, sync_folder, write_text

if sys.platform == "win32":
    import msvcrt

    _PLACE = 1 << 20  # a byte behind the words, which others can still read

    def _lock(file: int) -> None:
        """Raises BlockingIOError when another process holds it."""
        os.lseek(file, _PLACE, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(file, 0, os.SEEK_SET)

    def _is_locked(file: int) -> bool:
        os.lseek(file, _PLACE, os.SEEK_SET)
        try:
            os.read(file, 1)  # a locked byte cannot be read
        except PermissionError:
            return True
        return False
else:
    import fcntl

    def _lock(file: int) -> None:
        """Raises BlockingIOError when another process holds it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_locked(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask do not see each other
        except BlockingIOError:
            return True
        return False


def is_lock_held(path: Path) -> bool:
    """Whether a live process holds the lock at `path`. True on file systems without locks, which cannot tell.

    A FolderLock that is taken in the same moment may find it held; `patience` is for that.
    """
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
    """A lock that the system frees when its process dies, however it dies.

    Args:
        path: the lock's file; its folder must exist. It holds the owner's process id and host while it is locked.
        what: the folder that is locked, for the message.
        patience: for how many seconds to try again while another holds it.

    Raises:
        OutputError: another process, or another run in this one, holds it; the message names it.
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
        """A locked file, or -1 when its owner removed it in the meantime."""
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
        with suppress(OSError):  # the lock holds without these words, which a full disk does not take
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return file

    def release(self) -> None:
        """Remove the file and free the lock. Calling it again does nothing."""
        if self._file >= 0:
            if os.name == "posix":
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1
            if os.name != "posix":  # an open file cannot be removed there, nor one that the next run has taken by now
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


# An output folder that shows its files only when all of them are there and were checked.
#
# Everything is written into `.partial` inside the folder. When it is whole, its list of files is kept by whoever asked
# (`sync_and_hash`), and the files are moved into the folder (`publish`), the one that makes a loader open it last. So
# a folder is empty, or holds nothing but `.partial`, or is complete; and one that is overwritten stays complete until
# then.
#
# While files are moved, `.partial/swap.json` says which are new and which are an earlier run's: a swap that was cut
# short is finished by whoever opens the folder's staging next.

LOCK = "lock"
ENTRY_FILE = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class Staging:
    """The `.partial` folder of one output folder, locked while this is open.

    Attributes:
        folder: where the files shall be.
        path: where they are written.

    Raises:
        OutputError: another run works on the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / PARTIAL
        self._lock = FolderLock(self.path / LOCK, folder)
        self.keep = False
        """What was written stays when this is closed, for a look at it."""
        self._finish_swap()

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for entry in _entries(self.path):
            _remove(entry)

    def sync_and_hash(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """Bring everything to the disk and return SHA-256 by file name, in subfolders too. `known`: digests that need
        not be computed again.

        Raises OutputError when the disk is full.
        """
        return sync_and_hash(self.path, known)

    def publish(self, files: Iterable[str], stale: Iterable[str] = ()) -> None:
        """Move the files of a sealed folder to where they belong. It may be called again after it was cut short.

        Args:
            stale: files of an earlier run in the folder, which make room for them.

        Raises OutputError when one cannot be moved.
        """
        new = list(files)
        old = sorted({*stale} - {*new})
        write_text(self.path, SWAP, json.dumps({"files": new, "stale": old}))
        sync_folder(self.path)
        self.keep = True  # what is written is needed, however this ends
        self._swap(new, old)

    def _swap(self, files: Iterable[str], stale: Iterable[str]) -> None:
        publish_files(self.path, self.folder, files, stale)
        (self.path / SWAP).unlink(missing_ok=True)
        self.keep = False

    def _finish_swap(self) -> None:
        """Do the rest of a swap that was cut short."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # one that was not written whole did nothing
            swap = json.loads((self.path / SWAP).read_text(encoding="utf-8"))
            self._swap([str(name) for name in swap["files"]], [str(name) for name in swap["stale"]])

    def close(self) -> None:
        """Remove what was not published, unless `keep`, and unlock the folder."""
        if not self.keep:
            self.clear()
        self._lock.release()
        if not self.keep and self.path.is_dir() and not any(self.path.iterdir()):
            try:
                self.path.rmdir()
            except OSError:  # another run has come in the meantime
                pass

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sync_and_hash(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Bring all files of a folder to the disk and return SHA-256 by file name, in subfolders too. `known`: digests that
    need not be computed again.

    Raises OutputError when the disk is full.
    """
    found = {}
    try:
        for path in sorted(p for entry in _entries(folder) for p in [entry, *entry.rglob("*")] if p.is_file()):
            name = path.relative_to(folder).as_posix()
            found[name] = (known or {}).get(name) or file_sha256(path)
            _sync(path)
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot bring {folder} to the disk ({error.strerror or error}); free some space") from error
    return found


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def publish_files(path: Path, folder: Path, files: Iterable[str], stale: Iterable[str] = ()) -> None:
    """Move `files` from `path` to `folder`, on the same disk, config.json or a .gguf file last; the `stale` files of an
    earlier run, and weights of other names, go before that. It may be called again after it was cut short.

    Raises OutputError when one cannot be moved.
    """
    tops = dict.fromkeys(name.split("/")[0] for name in files)
    first = [name for name in tops if name != ENTRY_FILE and not name.endswith(".gguf")]
    try:
        for name in (*first, *(old := list(stale))):
            path_inside(folder, name)
        if (path / ENTRY_FILE).exists() or ENTRY_FILE in old:  # from here on no loader opens what is overwritten
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
        raise OutputError(f"cannot give the files in {path} their names ({error.strerror or error})") from error


def _move(path: Path, folder: Path, name: str) -> None:
    if not (path / name).exists():  # moved already
        return
    if (path / name).is_dir():
        shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(path / name, folder / name)


def all_files_present(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether each of these files (SHA-256 by name) is in a folder or still in its `.partial`."""
    for name, digest in files.items():
        at = next((p for p in (folder / PARTIAL / name, folder / name) if p.is_file()), None)
        if at is None or file_sha256(at) != digest:
            return False
    return True


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise OutputError(f"cannot remove {path} ({error.strerror}), which an earlier run left") from error


def _sync(path: Path) -> None:
    with open(path, "rb" if os.name == "posix" else "r+b") as file:
        os.fsync(file.fileno())
