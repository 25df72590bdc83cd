"""Workers that read, round and write at once, within a bound on memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from auto_round.compressors.model_free.units import Unit
from auto_round.threads import shared_threads


class Gate:
    """Lets work in as long as its memory fits below `most` bytes, and no more than `count` pieces of it. One that is
    too large for that runs alone."""

    def __init__(self, most: int, count: int) -> None:
        self.most, self.count, self._used, self._inside = most, count, 0, 0
        self._free = threading.Condition()

    def enter(self, size: int) -> None:
        """Wait for room."""
        with self._free:
            self._free.wait_for(
                lambda: not self._inside or self._used + size <= self.most and self._inside < self.count
            )
            self._used += size
            self._inside += 1

    def leave(self, size: int) -> None:
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
    gate = Gate(memory, 2 * workers)
    failed: list[BaseException] = []

    def guarded(unit: Unit) -> None:
        try:
            if not failed:
                work(unit)
        except BaseException as error:
            failed.append(error)
        finally:
            gate.leave(unit.memory)

    running: list[Future[None]] = []
    with shared_threads(workers), ThreadPoolExecutor(workers, "model-free") as pool:
        try:
            for position, unit in enumerate(units):
                gate.enter(unit.memory)
                if failed:
                    gate.leave(unit.memory)
                    break
                if before is not None:
                    before(position)
                running.append(pool.submit(guarded, unit))
        except BaseException as error:
            failed.append(error)
            raise
    if failed:
        raise failed[0]
