"""Parallel model-free work: threads within a memory limit, writing shards, processes that share a folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from auto_round.errors import AutoRoundError, OutputError
from auto_round.output.writer import write_text
from auto_round.run.model_free.journal import FAILED, READY, Journal
from auto_round.run.model_free.shards import FileCheck, Layout, ShardFile, WriteRecord
from auto_round.run.model_free.unit_processor import UnitProcessor
from auto_round.run.model_free.units import Unit
from auto_round.threads import split_torch_threads


class MemorySemaphore:
    """Lets work in as long as its memory fits below `most` bytes, and no more than `count` pieces of it. One that is
    too large for that runs alone."""

    def __init__(self, most: int, count: int) -> None:
        self.most, self.count, self._used, self._inside = most, count, 0, 0
        self._free = threading.Condition()

    def acquire(self, size: int) -> None:
        """Wait for room."""
        with self._free:
            self._free.wait_for(
                lambda: not self._inside or self._used + size <= self.most and self._inside < self.count
            )
            self._used += size
            self._inside += 1

    def release(self, size: int) -> None:
        """Give the room back."""
        with self._free:
            self._used -= size
            self._inside -= 1
            self._free.notify_all()


def run_units(
    units: Sequence[Unit], work: Callable[[Unit], None], workers: int, memory: int,
    before: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Call `work` on every unit, `workers` at a time, started in order.

    Args:
        memory: bytes that all running units may hold.
        before: called in this thread with a unit's position before it is started.

    Raises the first error of `work`, after the units that were running have ended; no new one is started.
    """
    semaphore = MemorySemaphore(memory, 2 * workers)
    failed: list[BaseException] = []

    def guarded(unit: Unit) -> None:
        try:
            if not failed:
                work(unit)
        except BaseException as error:
            failed.append(error)
        finally:
            semaphore.release(unit.memory)

    running: list[Future[None]] = []
    with split_torch_threads(workers), ThreadPoolExecutor(workers, "model-free") as pool:
        try:
            for position, unit in enumerate(units):
                semaphore.acquire(unit.memory)
                if failed:
                    semaphore.release(unit.memory)
                    break
                if before is not None:
                    before(position)
                running.append(pool.submit(guarded, unit))
        except BaseException as error:
            failed.append(error)
            raise
    if failed:
        raise failed[0]


# The writing of one process's files: units in, marks journaled, files finished as their last unit arrives.

SYNC_BYTES = 128 << 20
"""Written bytes after which they are brought to the disk and journaled."""


class _Open:
    """One output file in work. `chunk_records`: what an earlier run wrote to it."""

    def __init__(self, missing: set[int], chunk_records: Sequence[WriteRecord]) -> None:
        self.missing, self.chunk_records = missing, chunk_records
        self.file: ShardFile | None = None
        self.check: FileCheck | None = None
        self.pending: dict[int, list[WriteRecord]] = {}
        self.pending_bytes = 0


class ShardRun:
    """Writes the units of some output files; `do` is called by the workers.

    Args:
        chosen: output files of this process.
        finished: called with the index of each file that is whole under its final name, and its SHA-256.
        compare: read back what is written and compare it.
    """

    def __init__(
        self, layout: Layout, units: Sequence[Unit], processor: UnitProcessor, journal: Journal, chosen: Sequence[int],
        finished: Callable[[int, str], None], sync_bytes: int | None = None, compare: bool = True,
    ) -> None:  # fmt: skip
        self.layout, self.units, self.processor, self.journal = layout, units, processor, journal
        self._finished, self._compare = finished, compare
        self._sync_bytes = SYNC_BYTES if sync_bytes is None else sync_bytes
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1, "model-free-sync")
        self.todo: list[tuple[int, int]] = []
        for index in chosen:
            self._plan(index)

    def _plan(self, index: int) -> None:
        """What is left of one output file, by the journal and by what lies on the disk."""
        shard = self.layout.shards[index]
        done = self.journal.done(index)
        final, partial = self.journal.whole / shard.name, self.journal.partial(index)
        missing = [unit for unit in shard.units if unit not in done]
        if not missing and final.is_file() and final.stat().st_size == shard.size:
            return
        if not partial.is_file() or partial.stat().st_size != shard.size:
            self.journal.forget(index)
            done, missing = {}, list(shard.units)
        state = _Open(set(missing), [record for unit in done.values() for record in unit])
        self._open[index] = state
        if not missing:  # killed between the last line of the journal and the final name
            self._file(index, keep=True).finish()
            return
        if done:
            self._file(index, keep=True)
        self.todo += [(index, unit) for unit in missing]

    def _file(self, index: int, keep: bool) -> ShardFile:
        state = self._open[index]
        if state.file is None:
            shard = self.layout.shards[index]
            final = self.journal.whole / shard.name
            state.file = ShardFile(shard, self.journal.partial(index), final, keep)
        return state.file

    def do(self, index: int, number: int) -> None:
        """Round and write one unit."""
        with self._lock:
            file = self._file(index, keep=False)
        chunk_records = [file.put(chunk) for chunk in self.processor.chunks(self.units[number])]
        with self._lock:
            state = self._open[index]
            state.pending[number] = chunk_records
            state.pending_bytes += sum(record[2] for record in chunk_records)
            state.missing.discard(number)
            whole = not state.missing
            if not whole and state.pending_bytes < self._sync_bytes:
                return
            pending, state.pending, state.pending_bytes = state.pending, {}, 0
            failed = next((f for f in self._syncs if f.done() and f.exception() is not None), None)
            self._syncs.append(self._syncer.submit(self._sync, index, pending, whole))
        if failed is not None:
            failed.result()

    def _sync(self, index: int, pending: Mapping[int, Sequence[WriteRecord]], whole: bool) -> None:
        """In one thread, so in order: bytes to the disk, then the journal, then the final name."""
        state = self._open[index]
        file = state.file
        assert file is not None
        file.sync()
        layers = [name for unit in pending for name in self.units[unit].layers]
        self.journal.add(index, pending, {n: self.processor.digests[n] for n in layers if n in self.processor.digests})
        if state.check is None:
            state.check = FileCheck(file.partial, file.shard, self._compare)
            state.check.advance(state.chunk_records)
        state.check.advance([record for unit in pending.values() for record in unit])
        if whole:
            digest = state.check.digest()
            state.check.close()
            file.finish()
            self._finished(index, digest)

    def close(self, well: bool) -> None:
        """Wait for the last syncs, then close all files. Their errors are raised if all went `well` until now; else
        another error is on its way."""
        self._syncer.shutdown(wait=True)
        try:
            if well:
                for future in self._syncs:
                    future.result()
        finally:
            for state in self._open.values():
                if state.file is not None:
                    state.file.close()
                if state.check is not None:
                    state.check.close()


# Several processes on one folder: who does which file, and how they wait for each other. No network is used.

_POLL_S = 0.05
_LONGEST_S = 3600.0


def assigned_shards(layout: Layout, rank: int, world: int) -> list[int]:
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


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
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


def mark_ready(journal: Journal, rank: int) -> None:
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
