"""The tool that runs the incumbent's tests: its lists, and what a test's outcome counts as."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "path", [*sys.path, str(TOOLS)])
    import incumbent_tests

    return incumbent_tests


def test_the_committed_lists_can_be_read(tool: object) -> None:
    lists = tool.read_lists()  # type: ignore[attr-defined]
    assert "core/test_autoround.py" in lists.files and len(set(lists.files)) == len(lists.files)
    why = tool.why_not_counted  # type: ignore[attr-defined]
    assert "come" in why(lists, "core/test_autoround.py::TestAutoRound::test_compressor")
    assert why(lists, "schemes/test_auto_scheme.py::test_x[1]") == "AutoScheme comes later"
    assert why(lists, "core/test_autoround.py::TestAutoRound::test_rtn") is None


def test_a_line_that_is_neither(tool: object, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("run a.py\nskip b.py\n")
    with pytest.raises(SystemExit, match="list:2: expected 'run FILE' or 'skip TEST reason'"):
        tool.read_lists(tmp_path / "list")  # type: ignore[attr-defined]


def test_internal_names_and_the_table(tool: object, tmp_path: Path) -> None:
    row = {"outcome": "passed", "absent": [], "reason": "", "replaced": ["accuracy"]}
    rows = {
        "a.py::one": row,
        "a.py::two": {**row, "outcome": "failed", "reason": "ValueError: x | y"},
        "a.py::three": {**row, "outcome": "failed", "absent": ["auto_round.wrapper.x"]},
        "b.py::four": {**row, "outcome": "failed"},
    }
    lists = tool.Lists(("a.py",), {"b.py": "comes later"})  # type: ignore[attr-defined]
    counts = tool.write_table(rows, lists, tmp_path / "table.md")  # type: ignore[attr-defined]
    assert counts == {"passed": 1, "failed": 1, "internal": 1, "not counted": 1}
    text = (tmp_path / "table.md").read_text()
    assert "| a.py::one | passed | accuracy |" in text and "| a.py::two | failed | ValueError: x / y |" in text
    assert "| b.py::four | (failed) | comes later |" in text
