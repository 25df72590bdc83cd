"""Parallel model-free work: threads within a memory limit, output files, and processes that share a folder."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from auto_round.errors import AutoRoundError, OutputError, VerifyError
from auto_round.files import bytes_of, file_sha256, write_text
from auto_round.logger import logger
from auto_round.output.writer import KEEP, NEW, PartialFile, damaged_error
from auto_round.run.journal_files import read_checked, write_checked
from auto_round.run.model_free.units import Shard, Unit
from auto_round.threads import split_torch_threads

SYNC_BYTES = 128 << 20
"""Written bytes after which they are synced to disk and recorded."""
_CHUNK_BYTES = 1 << 20  # of a file that is read back at a time
_POLL_S = 0.05
_TIMEOUT_S = 3600.0
_FAILED = "failed-"

Chunk = tuple[str, int, torch.Tensor]
"""(stored tensor, offset in it, bytes to write there)."""
Writes = list[tuple[str, int, int, int]]
"""(stored tensor, offset in the file, bytes, CRC-32) of each write."""


def run_units(
    units: Iterable[Unit], work: Callable[[Unit], None], workers: int, memory: int,
    before: Callable[[Unit], None] = lambda unit: None,
) -> None:  # fmt: skip
    """Call `work` on every unit in threads, `workers` at a time, started in order.

    Args:
        memory: limit in bytes of all running units together; a larger unit runs alone.
        before: called in this thread before a unit is started.

    Raises the first error of `work`, after the running units have ended; no further unit is started.
    """
    free = threading.Condition()
    running: list[int] = []
    failed: list[BaseException] = []

    def guarded(unit: Unit) -> None:
        try:
            if not failed:
                work(unit)
        except BaseException as error:
            failed.append(error)
        finally:
            with free:
                running.remove(unit.memory)
                free.notify()

    def fits(unit: Unit) -> bool:
        return not running or (len(running) < 2 * workers and sum(running) + unit.memory <= memory)

    with split_torch_threads(workers), ThreadPoolExecutor(workers, "model-free") as pool:
        try:
            for unit in units:
                with free:
                    free.wait_for(partial(fits, unit))
                    running.append(unit.memory)
                if failed:
                    break
                before(unit)
                pool.submit(guarded, unit)
        except BaseException as error:
            failed.append(error)
    if failed:
        raise failed[0]


class ShardFile:
    """One output file, written at planned offsets in any order, under a temporary name until it is complete.

    It is read back while it is written, from the front. What was read is dropped from the page cache, so that its pages
    are reused for writing: new pages can cost ten times as much as the write itself.

    Args:
        folder: of the file.
        record: tells another run what is on disk: `Writes` by unit, digests of layers, the SHA-256 of a complete file.
        compare: compare what is read back with what was written.
        replace: start anew when the file of an earlier run is damaged.

    Attributes:
        missing: units that an earlier run has not written.

    Raises OutputError when the complete file of an earlier run is not what was recorded.
    """

    def __init__(self, shard: Shard, folder: Path, record: Path, compare: bool, replace: bool) -> None:
        self.shard, self._compare, self._record, self._final = shard, compare, record, folder / shard.name
        path = folder / f".{shard.name}.partial"
        found = self._final if self._final.is_file() else path
        usable = found.is_file() and found.stat().st_size == shard.size
        state, sha = None, None
        try:
            state = read_checked(record) if usable else None
            sha = state and state["sha256"]
            if sha and file_sha256(found) != sha:
                raise damaged_error(found, "its bytes are not those that were written", "output")
        except OutputError as error:
            if not replace:
                raise
            logger.warning("starting anew: %s", error)
            state, sha = None, None
        self._state = state or {"units": {}, "digests": {}, "sha256": None}
        self._file = PartialFile(path, self._final, KEEP if self._state["units"] else NEW)
        self.missing = [] if sha else [unit for unit in shard.units if str(unit) not in self._state["units"]]
        if sha and found == path:  # killed before it was renamed
            self._file.seal(self._final, sha)
        self._unwritten, self._lock = len(self.missing), threading.Lock()
        self._pending: dict[int, Writes] = {}
        self._back: BinaryIO | None = None
        self._at, self._sha = 0, hashlib.sha256()
        self._waiting: dict[int, tuple[str, int, int]] = {}  # by offset: (tensor, bytes, CRC-32) to be read back

    def write(self, unit: int, chunks: Iterable[Chunk]) -> dict[int, Writes]:
        """Write what a unit makes; may be called by several threads. Returns the writes to commit now, by unit."""
        with self._lock:
            if self._back is None:
                self._file.truncate(self.shard.size)
                if not self._state["units"]:
                    self._file.write(0, self.shard.header, "its header")
                self._back = open(self._file.path, "rb", buffering=0)
                header = ("__metadata__", 0, len(self.shard.header), zlib.crc32(self.shard.header))
                for writes in ([header], *self._state["units"].values()):
                    self._await(writes)
        writes = []
        for name, start, tensor in chunks:
            view, offset = bytes_of(tensor), self.shard.offsets[name] + start
            writes.append((name, offset, len(view), self._file.write(offset, view, f"tensor {name!r}")))
        with self._lock:
            self._pending[unit] = writes
            self._unwritten -= 1
            if self._unwritten and sum(size for one in self._pending.values() for _, _, size, _ in one) < SYNC_BYTES:
                return {}
            pending, self._pending = self._pending, {}
            return pending

    def commit(self, pending: Mapping[int, Writes], digests: Mapping[str, str]) -> bool:
        """Sync what was written and record it; rename a complete file. Returns whether it is complete.

        Raises VerifyError when a byte differs from what was written.
        """
        self._file.sync()
        for writes in pending.values():
            self._await(writes)
        self._read_back()
        self._state["units"] |= {str(unit): writes for unit, writes in pending.items()}
        self._state["digests"] |= digests
        whole = len(self._state["units"]) == len(self.shard.units)
        if whole:
            if self._at != self.shard.size:
                raise VerifyError(f"{self._file.path}: bytes from {self._at} on were never written; report this")
            self._state |= {"units": {}, "sha256": self._sha.hexdigest()}
        write_checked(self._record, self._state)
        if whole:
            self.close()
            self._file.seal(self._final, self._state["sha256"])
        return whole

    def _await(self, writes: Iterable[Sequence[Any]]) -> None:
        self._waiting |= {offset: (name, size, crc) for name, offset, size, crc in writes if size}

    def _read_back(self) -> None:
        """Read on until the first gap."""
        assert self._back is not None
        begin = self._at
        while (write := self._waiting.pop(self._at, None)) is not None:
            name, size, wanted = write
            found, end = 0, self._at + size
            while self._at < end and (part := self._back.read(min(end - self._at, _CHUNK_BYTES))):
                self._sha.update(part)
                found = zlib.crc32(part, found) if self._compare else wanted
                self._at += len(part)
            if found != wanted or self._at != end:
                what = f"{self._file.path}: tensor {name}"
                raise VerifyError(f"{what} is not what was written; do not use it, and report this")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._back.fileno(), begin, self._at - begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._file.close()
        if self._back is not None:
            self._back.close()


class Peers:
    """The processes of one run, which share a folder and signal by files in it. Failures of earlier runs are ignored.

    Attributes:
        begun: a lock that process 0 holds as soon as the others may work on the files.
        ready: signals of the other processes to process 0 that they need the folder no more.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world, self.begun = folder, rank, world, folder / "begun"
        self.ready = [folder / f"ready-{other:05d}" for other in range(1, world)]
        self._earlier = self._failures()

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Output files of this process: the largest first, each assigned to the process with the fewest bytes."""
        loads, mine = [0] * self.world, []
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            lightest = loads.index(min(loads))
            loads[lightest] += sizes[index]
            mine += [index] if lightest == self.rank else []
        return sorted(mine)

    def signal_failure(self, error: BaseException) -> None:
        """Signal to the other processes that this one failed, so that they end too."""
        with suppress(OSError, OutputError):  # the error may be a full disk
            if self.world > 1:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / f"{_FAILED}{self.rank:05d}", f"{type(error).__name__}: {error}\n")

    def _failures(self) -> dict[Path, int]:
        """Failure files of all processes with their times."""
        found = {}
        for file in self.folder.glob(f"{_FAILED}*"):
            with suppress(FileNotFoundError):  # the run is over
                found[file] = file.stat().st_mtime_ns
        return found

    def check(self) -> int:
        """A number that changes while some process writes. Raises AutoRoundError when another process failed."""
        for file, _ in sorted(self._failures().items() - self._earlier.items()):
            reason = file.read_text(encoding="utf-8").strip()
            raise AutoRoundError(f"process {int(file.name[len(_FAILED) :])} gave up: {reason}")
        try:
            paths = [path for folder in (self.folder, self.folder.parent) for path in folder.iterdir()]
            return sum(path.stat().st_size + path.stat().st_mtime_ns for path in paths)
        except OSError:  # the run is over, or has not begun
            return -1

    def wait(self, done: Callable[[], bool], what: str, timeout: float = _TIMEOUT_S) -> None:
        """Wait until `done`. Raises OutputError when no process does anything for `timeout` seconds."""
        last, since = self.check(), time.monotonic()
        while not done():
            time.sleep(_POLL_S)
            now = self.check()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > timeout:
                raise OutputError(
                    f"nothing happened for {timeout:.0f} s while waiting for {what}; run the command again"
                )
