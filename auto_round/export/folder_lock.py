"""One run at a time on an output folder."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from auto_round.errors import OutputError

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


def is_held(path: Path) -> bool:
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
