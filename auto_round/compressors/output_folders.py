"""The folders of a run: one for each format, what may lie in them, and what an earlier run left there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from auto_round.compressors.format_runs import folder_name
from auto_round.compressors.job import Job
from auto_round.compressors.resume.journal import Journal, journal_folder
from auto_round.compressors.resume.run_journal import RunJournal
from auto_round.compressors.resume.size import check_journal_disk
from auto_round.errors import OutputError
from auto_round.export.disk import PARTIAL, ensure_output_folder
from auto_round.export.earlier_output import look
from auto_round.export.formats import OutputFormat


def format_folders(root: Path, formats: Sequence[OutputFormat]) -> list[Path]:
    """Where each format goes: the output folder itself, or, of several, a subfolder each."""
    return [root] if len(formats) == 1 else [root / folder_name(fmt) for fmt in formats]


def output_bytes(job: Job) -> int:
    """What the output takes, with the small files. What it replaces stays until all of it is there, so nothing is taken
    off for that."""
    return int(sum(job.bytes_on_disk.values()) * 1.02) + (1 << 20)


def check_folders(
    job: Job, root: Path, formats: Sequence[OutputFormat], overwrite: bool, journal: RunJournal | None,
    siblings: Sequence[str],
) -> None:  # fmt: skip
    """Raise OutputError when the folders hold something that no run of ours wrote, or the journal finds no room.

    Args:
        siblings: subfolders of other runs that are part of the same command.
    """
    if journal is not None:
        before = journal.journal
        left = max(0, job.journal_bytes - before.nbytes())
        check_journal_disk(before.folder, root, left, output_bytes(job))
    else:
        before = Journal(journal_folder(root))
        with suppress(OutputError):
            before.load()
    folders = format_folders(root, formats)
    beside = {PARTIAL, *siblings, *(folder.name for folder in folders if folder != root)}
    for fmt, folder in zip(formats, folders, strict=True):
        ours = {name.split("/")[0] for name in before.done.get(fmt.name, ())}
        if journal is None and not (folder / PARTIAL).is_dir():
            ours = set()  # complete: judged by its report
        ensure_output_folder(folder, overwrite, {PARTIAL, *ours, *(beside if folder == root else ())})
    ensure_output_folder(root, overwrite or len(formats) == 1, beside)


def stale_files(
    root: Path, folders: Collection[Path], siblings: Collection[str] = ()
) -> Mapping[Path, tuple[str, ...]]:
    """What an earlier run wrote into each of these folders, by folder, and into the rest of `root`, under `root`.

    Args:
        siblings: subfolders of other runs that are part of the same command, which are left alone.
    """
    found: dict[Path, tuple[str, ...]] = {folder: look(folder).files for folder in folders if folder != root}
    left_alone = {*siblings, *(folder.name for folder in folders if folder != root)}
    found[root] = tuple(name for name in look(root).files if name.split("/")[0] not in left_alone)
    return found
