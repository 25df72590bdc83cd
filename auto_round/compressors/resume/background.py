"""Writing beside the next block's tuning."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread that does tasks in order. After one that fails it does no more; the error is raised by the next call
    here, once."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None
        self._failed = False
        self._error: BaseException | None = None

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Do this after the tasks before it."""
        self._raise()
        self._last = self._pool.submit(self._do, task)
        return self._last

    def wait(self, task: Future[None] | None = None) -> None:
        """Until this task is done, or all are."""
        last = self._last if task is None else task
        if last is not None:
            last.result()
        self._raise()

    def close(self) -> None:
        """Wait, and end the thread. An error is dropped: another one is on its way, or `wait` was called before."""
        self._pool.shutdown(wait=True)

    def _do(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException as error:
            self._failed, self._error = True, error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
