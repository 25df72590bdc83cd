from __future__ import annotations

import json
from pathlib import Path

import pytest

from auto_round.config import plain
from auto_round.errors import OutputError
from auto_round.report.run_report import BlockRecord, LayerRecord, RunReport, versions, write_report


def make_report() -> RunReport:
    return RunReport(
        model="org/m",
        format="auto_round",
        job={"iters": 2, "where": Path("x"), "dims": (128, 128)},
        layers=(LayerRecord("l.q", "int4 g128 sym", 4.125), LayerRecord("l.k", "full precision", reason="17 inputs")),
        blocks=(BlockRecord("l", 0.5, float("nan"), 2, 1.5),),
        seconds={"total": 2.0},
        files={"model.safetensors": "ab" * 32},
        verify={"ok": True},
    )


def test_report_is_strict_json_with_a_schema_version(tmp_path: Path) -> None:
    path = write_report(tmp_path, make_report())
    assert path == tmp_path / "report.json"
    got = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert got["schema_version"] == 1
    assert got["blocks"][0] == {"name": "l", "loss_before": 0.5, "loss_after": "nan", "steps": 2, "seconds": 1.5}
    assert got["layers"][1]["reason"] == "17 inputs"
    assert got["job"] == {"iters": 2, "where": "x", "dims": [128, 128]}
    assert {"auto_round", "python", "torch", "transformers"} <= set(got["versions"])
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path, make_report())
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_plain() -> None:
    assert plain({1: {"b", "a"}, "x": float("-inf")}) == {"1": ["a", "b"], "x": "-inf"}
    assert all(isinstance(v, str) for v in versions().values())
