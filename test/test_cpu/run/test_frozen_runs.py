"""Whole runs that only round write the very bytes they wrote when they were frozen (test/frozen_runs.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import frozen_runs
import pytest

EXACT = [name for name, frozen in frozen_runs.RUNS.items() if frozen.exact]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = frozen_runs.save_model(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder


@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_those_that_were_frozen(name: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    frozen = json.loads(frozen_runs.RECORD.read_text(encoding="utf-8"))
    found = frozen_runs.run(name, model(frozen_runs.RUNS[name].model), tmp_path / "out")
    assert frozen_runs.differences(frozen[name], found) == []


def test_every_exact_run_is_in_the_record() -> None:
    assert sorted(json.loads(frozen_runs.RECORD.read_text(encoding="utf-8"))) == sorted(EXACT)
