"""Check an output folder before a run: files of an earlier run, foreign files, permissions and free disk space.

A file belongs to an earlier run when a report.json beside it, or in the folder above, lists it and it is
unchanged: its size is the same, and for small files its digest. Other files are foreign and are never touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from auto_round.errors import AutoRoundError, OutputError

PARTIAL = ".partial"
"""Subfolder of an output folder that holds unfinished files."""
SWAP = "swap.json"
"""File in it that lists new and replaced files while they are being moved."""
REPORT = "report.json"
_EVALUATION_FILES = (REPORT, "README.md")  # rewritten by an evaluation, so their digests may differ
_MAX_HASHED_BYTES = 64 << 20  # larger files are compared by size only
_GB = 1e9


class FolderContents(NamedTuple):
    """Names in an output folder: unchanged `files` of an earlier run, `foreign` ones that no run wrote or that were
    changed since, and those `missing` or changed that a report lists."""

    files: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def subfolder_name(format_name: str) -> str:
    """Name of a format's subfolder when a run writes several formats."""
    return format_name.replace(":", "-").replace("_", "-")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The values of a folder's report.json, or None when it is missing or was not written by AutoRound."""
    try:
        values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not {"schema_version", "format"} <= set(values):
        return None
    return values if all(isinstance(values.get(key), dict) for key in ("files", "sizes", "small_files")) else None


def inspect_folder(folder: Path, leftovers: Iterable[str] = (PARTIAL,)) -> FolderContents:
    """Sort the files in `folder`, and in its subfolders of single formats, into ours and foreign, without `leftovers`.
    Reads no large file."""
    if not folder.is_dir():
        return FolderContents()
    report = read_report(folder)
    files: set[str] = set()
    missing: set[str] = set()
    foreign: list[str] = []
    if report is not None:
        for name, digest in {**report["files"], **report["small_files"]}.items():
            if not os.path.isabs(name) and ".." not in Path(name).parts:
                unchanged = _is_unchanged(folder / name, report["sizes"].get(name), str(digest))
                (files if unchanged else missing).add(name)
    with suppress(OSError, ValueError, KeyError, TypeError):  # old and new files of an unfinished swap
        swap = json.loads((folder / PARTIAL / SWAP).read_text(encoding="utf-8"))
        moving = {str(name) for key in ("files", "stale") for name in swap[key]}
        files |= {name for name in moving if (folder / name).is_file()}
    if report is not None:
        files |= {name for name in _EVALUATION_FILES if (folder / name).is_file()}
    skipped = set(leftovers)
    for entry in sorted(folder.iterdir()):
        if entry.name in skipped:
            continue
        is_folder = entry.is_dir() and not entry.is_symlink()
        inner = read_report(entry) if is_folder else None
        if inner is not None and entry.name == subfolder_name(str(inner["format"])):
            below = inspect_folder(entry, leftovers)
            files |= {f"{entry.name}/{name}" for name in below.files}
            foreign += [f"{entry.name}/{name}" for name in below.foreign]
            continue
        inside = [path for path in entry.rglob("*") if not path.is_dir()] if is_folder else [entry]
        if is_folder and all(PARTIAL in path.relative_to(entry).parts for path in inside):
            continue  # empty, or only files of an unfinished run
        names = [path.relative_to(folder).as_posix() for path in inside]
        foreign += [name for name in names if name not in files]
    return FolderContents(tuple(sorted(files)), tuple(foreign), tuple(sorted(missing)))


def _is_unchanged(path: Path, size: Any, digest: str) -> bool:
    try:
        now = path.stat().st_size
        if isinstance(size, int) and now != size:
            return False
        return now > _MAX_HASHED_BYTES or hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except OSError:
        return False


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of an earlier run and folders that become empty: config.json first, so that no loader opens the
    rest, and report.json, which lists the files, last. Missing files are no error."""
    order = lambda name: (name.endswith(REPORT), not name.endswith("config.json"), name)
    try:
        for name in sorted(names, key=order):
            (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # it is not empty
                for parent in Path(name).parents[:-1]:
                    (folder / parent).rmdir()
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}, which an earlier run wrote ({error.strerror})") from error


def reject_model_folder(output: Path, source: str | os.PathLike[str] | None) -> None:
    """Raise OutputError when `output` is the folder of the source model, a link to it, or a folder above it."""
    if source is None or not os.path.isdir(source):
        return
    model, target = Path(source).resolve(), output.expanduser().resolve()
    if target == model:
        raise OutputError(f"output folder {output} is the model's own folder; choose another, --overwrite or not")
    if target in model.parents:
        raise OutputError(
            f"output folder {output} holds the model's own folder, {source}; choose another, or a folder in it"
        )


def ensure_output_folder(
    path: str | os.PathLike[str], overwrite: bool = False, ours: Collection[str] = (PARTIAL,)
) -> Path:
    """Create the output folder and return its path. Raises OutputError when it is a file, not writable, or without
    `overwrite` holds files that are neither of an earlier run nor `ours`."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output path {folder} is a file; give a folder that is new or empty")
    if folder.is_dir() and not overwrite and (foreign := inspect_folder(folder, {PARTIAL, *ours}).foreign):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"output folder {folder} is not empty: no earlier run wrote {', '.join(foreign[:3])}{more}, or they "
            "were changed since; choose another folder, move them away, or ask to overwrite (--overwrite, "
            "overwrite=True)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be made ({error.strerror}); choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"output folder {folder} is not writable; choose another or change its permissions")
    return folder


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise OutputError when no file can be written at `path`: its folder is missing or not writable."""
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of a file in it")
    problem = "is not writable; choose another or change its permissions"
    if not target.parent.is_dir():
        problem = "does not exist; make it first"
    elif os.access(target.parent, os.W_OK | os.X_OK):
        return
    raise OutputError(f"{target} cannot be written: folder {target.parent} {problem}")


def existing_parent(path: str | os.PathLike[str]) -> Path:
    """The path itself, or the first folder above it that exists."""
    folder = Path(path).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Free bytes on the disk of `path`; the path may not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def check_disk(path: str | os.PathLike[str], bytes_needed: int) -> None:
    """Raise OutputError when the disk of `path` has less than `bytes_needed` bytes free."""
    free = free_bytes(path)
    if free < bytes_needed:
        raise OutputError(
            f"output folder {path} needs {bytes_needed / _GB:.2f} GB but its disk has {free / _GB:.2f} GB free; "
            "free some space or choose a folder on another disk"
        )


@contextmanager
def explain_write_errors(folder: str | os.PathLike[str], needed: int) -> Iterator[None]:
    """Convert OSError into an OutputError that names the file; for a full disk also the free and the `needed` bytes."""
    try:
        yield
    except (AutoRoundError, OSError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        space = "" if not full else (
            f"; the disk of {folder} has {free_bytes(folder) / _GB:.2f} GB free, and the output takes "
            f"{needed / _GB:.2f} GB: free some space and give the same command again, or choose a folder on another "
            "disk"
        )  # fmt: skip
        if not isinstance(error, AutoRoundError):
            text = f"cannot write {error.filename or folder} ({error.strerror or type(error).__name__})"
            raise OutputError(text + space) from error
        if full:
            raise OutputError(f"{error}{space}") from cause
        raise
