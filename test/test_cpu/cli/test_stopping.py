"""Signals: one line that says where, an exit code, and the same command goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from auto_round.cli import main
from auto_round.run import blocks as blockwise


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A shell lets its background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_second_block(
    number: int, code: int, packable_folder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [packable_folder("llama"), "--output_dir", str(tmp_path / "out"), "--group_size", "32", "--iters", "1",
             "--nsamples", "4", "--seqlen", "32", "--device", "cpu", "--dataset", "builtin"]  # fmt: skip
    real = blockwise._quantize_block

    def signalled(index: int, *rest: Any) -> Any:
        if index == 1:
            os.kill(os.getpid(), number)
        return real(index, *rest)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_quantize_block", signalled)
        assert main.run(words) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("auto-round")]
    assert error == ["auto-round: error: stopped in block 2 of 2; run the same command again to resume"]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    # The first block is in the unfinished output; nothing is there that a loader would open.
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    assert main.run(words) == 0
    assert "resuming the interrupted run: 1 of 2 blocks are done" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()
