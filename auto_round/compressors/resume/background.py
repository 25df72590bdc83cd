"""Writing beside the next block's tuning, never more than one block behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread that does one task at a time; its errors are raised by the next call here."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Wait for the task before, then start this one."""
        self.wait()
        self._last = self._pool.submit(task)

    def wait(self) -> None:
        """Until nothing is under way. Raises what the last task raised, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait, and end the thread. An error of the last task is dropped: another one is on its way, or `wait` was
        called before."""
        self._pool.shutdown(wait=True)
