"""Several processes on one folder: who does which file, and how they wait for each other. No network is used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from auto_round.compressors.model_free.journal import FAILED, READY, Journal
from auto_round.compressors.model_free.layout import Layout
from auto_round.errors import AutoRoundError, OutputError
from auto_round.export.shard_writer import write_text

_POLL_S = 0.05
_LONGEST_S = 3600.0


def my_shards(layout: Layout, rank: int, world: int) -> list[int]:
    """Output files of one process: the largest first to whoever has least, then in order."""
    loads = [0] * world
    mine: list[int] = []
    for index in sorted(range(len(layout.shards)), key=lambda i: (-layout.shards[i].size, i)):
        lightest = loads.index(min(loads))
        loads[lightest] += layout.shards[index].size
        if lightest == rank:
            mine.append(index)
    return sorted(mine)


def wait_until(done: Callable[[], bool], alive: Callable[[], object], what: str, longest: float = _LONGEST_S) -> None:
    """Wait for other processes.

    Args:
        done: whether the wait is over.
        alive: a value that changes as long as they work; without a change for `longest` seconds they count as lost.

    Raises:
        OutputError: they are lost.
    """
    last, since = alive(), time.monotonic()
    while not done():
        time.sleep(_POLL_S)
        now = alive()
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > longest:
            raise OutputError(f"nothing happened for {longest:.0f} s while waiting for {what}; run the command again")


def say_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Tell the other processes that this one gave up, before process 0 made the folder too."""
    with suppress(OSError, OutputError):  # a disk that takes no file is what the error is about already
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder, f"{FAILED}{rank:05d}", f"{type(error).__name__}: {error}\n")


def failures(folder: Path) -> frozenset[tuple[Path, int]]:
    """Files that say that a process gave up, with the time of each. A run starts by noting those of earlier runs."""
    found = set()
    with suppress(FileNotFoundError):  # the run is over, or has not begun
        for name in os.listdir(folder):
            if name.startswith(FAILED):
                with suppress(FileNotFoundError):  # its process has begun again
                    found.add((folder / name, (folder / name).stat().st_mtime_ns))
    return frozenset(found)


def raise_failures(folder: Path, known: Collection[tuple[Path, int]] = ()) -> None:
    """Raise AutoRoundError when another process has given up, and that is not `known`."""
    for file, _ in sorted(failures(folder) - set(known)):
        why = file.read_text(encoding="utf-8").strip()
        raise AutoRoundError(f"process {int(file.name[len(FAILED) :])} gave up: {why}")


def clear_failures(folder: Path, rank: int) -> None:
    """Forget that this process gave up in an earlier run."""
    (folder / f"{FAILED}{rank:05d}").unlink(missing_ok=True)


def say_ready(journal: Journal, rank: int) -> None:
    """Tell process 0, once, that this one has done its part. Until all have, the journal stays: a slow process would
    find neither its files nor what the run is any more.

    Looked at in this order: when the journal is removed, its manifest is gone before this file is.
    """
    file = journal.folder / f"{READY}{rank:05d}"
    if not file.is_file() and journal.is_open:
        write_text(journal.folder, file.name, "")


def all_ready(journal: Journal, world: int) -> bool:
    """Whether all other processes than 0 have done their part."""
    return all((journal.folder / f"{READY}{rank:05d}").is_file() for rank in range(1, world))
