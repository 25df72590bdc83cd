from __future__ import annotations

import io
import logging

import pytest

from auto_round.report import progress as module
from auto_round.report.progress import BarProgress, Progress, format_loss, make_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_kind_follows_the_stream() -> None:
    assert type(make_progress(stream=io.StringIO())) is Progress
    assert isinstance(make_progress(stream=Terminal()), BarProgress)


def test_log_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="auto_round"):
        progress = Progress("tuning")
        progress.start(4)
        progress.block("layers.0", 0.00123, 0.000456)
        progress.block("layers.1")
        progress.message("a fact")
        progress.finish()
    first, second, fact = (r.getMessage() for r in caplog.records)
    assert first.startswith("tuning 1/4 layers.0, loss 0.00123 → 0.000456, 0:30 left, peak RAM ")
    assert second.startswith("tuning 2/4 layers.1, 0:30 left")
    assert fact == "a fact"


def test_bar_shows_block_loss_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    with make_progress("tuning", screen) as progress:
        progress.start(2)
        progress.block("layers.0", 0.5, 0.25)
        progress.block("layers.1", 0.4, 0.2)
    shown = screen.getvalue()
    for part in ("tuning", "block 2/2", "layers.1", "loss 0.4 → 0.2", "0:00 left", "peak RAM", "100%"):
        assert part in shown


def test_bar_is_closed_after_an_error_and_twice() -> None:
    progress = BarProgress("x", Terminal())
    with pytest.raises(RuntimeError):
        with progress:
            progress.start(3)
            raise RuntimeError
    progress.finish()
    assert not progress._bar.live.is_started


def test_loss_text() -> None:
    assert format_loss(None, 0.5) == "0.5"
    assert format_loss(1.5e-7, 2e-9) == "1.5e-07 → 2e-09"
