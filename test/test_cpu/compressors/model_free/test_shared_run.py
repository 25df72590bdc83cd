"""Who does which file, and what a process that gave up tells the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from auto_round import AutoRound
from auto_round.compressors.model_free.drive import _finished_bytes
from auto_round.compressors.model_free.journal import FOLDER
from auto_round.compressors.model_free.layout import Layout, Shard
from auto_round.compressors.model_free.shared_run import (
    clear_failures,
    failures,
    my_shards,
    raise_failures,
    say_failure,
    wait_until,
)
from auto_round.errors import AutoRoundError, OutputError


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_every_file_has_one_owner(world: int) -> None:
    layout = Layout(tuple(Shard(f"s{i}", b"", {}, size, ()) for i, size in enumerate((5, 9, 1, 7, 7, 3))))
    shares = [my_shards(layout, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(6))
    loads = [sum(layout.shards[i].size for i in share) for share in shares]
    assert max(loads) - min(loads) <= 9


def test_failures_are_heard(tmp_path: Path) -> None:
    raise_failures(tmp_path)
    say_failure(tmp_path, 3, ValueError("no disk"))
    with pytest.raises(AutoRoundError, match="process 3 gave up: ValueError: no disk"):
        raise_failures(tmp_path)
    earlier = failures(tmp_path)
    raise_failures(tmp_path, earlier)
    say_failure(tmp_path, 3, ValueError("again"))
    os.utime(tmp_path / "failed-00003", ns=(1, 1))
    with pytest.raises(AutoRoundError, match="again"):
        raise_failures(tmp_path, earlier)
    clear_failures(tmp_path, 3)
    raise_failures(tmp_path)


def test_waiting_ends() -> None:
    wait_until(lambda: True, lambda: 0, "nothing")
    with pytest.raises(OutputError, match="nothing happened for 0 s while waiting for the others"):
        wait_until(lambda: False, lambda: 0, "the others", longest=0.01)


def test_a_process_that_cannot_begin_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, packable_folder: Callable[..., str], tmp_path: Path
) -> None:
    """They waited ten minutes for it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("not ours")
    runs = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        runs.append(AutoRound(packable_folder("llama"), "W4A16", model_free=True, device_map="cpu"))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(runs[1].quantize_and_save, out)
        with pytest.raises(OutputError, match="is not empty"):
            runs[0].quantize_and_save(out)
        with pytest.raises(AutoRoundError, match="process 0 gave up: OutputError: output folder .* is not empty"):
            second.result(60)


def test_another_process_may_move_a_file_while_its_size_is_asked(tmp_path: Path) -> None:
    journal = tmp_path / FOLDER
    journal.mkdir()
    (journal / "00001.partial").write_bytes(bytes(70))
    (journal / "00002.partial").symlink_to("moved")
    assert _finished_bytes(tmp_path) == 70
