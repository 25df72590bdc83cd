"""Runs that are killed at any moment and resumed, and runs by several processes, give the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("crash_program.py")
ROOT = Path(__file__).resolve().parents[4]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks runs")


@pytest.fixture
def crash(
    resharded: Callable[..., Path], packable_folder: Callable[..., str], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    def start(family: str = "qwen3-moe", shards: int = 3, **values: Any) -> dict[str, Any]:
        kwargs = {"scheme": "W4A16", "group_size": 32, "parallelism": 2}
        given = {"model": str(resharded(packable_folder(family), shards)), "work": str(tmp_path), "kwargs": kwargs}
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AR_LOG_LEVEL": "ERROR"}
        done = subprocess.run(
            [sys.executable, str(PROGRAM), json.dumps(given | values)], capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert result["problems"] == [], done.stderr[-3000:]
        return result

    return start


def test_a_few_kills(crash: Callable[..., dict[str, Any]]) -> None:
    assert crash(kills=8)["calls"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_kills(crash: Callable[..., dict[str, Any]], seed: int) -> None:
    """Fifty each, two hundred in all."""
    crash(kills=50, seed=seed + 1)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes(crash: Callable[..., dict[str, Any]], count: int) -> None:
    crash(ranks=count, shards=5)
