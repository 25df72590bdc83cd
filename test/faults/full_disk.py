"""A disk that is full from the n-th write on: every call that brings bytes or names to files below a folder fails.

Files that are opened for writing there are wrapped; `os` functions that write, reserve, sync or rename are replaced.
What Rust or C code writes by itself is not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

_MODES = set("wax+")
_CALLS = ("pwrite", "write", "fsync", "ftruncate", "posix_fallocate", "sendfile", "copy_file_range")


class FullDisk:
    """Fails every write from number `limit` on, while open. `calls` counts them; `places` says what each was."""

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root, self.limit, self.calls = str(root), limit, 0
        self.places: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def write(self, what: str) -> None:
        """One call that writes."""
        self.calls += 1
        self.places.append(what)
        if self.limit is not None and self.calls > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> FullDisk:
        real_open, disk = io.open, self

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            here = isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(disk.root)
            if here and _MODES & set(mode):
                disk.write(f"open {os.path.basename(file)}")
                return _File(real_open(file, mode, *args, **kwargs), disk, os.path.basename(file))
            return real_open(file, mode, *args, **kwargs)

        self._patch.setattr(builtins, "open", opened)
        self._patch.setattr(io, "open", opened)
        for name in _CALLS:
            if hasattr(os, name):
                self._patch.setattr(os, name, self._counted(name, getattr(os, name)))
        real_replace = os.replace

        def replaced(source: Any, target: Any, **kwargs: Any) -> None:
            if os.path.abspath(target).startswith(disk.root):
                disk.write(f"replace {os.path.basename(target)}")
            real_replace(source, target, **kwargs)

        self._patch.setattr(os, "replace", replaced)
        return self

    def _counted(self, name: str, real: Any) -> Any:
        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            where = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else ""
            if where.startswith(self.root):
                self.write(f"{name} {os.path.basename(where)}")
            return real(file, *args, **kwargs)

        return call

    def __exit__(self, *_: Any) -> None:
        self._patch.undo()


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, disk: FullDisk, name: str) -> None:
        self._file, self._disk, self._name = file, disk, name

    def write(self, data: Any) -> int:
        self._disk.write(f"write {self._name}")
        return self._file.write(data)

    def truncate(self, *args: Any) -> int:
        self._disk.write(f"truncate {self._name}")
        return self._file.truncate(*args)

    def flush(self) -> None:
        self._disk.write(f"flush {self._name}")
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._disk.write(f"close {self._name}")
            finally:
                self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)
