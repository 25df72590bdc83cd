"""Who does which file, and what a process that gave up tells the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound
from auto_round.errors import AutoRoundError, OutputError
from auto_round.run.model_free import driver as drive
from auto_round.run.model_free.journal import FOLDER, READY
from auto_round.run.model_free.shards import Layout, Shard
from auto_round.run.model_free.workers import (
    assigned_shards,
    clear_failures,
    failures,
    raise_failures,
    wait_until,
    write_failure,
)


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_every_file_has_one_owner(world: int) -> None:
    layout = Layout(tuple(Shard(f"s{i}", b"", {}, size, ()) for i, size in enumerate((5, 9, 1, 7, 7, 3))))
    shares = [assigned_shards(layout, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(6))
    loads = [sum(layout.shards[i].size for i in share) for share in shares]
    assert max(loads) - min(loads) <= 9


def test_failures_are_heard(tmp_path: Path) -> None:
    raise_failures(tmp_path)
    write_failure(tmp_path, 3, ValueError("no disk"))
    with pytest.raises(AutoRoundError, match="process 3 gave up: ValueError: no disk"):
        raise_failures(tmp_path)
    earlier = failures(tmp_path)
    raise_failures(tmp_path, earlier)
    write_failure(tmp_path, 3, ValueError("again"))
    os.utime(tmp_path / "failed-00003", ns=(1, 1))
    with pytest.raises(AutoRoundError, match="again"):
        raise_failures(tmp_path, earlier)
    clear_failures(tmp_path, 3)
    raise_failures(tmp_path)


def test_waiting_ends() -> None:
    wait_until(lambda: True, lambda: 0, "nothing")
    with pytest.raises(OutputError, match="nothing happened for 0 s while waiting for the others"):
        wait_until(lambda: False, lambda: 0, "the others", timeout=0.01)


@pytest.fixture
def processes(
    monkeypatch: pytest.MonkeyPatch, packable_folder: Callable[..., str]
) -> Callable[[], tuple[AutoRound, AutoRound]]:
    """`processes()`: a run as two processes see it."""

    def make() -> tuple[AutoRound, AutoRound]:
        runs = []
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            runs.append(AutoRound(packable_folder("llama"), "W4A16", model_free=True, device_map="cpu"))
        return runs[0], runs[1]

    return make


def test_a_process_that_cannot_begin_ends_the_others(processes: Callable[..., Any], tmp_path: Path) -> None:
    """They waited ten minutes for it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("not ours")
    first, second = processes()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second.quantize_and_save, out)
        with pytest.raises(OutputError, match="is not empty"):
            first.quantize_and_save(out)
        with pytest.raises(AutoRoundError, match="process 0 gave up: OutputError: output folder .* is not empty"):
            other.result(60)


def test_a_slow_process_finds_the_run_that_it_is_part_of(
    processes: Callable[..., Any], check_fails: Any, tmp_path: Path
) -> None:
    """All files are written and only the end is missing: process 0 alone could finish and exit."""
    out = tmp_path / "out"

    with check_fails("the disk was removed"), ThreadPoolExecutor(1) as pool:
        first, second = processes()
        other = pool.submit(second.quantize_and_save, out)
        with pytest.raises(OutputError, match="the disk was removed"):
            first.quantize_and_save(out)
        with pytest.raises(AutoRoundError, match="process 0 gave up: OutputError: the disk was removed"):
            other.result(60)
    assert (out / FOLDER / f"{READY}00001").is_file() and list((out / FOLDER).glob("*.sha256"))
    first, second = processes()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(first.quantize_and_save, out)
        time.sleep(2)
        assert not other.done() and not (out / "config.json").exists()
        second.quantize_and_save(out)
        other.result(60)
    assert (out / "report.json").is_file() and not (out / FOLDER).exists()


@pytest.mark.timeout(120)
def test_nobody_works_on_what_process_0_is_about_to_throw_away(
    processes: Callable[..., Any], check_fails: Any, tmp_path: Path
) -> None:
    """With resume=False a quick process found the journal of a killed run, which says the same, and took it for this
    run's."""
    out, several = tmp_path / "out", {"max_shard_size": 60_000}

    with check_fails("killed"), ThreadPoolExecutor(1) as pool:
        first, second = processes()
        other = pool.submit(second.quantize_and_save, out, **several)
        with pytest.raises(OutputError, match="killed"):
            first.quantize_and_save(out, **several)
        with pytest.raises(AutoRoundError, match="process 0 gave up"):
            other.result(60)
    assert len(list((out / FOLDER).glob("*.sha256"))) > 2
    ready = out / FOLDER / f"{READY}00001"
    ready.unlink()
    first, second = processes()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second.quantize_and_save, out, resume=False, **several)
        time.sleep(2)
        early = ready.exists()  # it had nothing to do
        first.quantize_and_save(out, resume=False, **several)
        other.result(60)
    assert not early and (out / "report.json").is_file() and not (out / FOLDER).exists()


def test_another_process_may_move_a_file_while_its_size_is_asked(tmp_path: Path) -> None:
    journal = tmp_path / FOLDER
    journal.mkdir()
    (journal / "00001.partial").write_bytes(bytes(70))
    (journal / "00002.partial").symlink_to("moved")
    assert drive._finished_bytes(tmp_path) == 70
