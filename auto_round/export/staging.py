"""An output folder that shows its files only when all of them are there and were checked.

Everything is written into `.partial` inside the folder. When it is whole, its list of files is kept by whoever asked
(`seal`), and the files are moved into the folder (`publish`), the one that makes a loader open it last. So a folder is
empty, or holds nothing but `.partial`, or is complete; and one that is overwritten stays complete until then.

While files are moved, `.partial/swap.json` says which are new and which are an earlier run's: a swap that was cut short
is finished by whoever opens the folder's staging next.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from auto_round.errors import OutputError
from auto_round.export.disk import PARTIAL, path_inside
from auto_round.export.earlier_output import SWAP, remove_files
from auto_round.export.folder_lock import FolderLock
from auto_round.export.shard_writer import file_sha256, sync_folder, write_text

LOCK = "lock"
OPENS = "config.json"
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

    def seal(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """Bring everything to the disk and return SHA-256 by file name, in subfolders too. `known`: digests that need
        not be computed again.

        Raises OutputError when the disk is full.
        """
        return seal(self.path, known)

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
        show(self.path, self.folder, files, stale)
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


def seal(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
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


def show(path: Path, folder: Path, files: Iterable[str], stale: Iterable[str] = ()) -> None:
    """Move `files` from `path` to `folder`, on the same disk, config.json or a .gguf file last; the `stale` files of an
    earlier run, and weights of other names, go before that. It may be called again after it was cut short.

    Raises OutputError when one cannot be moved.
    """
    tops = dict.fromkeys(name.split("/")[0] for name in files)
    first = [name for name in tops if name != OPENS and not name.endswith(".gguf")]
    try:
        for name in (*first, *(old := list(stale))):
            path_inside(folder, name)
        if (path / OPENS).exists() or OPENS in old:  # from here on no loader opens what is overwritten
            (folder / OPENS).unlink(missing_ok=True)
            sync_folder(folder)
        for name in first:
            _move(path, folder, name)
        if OPENS in tops:
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


def can_publish(folder: Path, files: Mapping[str, str]) -> bool:
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
