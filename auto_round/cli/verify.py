"""The verb `verify`: check that a folder's files still have the SHA-256 recorded in its report.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, OutputError, VerifyError

_USAGE = """usage: auto-round verify FOLDER ...

Compares every file that the folder's report.json lists with the SHA-256 recorded there when it was saved.
Exit code 0: all are equal; 9: some differ or are missing, and each is named."""


def run_verb(argv: Sequence[str]) -> int:
    """Check folders. Returns the exit code. Raises VerifyError for files that differ or are missing."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE)
        return 0
    flags = [word for word in argv if word.startswith("-")]
    if flags or not argv:
        given = f"unknown flag {flags[0]!r}" if flags else "no folder was given"
        raise ConfigError(f"{given}; use auto-round verify FOLDER, with the folder of a quantized model")
    mismatches = [line for folder in argv for line in check(Path(folder).expanduser())]
    if mismatches:
        raise VerifyError(f"{len(mismatches)} files have changed since they were saved: {'; '.join(mismatches)}")
    return 0


def check(folder: Path) -> list[str]:
    """The files of a folder that differ or are missing, with the reason; prints how many are unchanged. Raises
    OutputError for a folder without a readable report."""
    from auto_round.files import file_sha256

    file = folder / "report.json"
    try:
        report: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file} cannot be read ({error}); give the folder that auto-round wrote") from error
    parts = [report.get(key) for key in ("files", "small_files")] if isinstance(report, dict) else []
    found = {name: digest for part in parts if isinstance(part, dict) for name, digest in part.items()}
    if not found or not all(isinstance(v, str) for v in found.values()):
        raise OutputError(f"{file} lists no files with their SHA-256; give the folder that auto-round wrote")
    outside = next((name for name in found if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if outside is not None:
        raise OutputError(f"{file} names {outside!r}, which is not in its folder")
    mismatches = []
    for name, digest in found.items():
        path = folder / name
        if not path.is_file():
            mismatches.append(f"{path} is missing")
        elif file_sha256(path) != digest:
            mismatches.append(f"{path} differs")
    print(f"{folder}: {len(found) - len(mismatches)} of {len(found)} files are unchanged")
    return mismatches
