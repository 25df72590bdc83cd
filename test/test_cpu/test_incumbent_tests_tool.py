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
    why = tool.listed_reason  # type: ignore[attr-defined]
    assert why(lists, "core/test_autoround.py::TestAutoRound::test_compressor")[0] == "later"
    assert why(lists, "schemes/test_auto_scheme.py::test_x[1]") == ("skip", "AutoScheme comes later")
    assert why(lists, "core/test_autoround.py::TestAutoRound::test_rtn") is None


def test_a_line_that_is_neither(tool: object, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("run a.py\nskip b.py\n")
    with pytest.raises(SystemExit, match="list:2: expected 'run FILE' or 'skip TEST reason'"):
        tool.read_lists(tmp_path / "list")  # type: ignore[attr-defined]


def test_internal_names_and_the_table(tool: object, tmp_path: Path) -> None:
    row = {"outcome": "passed", "absent": [], "reason": "", "replaced": ["accuracy"]}
    refusal = "auto_round.errors.UnsupportedError: nblocks=2: this variant is not available in this version; use none"
    rows = {
        "a.py::one": row,
        "a.py::two": {**row, "outcome": "failed", "reason": "ValueError: x | y"},
        "a.py::three": {**row, "outcome": "failed", "absent": ["auto_round.wrapper.x"]},
        "a.py::five": {**row, "outcome": "failed", "reason": refusal},
        "a.py::six": {**row, "outcome": "failed", "reason": "assert 6 == 9"},
        "a.py::seven": row,
        "b.py::four": {**row, "outcome": "failed"},
    }
    reasons = {"b.py": ("skip", "later"), "a.py::six": ("internal", "counts files"), "a.py::seven": ("later", "no")}
    lists = tool.Lists(("a.py", "c.py"), reasons)  # type: ignore[attr-defined]
    counts = tool.write_table(rows, lists, tmp_path / "table.md")  # type: ignore[attr-defined]
    assert counts == {"passed": 2, "failed": 1, "internal": 2, "later": 1, "skip": 1}
    text = (tmp_path / "table.md").read_text()
    assert "**2 of 3 pass** (66.7%)" in text and "where 2 of the tests" in text
    assert "| a.py | 2 | 1 | 2 | 1 | 0 |" in text and "| b.py | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| a.py::two | ValueError: x / y |" in text and "| a.py::three | uses auto_round.wrapper.x |" in text
    assert "Not run for this page: c.py." in text
    assert "| a.py::five | nblocks=2: this variant |" in text and "| a.py::six | counts files |" in text
