"""Checks of the output folder, made before any work is done."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from auto_round.errors import AutoRoundError, OutputError
from auto_round.export.earlier_output import PARTIAL as PARTIAL
from auto_round.export.earlier_output import look

_GB = 1e9
_FULL = (errno.ENOSPC, errno.EDQUOT)


def ensure_output_folder(
    path: str | os.PathLike[str], overwrite: bool = False, ours: Collection[str] = (PARTIAL,)
) -> Path:
    """Make the folder and return it.

    Args:
        ours: names that an interrupted run may have left there.

    A folder that holds nothing but the result of an earlier run is taken, too: it is replaced.

    Raises OutputError when it is a file, cannot be made or written, or holds something else and `overwrite` is False.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output path {folder} is a file; give a folder that is new or empty")
    if folder.is_dir() and not overwrite and any(entry.name not in ours for entry in folder.iterdir()):
        foreign = look(folder, {PARTIAL, *ours}).foreign
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise OutputError(
                f"output folder {folder} is not empty: no earlier run wrote {', '.join(foreign[:3])}{more} as it is "
                "now; choose another folder, move that away, or ask to overwrite (--overwrite, overwrite=True)"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be made ({error.strerror}); choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"output folder {folder} is not writable; choose another or change its permissions")
    return folder


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise OutputError when no file can be written at `path`: its folder is not there or cannot be written."""
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise OutputError(f"{target} cannot be written: folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{target} cannot be written: folder {target.parent} is not writable; choose another or change its "
            "permissions"
        )


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    folder = Path(path).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_disk(path: str | os.PathLike[str], bytes_needed: int) -> None:
    """Raise OutputError when the disk of `path` has less than `bytes_needed` bytes free."""
    free = free_bytes(path)
    if free < bytes_needed:
        raise OutputError(
            f"output folder {path} needs {bytes_needed / _GB:.2f} GB but its disk has {free / _GB:.2f} GB free; "
            "free some space or choose a folder on another disk"
        )


@contextmanager
def writing(folder: str | os.PathLike[str], needed: int) -> Iterator[None]:
    """Whatever the system refuses while this is open, as an OutputError that names the file, and for a full disk says
    how much is free and how much is needed.

    Args:
        folder: of the output.
        needed: bytes that the output takes.
    """
    try:
        yield
    except AutoRoundError as error:
        cause = error.__cause__
        if isinstance(error, OutputError) and isinstance(cause, OSError) and cause.errno in _FULL:
            raise OutputError(f"{error}; {_room(folder, needed)}") from cause
        raise
    except OSError as error:
        room = f"; {_room(folder, needed)}" if error.errno in _FULL else ""
        raise OutputError(
            f"cannot write {error.filename or folder} ({error.strerror or type(error).__name__}){room}"
        ) from error


def _room(folder: str | os.PathLike[str], needed: int) -> str:
    free = free_bytes(folder)
    return (
        f"the disk of {folder} has {free / _GB:.2f} GB free, and the output takes {needed / _GB:.2f} GB: free some "
        "space and give the same command again, or choose a folder on another disk"
    )


def path_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """`folder/name`, or OutputError when that would lie outside the folder."""
    root = Path(folder).resolve()
    target = (root / name).resolve()
    if target == root or root not in target.parents:
        raise OutputError(f"file name {name!r} leads outside the output folder {root}; give a name inside it")
    return target
