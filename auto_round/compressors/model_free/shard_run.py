"""The writing of one process's files: units in, marks journaled, files finished as their last unit arrives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from auto_round.compressors.model_free.file_check import FileCheck
from auto_round.compressors.model_free.journal import Journal
from auto_round.compressors.model_free.layout import Layout
from auto_round.compressors.model_free.rounding import Rounder
from auto_round.compressors.model_free.shard_file import Mark, ShardFile
from auto_round.compressors.model_free.units import Unit

SYNC_BYTES = 128 << 20
"""Written bytes after which they are brought to the disk and journaled."""


class _Open:
    """One output file in work. `marks`: what an earlier run wrote to it."""

    def __init__(self, missing: set[int], marks: Sequence[Mark]) -> None:
        self.missing, self.marks = missing, marks
        self.file: ShardFile | None = None
        self.check: FileCheck | None = None
        self.pending: dict[int, list[Mark]] = {}
        self.pending_bytes = 0


class ShardRun:
    """Writes the units of some output files; `do` is called by the workers.

    Args:
        chosen: output files of this process.
        finished: called with the index of each file that is whole under its final name, and its SHA-256.
        compare: read back what is written and compare it.
    """

    def __init__(
        self, layout: Layout, units: Sequence[Unit], rounder: Rounder, journal: Journal, chosen: Sequence[int],
        finished: Callable[[int, str], None], sync_bytes: int | None = None, compare: bool = True,
    ) -> None:  # fmt: skip
        self.layout, self.units, self.rounder, self.journal = layout, units, rounder, journal
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
        state = _Open(set(missing), [mark for unit in done.values() for mark in unit])
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
        marks = [file.put(piece) for piece in self.rounder.pieces(self.units[number])]
        with self._lock:
            state = self._open[index]
            state.pending[number] = marks
            state.pending_bytes += sum(mark[2] for mark in marks)
            state.missing.discard(number)
            whole = not state.missing
            if not whole and state.pending_bytes < self._sync_bytes:
                return
            pending, state.pending, state.pending_bytes = state.pending, {}, 0
            failed = next((f for f in self._syncs if f.done() and f.exception() is not None), None)
            self._syncs.append(self._syncer.submit(self._sync, index, pending, whole))
        if failed is not None:
            failed.result()

    def _sync(self, index: int, pending: Mapping[int, Sequence[Mark]], whole: bool) -> None:
        """In one thread, so in order: bytes to the disk, then the journal, then the final name."""
        state = self._open[index]
        file = state.file
        assert file is not None
        file.sync()
        layers = [name for unit in pending for name in self.units[unit].layers]
        self.journal.add(index, pending, {n: self.rounder.digests[n] for n in layers if n in self.rounder.digests})
        if state.check is None:
            state.check = FileCheck(file.partial, file.shard, self._compare)
            state.check.advance(state.marks)
        state.check.advance([mark for unit in pending.values() for mark in unit])
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
