"""Who does which file, and what a process that gave up tells the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
