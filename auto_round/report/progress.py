"""Show the progress of a run: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from auto_round.logger import logger
from auto_round.report.memory import format_peak_memory, format_seconds


class Progress:
    """Counts blocks, estimates the time left, and logs one line per block."""

    def __init__(self, title: str = "") -> None:
        self.title, self.total, self.done, self._done_before = title, 0, 0, 0
        self._loss: list[str] = []
        self._start = time.monotonic()

    def start(self, total_blocks: int, done: int = 0) -> None:
        """Begin a run of `total_blocks` blocks, of which `done` were finished earlier."""
        self.total, self.done, self._done_before, self._start = total_blocks, done, done, time.monotonic()
        self._loss = []

    def block(self, name: str, loss_before: float | None = None, loss_after: float | None = None) -> None:
        """The block `name` is done; losses are None when nothing was measured."""
        self.done += 1
        self._loss = [] if loss_after is None else [f"loss {format_loss(loss_before, loss_after)}"]
        self._show(name)

    def _show(self, name: str) -> None:
        logger.info(", ".join([f"{self.title} {self.done}/{self.total} {name}", *self.facts()]))

    def message(self, text: str) -> None:
        """Show what is being done now, or a single fact."""
        logger.info(text)

    def finish(self) -> None:
        """The run is over or was stopped. May be called again."""

    def facts(self) -> list[str]:
        """Loss of the last block, time left by the mean of the blocks so far, and peak memory, as texts."""
        facts = list(self._loss)
        if measured := self.done - self._done_before:
            seconds = (time.monotonic() - self._start) / measured * max(0, self.total - self.done)
            facts.append(f"{format_seconds(seconds)} left")
        return [*facts, f"peak {format_peak_memory()}"]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_error: object) -> None:
        self.finish()


class BarProgress(Progress):
    """A bar on the terminal's last line; log lines scroll above it."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        super().__init__(title)
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        # rich redirects sys.stderr, where log lines go, while the bar is shown.
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
            TextColumn("{task.fields[facts]}", markup=False), console=Console(file=stream or sys.stderr),
            refresh_per_second=4,
        )  # fmt: skip
        self._task: Any = None

    def start(self, total_blocks: int, done: int = 0) -> None:
        super().start(total_blocks, done)
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self.title, total=total_blocks, completed=done, facts=self._status())
        self._bar.start()

    def _show(self, name: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self.done, facts=self._status(name))

    def finish(self) -> None:
        self._bar.stop()

    def _status(self, *name: str) -> str:
        return "  ".join([f"block {self.done}/{self.total}", *name, *self.facts()])


def format_loss(before: float | None, after: float) -> str:
    """`1.23e-03 → 4.56e-04`, or the second alone."""
    return f"{after:.3g}" if before is None else f"{before:.3g} → {after:.3g}"


def make_progress(title: str = "quantizing", stream: TextIO | None = None) -> Progress:
    """A bar when `stream` (default: sys.stderr) is a terminal, log lines otherwise."""
    out = stream if stream is not None else sys.stderr
    return BarProgress(title, out) if getattr(out, "isatty", lambda: False)() else Progress(title)
