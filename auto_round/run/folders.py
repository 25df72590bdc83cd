"""Formats and output folders of a run: split formats into runs, name the folders, check and clean them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.errors import OutputError
from auto_round.formats.base import OutputFormat
from auto_round.logger import logger
from auto_round.output import folders as disk
from auto_round.run.journal import Journal
from auto_round.run.plan import Job
from auto_round.run.settings import Settings
from auto_round.schemes import PRESET_SCHEMES, normalize_preset_name

GGUF = "gguf:"
_DEFAULT_SCHEME = "W4A16"
_GB = 1e9


def default_format(settings: Settings) -> str:
    """The format when none is given: the file type of a GGUF scheme, else auto_round."""
    name = settings.scheme_name.lower()
    return name if name.startswith(GGUF) else "auto_round"


def split_runs(
    settings: Settings, formats: Sequence[OutputFormat], quiet: bool = False
) -> list[tuple[Settings, list[OutputFormat]]]:
    """(settings, formats) of each run: all formats that take any scheme first, then one run for each with its own.

    That (GGUF) replaces the scheme, with a warning unless `quiet`. With such formats only, format `fake` belongs to the
    first of them.
    """
    runs: list[tuple[Settings, list[OutputFormat]]] = []
    others = [fmt for fmt in formats if not fmt.preset]
    for fmt in (fmt for fmt in formats if fmt.preset):
        if not quiet and settings.scheme_name not in (fmt.preset, _DEFAULT_SCHEME):
            message = "format %s has types of its own: scheme %s is not used for it"
            logger.warning(message, fmt.name, settings.scheme_name)
        name = normalize_preset_name(fmt.preset)
        runs.append((replace(settings, scheme=PRESET_SCHEMES[fmt.preset], scheme_name=name, mixed=None), [fmt]))
    if runs and [fmt.name for fmt in others] == ["fake"]:
        runs[0][1].append(others[0])
    elif others or not runs:
        runs.insert(0, (settings, others))
    return runs


def format_folders(root: Path, formats: Sequence[OutputFormat]) -> list[Path]:
    """The folder of each format: the output folder itself, or, for several formats, a subfolder each."""
    return [root] if len(formats) == 1 else [root / disk.subfolder_name(fmt.name) for fmt in formats]


def output_bytes(job: Job) -> int:
    """Disk space of the output with its small files."""
    return int(sum(job.bytes_on_disk.values()) * 1.02) + (1 << 20)


def missing_bytes(job: Job, root: Path) -> int:
    """Disk space that the output still needs: an interrupted run has left a part of it."""
    present = 0
    for part in (root / disk.PARTIAL, *(root.glob(f"*/{disk.PARTIAL}") if root.is_dir() else ())):
        for folder, _, names in os.walk(part):
            for name in names:
                with suppress(FileNotFoundError):  # another process of the run has moved it
                    stat = os.stat(os.path.join(folder, name))
                    # Some files have their whole size from the start, but take no space where nothing is written.
                    present += stat.st_size if os.name == "nt" else stat.st_blocks * 512
    return max(0, output_bytes(job) - present)


def journal_bytes(settings: Settings, width: int, itemsize: int) -> int:
    """Largest size of a run's journal: the hidden states twice, since new ones are written before old ones are removed.
    `width`, `itemsize`: of the hidden states, and bytes of one of their values."""
    if not settings.needs_data:
        return 0
    algorithm = settings.algorithm
    streams = 2 if isinstance(algorithm, SignRoundConfig) and algorithm.enable_quanted_input else 1
    return 2 * streams * settings.nsamples * settings.seqlen * width * itemsize


def check_folders(
    job: Job, root: Path, formats: Sequence[OutputFormat], overwrite: bool, journal: Journal, siblings: Sequence[str]
) -> None:  # fmt: skip
    """Raise OutputError when the folders hold foreign files, or the disk has too little space for the journal."""
    needed, free = journal.missing_bytes(job.journal_bytes), disk.free_bytes(journal.folder)
    shared = disk.existing_parent(journal.folder).stat().st_dev == disk.existing_parent(root).stat().st_dev
    beside = missing_bytes(job, root) if shared else 0
    if needed and free < needed + beside:
        text = f" besides {beside / _GB:.2f} GB for the output folder" if shared else ""
        raise OutputError(
            f"the journal in {journal.folder.parent} needs {needed / _GB:.2f} GB{text}, and its disk has "
            f"{free / _GB:.2f} GB free; set AR_WORK_SPACE to a folder on another disk, or do without a journal "
            "(--no_resume)"
        )
    folders = format_folders(root, formats)
    others = {disk.PARTIAL, *siblings, *(folder.name for folder in folders if folder != root)}
    for fmt, folder in zip(formats, folders, strict=True):
        ours = {name.split("/")[0] for name in journal.own_files(fmt.name, folder)}
        disk.ensure_output_folder(folder, overwrite, {disk.PARTIAL, *ours, *(others if folder == root else ())})
    disk.ensure_output_folder(root, overwrite or len(formats) == 1, others)


def stale_files(
    root: Path, folders: Collection[Path], siblings: Collection[str] = ()
) -> Mapping[Path, tuple[str, ...]]:
    """Files of an earlier run in each of these folders, and under `root` those in the rest of `root`, without the
    subfolders of other runs of the same command, `siblings`."""
    below = [folder for folder in folders if folder != root]
    found = {folder: disk.inspect_folder(folder).files for folder in below}
    left_alone = {*siblings, *(folder.name for folder in below)}
    found[root] = tuple(name for name in disk.inspect_folder(root).files if name.split("/")[0] not in left_alone)
    return found
