"""Parallel model-free work: threads within a memory limit, writing shards, processes that share a folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from auto_round.errors import AutoRoundError, OutputError
from auto_round.files import write_text
from auto_round.run.model_free.journal import FAILED, READY, Journal
from auto_round.run.model_free.shards import FileCheck, Layout, ShardFile, WriteRecord
from auto_round.run.model_free.unit_processor import UnitProcessor
from auto_round.run.model_free.units import Unit
from auto_round.threads import split_torch_threads

SYNC_BYTES = 128 << 20
"""Written bytes after which they are synced to disk and journaled."""
_POLL_S = 0.05
_TIMEOUT_S = 3600.0


class MemorySemaphore:
    """Admits at most `count` tasks with at most `most` bytes together. A larger task runs alone."""

    def __init__(self, most: int, count: int) -> None:
        self.most, self.count, self._used, self._inside = most, count, 0, 0
        self._free = threading.Condition()

    def acquire(self, size: int) -> None:
        """Wait until a task of `size` bytes may run."""
        with self._free:
            self._free.wait_for(
                lambda: not self._inside or self._used + size <= self.most and self._inside < self.count
            )
            self._used += size
            self._inside += 1

    def release(self, size: int) -> None:
        """End a task of `size` bytes."""
        with self._free:
            self._used -= size
            self._inside -= 1
            self._free.notify_all()


def run_units(
    units: Sequence[Unit], work: Callable[[Unit], None], workers: int, memory: int,
    before: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Call `work` on every unit in threads, `workers` at a time, started in order.

    Args:
        memory: limit in bytes of all running units together.
        before: called in this thread with a unit's position before it is started.

    Raises the first error of `work`, after the running units have ended; no further unit is started.
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


@dataclass
class _OpenShard:
    """An unfinished output file: its missing units, and records of what is written.

    Attributes:
        chunk_records: what an earlier run wrote.
        pending: units that are written and not yet journaled.
    """

    missing: set[int]
    chunk_records: Sequence[WriteRecord]
    file: ShardFile | None = None
    check: FileCheck | None = None
    pending: dict[int, list[WriteRecord]] = field(default_factory=dict)
    pending_bytes: int = 0


class ShardRun:
    """Writes the units of some output files; the workers call `do`.

    Args:
        chosen: output files of this process.
        finished: called with the index and SHA-256 of each file that is complete under its final name.
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
        self._open: dict[int, _OpenShard] = {}
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1, "model-free-sync")
        self.todo: list[tuple[int, int]] = []
        for index in chosen:
            self._plan(index)

    def _plan(self, index: int) -> None:
        """Find the missing units of one output file from the journal and the files on disk."""
        shard = self.layout.shards[index]
        done = self.journal.done(index)
        final, partial = self.journal.whole / shard.name, self.journal.partial(index)
        missing = [unit for unit in shard.units if unit not in done]
        if not missing and final.is_file() and final.stat().st_size == shard.size:
            return
        if not partial.is_file() or partial.stat().st_size != shard.size:
            self.journal.forget(index)
            done, missing = {}, list(shard.units)
        self._open[index] = _OpenShard(set(missing), [record for unit in done.values() for record in unit])
        if not missing:  # killed between the last line of the journal and the rename
            self._file(index, resume=True).finish()
            return
        if done:
            self._file(index, resume=True)
        self.todo += [(index, unit) for unit in missing]

    def _file(self, index: int, resume: bool) -> ShardFile:
        state = self._open[index]
        if state.file is None:
            shard = self.layout.shards[index]
            final = self.journal.whole / shard.name
            state.file = ShardFile(shard, self.journal.partial(index), final, resume)
        return state.file

    def do(self, index: int, number: int) -> None:
        """Round and write one unit."""
        with self._lock:
            file = self._file(index, resume=False)
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
        """Sync the file, add a line to the journal, and rename a complete file; in one thread, so in order."""
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
        """Wait for the last syncs, then close all files. Their errors are raised only if the run went `well`; otherwise
        another error is being raised."""
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


# Several processes share a folder and communicate by files in it, without a network.


def assigned_shards(layout: Layout, rank: int, world: int) -> list[int]:
    """Output files of one process: the largest first, each assigned to the process with the fewest bytes."""
    loads = [0] * world
    mine: list[int] = []
    for index in sorted(range(len(layout.shards)), key=lambda i: (-layout.shards[i].size, i)):
        lightest = loads.index(min(loads))
        loads[lightest] += layout.shards[index].size
        if lightest == rank:
            mine.append(index)
    return sorted(mine)


def wait_until(done: Callable[[], bool], alive: Callable[[], object], what: str, timeout: float = _TIMEOUT_S) -> None:
    """Wait for other processes.

    Args:
        done: whether the wait is over.
        alive: returns a value that changes while they work.

    Raises:
        OutputError: `alive` did not change for `timeout` seconds.
    """
    last, since = alive(), time.monotonic()
    while not done():
        time.sleep(_POLL_S)
        now = alive()
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise OutputError(f"nothing happened for {timeout:.0f} s while waiting for {what}; run the command again")


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Signal to the other processes that this one failed; the folder is created if process 0 did not yet."""
    with suppress(OSError, OutputError):  # the error may be a full disk
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{FAILED}{rank:05d}", f"{type(error).__name__}: {error}\n")


def failures(folder: Path) -> frozenset[tuple[Path, int]]:
    """Failure files of all processes with their times. A run first collects those of earlier runs, to ignore them."""
    found = set()
    with suppress(FileNotFoundError):  # the run is over, or has not begun
        for name in os.listdir(folder):
            if name.startswith(FAILED):
                with suppress(FileNotFoundError):  # its process has restarted
                    found.add((folder / name, (folder / name).stat().st_mtime_ns))
    return frozenset(found)


def raise_failures(folder: Path, known: Collection[tuple[Path, int]] = ()) -> None:
    """Raise AutoRoundError for a failure of another process that is not `known`."""
    for file, _ in sorted(failures(folder) - set(known)):
        why = file.read_text(encoding="utf-8").strip()
        raise AutoRoundError(f"process {int(file.name[len(FAILED) :])} gave up: {why}")


def clear_failures(folder: Path, rank: int) -> None:
    """Remove this process's failure file of an earlier run."""
    (folder / f"{FAILED}{rank:05d}").unlink(missing_ok=True)


def mark_ready(journal: Journal, rank: int) -> None:
    """Signal to process 0, once, that this process has finished its files. Process 0 removes the journal only after all
    signals, because slower processes still need it.

    The order of the two checks matters: the manifest is removed before this file.
    """
    file = journal.folder / f"{READY}{rank:05d}"
    if not file.is_file() and journal.is_open:
        write_text(file, "")


def all_ready(journal: Journal, world: int) -> bool:
    """Whether all processes except 0 have finished their files."""
    return all((journal.folder / f"{READY}{rank:05d}").is_file() for rank in range(1, world))
