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
from auto_round.output.folders import PARTIAL
from auto_round.run.folders import missing_bytes
from auto_round.run.model_free.driver import JOURNAL
from auto_round.run.model_free.workers import Peers

FOLDER = Path(PARTIAL, JOURNAL)
READY = "ready-"


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_every_file_has_one_owner(world: int, tmp_path: Path) -> None:
    sizes = (5, 9, 1, 7, 7, 3)
    shares = [Peers(tmp_path, rank, world).share(sizes) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(6))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 9


def test_failures_are_heard(tmp_path: Path) -> None:
    first, third = Peers(tmp_path, 0, 4), Peers(tmp_path, 3, 4)
    first.check()
    third.signal_failure(ValueError("no disk"))
    with pytest.raises(AutoRoundError, match="process 3 gave up: ValueError: no disk"):
        first.check()
    again = Peers(tmp_path, 0, 4)
    again.check()  # of an earlier run
    third.signal_failure(ValueError("again"))
    os.utime(tmp_path / "failed-00003", ns=(1, 1))
    with pytest.raises(AutoRoundError, match="again"):
        again.check()


def test_waiting_ends(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 0, 2)
    peers.wait(lambda: True, "nothing")
    with pytest.raises(OutputError, match="nothing happened for 0 s while waiting for the others"):
        peers.wait(lambda: False, "the others", timeout=0.01)


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
    assert (out / FOLDER / f"{READY}00001").is_file() and list((out / PARTIAL).glob("*.safetensors"))
    first, second = processes()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(first.quantize_and_save, out)
        time.sleep(2)
        assert not other.done() and not (out / "config.json").exists()
        second.quantize_and_save(out)
        other.result(60)
    assert (out / "report.json").is_file() and not (out / PARTIAL).exists()


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
    assert len(list((out / PARTIAL).glob("*.safetensors"))) > 2
    ready = out / FOLDER / f"{READY}00001"
    ready.unlink()
    first, second = processes()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second.quantize_and_save, out, resume=False, **several)
        time.sleep(2)
        early = ready.exists()  # it had nothing to do
        first.quantize_and_save(out, resume=False, **several)
        other.result(60)
    assert not early and (out / "report.json").is_file() and not (out / PARTIAL).exists()


def test_another_process_may_move_a_file_while_its_size_is_asked(processes: Callable[..., Any], tmp_path: Path) -> None:
    job = processes()[0].plan()
    before = missing_bytes(job, tmp_path)
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "1.partial").write_bytes(bytes(70_000))
    (tmp_path / PARTIAL / "2.partial").symlink_to("moved")
    assert before - 90_000 < missing_bytes(job, tmp_path) <= before - 70_000
