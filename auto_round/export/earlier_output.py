"""What a folder holds of an earlier run of ours, known by the run's report.json: such a folder may be replaced.

A file counts as ours when a report.json beside it, or in the folder above, lists it and it is what was written: its
size is the same, and for small files its digest. Whatever else is there is somebody else's and is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import OutputError

PARTIAL = ".partial"
"""Folder inside an output folder, with what is not finished."""
SWAP = "swap.json"
"""File in it, while finished files are moved into the place of an earlier run's."""
REPORT = "report.json"
_REWRITTEN = (REPORT, "README.md")  # an evaluation writes them again
_DIGESTED = 64 << 20  # bytes; of larger files only the size is compared


@dataclass(frozen=True)
class Earlier:
    """What a folder holds.

    Attributes:
        files: names of the files that an earlier run of ours wrote and that are there, relative to the folder.
        foreign: names of what no run of ours wrote, or was changed since.
        missing: names of files that a report lists and that are not there as they were written.
    """

    files: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def subfolder_name(format_name: str) -> str:
    """The subfolder of a format, where one run writes several."""
    return format_name.replace(":", "-").replace("_", "-")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report.json of a folder, None where there is none that a run of ours can have written."""
    try:
        values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not {"schema_version", "format"} <= set(values):
        return None
    return values if all(isinstance(values.get(key), dict) for key in ("files", "sizes", "small_files")) else None


def look(folder: Path, leftovers: Iterable[str] = (PARTIAL,)) -> Earlier:
    """What `folder`, and the subfolders that a run of several formats makes in it, hold. Reads no large file.

    Args:
        leftovers: names that an unfinished run of ours has, and that are neither ours to replace nor foreign.
    """
    if not folder.is_dir():
        return Earlier()
    report = read_report(folder)
    listed = _listed(report)
    files = {name for name, state in listed.items() if _is_as_written(folder / name, state)}
    missing = set(listed) - files
    files |= {name for name in _swapped(folder) if (folder / name).is_file()}
    if report is not None:
        files |= {name for name in _REWRITTEN if (folder / name).is_file()}
    foreign: list[str] = []
    skipped = set(leftovers)
    for entry in sorted(folder.iterdir()):
        if entry.name in skipped:
            continue
        inner = read_report(entry) if entry.is_dir() and not entry.is_symlink() else None
        if inner is not None and entry.name == subfolder_name(str(inner["format"])):
            below = look(entry, leftovers)
            files |= {f"{entry.name}/{name}" for name in below.files}
            foreign += [f"{entry.name}/{name}" for name in below.foreign]
            continue
        is_folder = entry.is_dir() and not entry.is_symlink()
        inside = [path for path in entry.rglob("*") if not path.is_dir()] if is_folder else [entry]
        if is_folder and all(PARTIAL in path.relative_to(entry).parts for path in inside):
            continue  # empty, or nothing but what an unfinished run left
        names = [path.relative_to(folder).as_posix() for path in inside]
        foreign += [name for name in names if name not in files]
    return Earlier(tuple(sorted(files)), tuple(foreign), tuple(sorted(missing)))


def _listed(report: Mapping[str, Any] | None) -> dict[str, tuple[int | None, str | None]]:
    """Size (of weights) or digest of every file that a report lists, by name, but of names that lead elsewhere."""
    if report is None:
        return {}
    found: dict[str, tuple[int | None, str | None]] = {}
    for name, digest in {**report["files"], **report["small_files"]}.items():
        size = report["sizes"].get(name)
        if not os.path.isabs(name) and ".." not in Path(name).parts:
            found[name] = (size if isinstance(size, int) else None, str(digest))
    return found


def _is_as_written(path: Path, state: tuple[int | None, str | None]) -> bool:
    size, digest = state
    try:
        now = path.stat().st_size
        if size is not None and now != size:
            return False
        return now > _DIGESTED or hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except OSError:
        return False


def _swapped(folder: Path) -> set[str]:
    """Names of old and new files, while they are being swapped."""
    try:
        values = json.loads((folder / PARTIAL / SWAP).read_text(encoding="utf-8"))
        return {str(name) for key in ("files", "stale") for name in values[key]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def made_from(folder: Path) -> Mapping[str, str] | None:
    """What the complete result in `folder` was made from, None where the folder holds none.

    It is complete when all files that its report lists are there and nothing of an unfinished run is.
    """
    report = read_report(folder)
    if report is None or (folder / PARTIAL).exists() or look(folder).missing:
        return None
    made = report.get("made_from")
    return made if isinstance(made, dict) else None


def is_checked(folder: Path) -> bool:
    """Whether the result in `folder` was opened again and compared after it was written."""
    report = read_report(folder)
    return report is not None and report.get("verify") is not None


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of an earlier run and the folders that get empty, what makes a loader open them first and the
    report, which says whose they are, last. What is gone already is no error.

    Raises OutputError when one cannot be removed.
    """

    def order(name: str) -> tuple[bool, bool, str]:
        return name.endswith(REPORT), not name.endswith("config.json"), name

    try:
        for name in sorted(names, key=order):
            (folder / name).unlink(missing_ok=True)
            for parent in (folder / name).parents:
                if parent == folder:
                    break
                with suppress(OSError):  # something else is in it
                    parent.rmdir()
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}, which an earlier run wrote ({error.strerror})") from error


def refuse_source(output: Path, source: str | os.PathLike[str] | None) -> None:
    """Raise OutputError when writing to `output` would write over the model that is read: its folder, a link to it, or
    a folder above it. `source`: the model's folder; anything else is no folder, and passes."""
    if source is None or not os.path.isdir(source):
        return
    model, target = Path(source).resolve(), output.expanduser().resolve()
    if target == model:
        raise OutputError(f"output folder {output} is the model's own folder; choose another, --overwrite or not")
    if target in model.parents:
        raise OutputError(
            f"output folder {output} holds the model's own folder, {source}; choose another, or a folder in it"
        )
