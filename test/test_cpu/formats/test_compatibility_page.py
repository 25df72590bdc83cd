"""The page of what opens where is what the recorded results say, and the comparison can fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import referees

    return referees


def test_the_page_is_up_to_date(tool: ModuleType) -> None:
    report = tool.referees_report
    results = {name: values for name, values in report.load(ROOT).items() if name in tool.PROGRAMS}
    text = report.markdown(results, tool.SCHEMES, report.writable_cells(tool.SCHEMES))
    assert (ROOT / "docs" / "compatibility.md").read_text() == text, "run: python tools/referees.py --render"


def test_what_must_open_opened_and_agreed(tool: ModuleType) -> None:
    for name, values in tool.referees_report.load(ROOT).items():
        program = tool.PROGRAMS[name]
        cells = {(c["format"], c["scheme"]): c for c in values["cells"]}
        for fmt, schemes in program.opens.items():
            for scheme in schemes:
                cell = cells[fmt, scheme]
                assert cell["opened"] and cell["difference"] <= tool.LIMIT < cell["effect"] * 10, (name, fmt, scheme)
        assert tool.failures(values["cells"], program.opens) == []


def test_every_program_has_its_files(tool: ModuleType) -> None:
    for program in tool.PROGRAMS.values():
        assert (program.folder / program.judge).is_file() and (program.folder / "requirements.txt").is_file()
        assert set(sum(program.opens.values(), ())) <= set(tool.SCHEMES)


def test_difference(tool: ModuleType) -> None:
    """Zero for the same logits and for their log-probabilities, which lack the last position; large for others."""
    logits = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert tool.difference(logits, logits) == 0
    assert tool.difference(logprobs[:, :-1], logits) < 1e-5
    moved = logits.copy()
    moved[1, 3] = logits[1, 2]
    assert tool.difference(moved, logits) > 0.5


def test_failures(tool: ModuleType) -> None:
    row = {"format": "f", "scheme": "s", "opened": True, "difference": 1e-3}
    must = {"f": ("s",)}
    assert tool.failures([row], must) == []
    assert tool.failures([{**row, "difference": float("nan")}], must)
    assert tool.failures([{**row, "difference": 0.02}], {}) == ["f s: differs by 0.02"]
    closed = {**row, "opened": False, "reason": "no"}
    assert tool.failures([closed], must) == ["f s: not opened (no)"] and tool.failures([closed], {}) == []


def test_results_merge(tool: ModuleType, tmp_path: Path) -> None:
    report = tool.referees_report
    row = {"format": "f", "scheme": "s", "opened": False, "reason": "no", "dtype": "float32"}
    report.record(tmp_path, "p", "P 1", [row, {**row, "scheme": "t"}])
    report.record(tmp_path, "p", "P 2", [{**row, "reason": "still no"}])
    values = report.load(tmp_path)["p"]
    assert values["about"] == "P 2" and [c["reason"] for c in values["cells"]] == ["still no", "no"]
    text = report.markdown({"p": values}, {"s": {}, "t": {}}, {("s", "f"), ("t", "f")})
    assert text.count("**no program here opens it**") == 2 and "`still no`" in text
    assert json.loads((tmp_path / "docs" / "compatibility" / "p.json").read_text())["program"] == "p"
