"""tools/language.py: which texts are searched, and what is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "language.py"


def report(root: Path) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, str(TOOL), str(root)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "auto_round" / "run").mkdir(parents=True)
    (tmp_path / "docs" / "adr").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# A title\n")
    return tmp_path


def test_a_clean_project_passes(project: Path) -> None:
    (project / "auto_round" / "a.py").write_text('"""Resume a run."""\n\nwalk = room = 1  # not a text\n')
    assert report(project) == (0, ["no forbidden phrase"])


def test_docstrings_comments_and_strings_are_searched(project: Path) -> None:
    (project / "auto_round" / "run" / "a.py").write_text(
        '"""First line.\n\nThe run goes on\nhere."""\n\n\n'
        "def f(n: int) -> str:\n"
        "    # The weights stay as it\n"
        "    # is, without a change.\n"
        '    return f"block {n} stays dense"\n'
    )
    status, lines = report(project)
    assert status == 1
    assert lines == [
        'auto_round/run/a.py:3: "goes on"; use: resume, continue',
        'auto_round/run/a.py:8: "as it is"; use: unchanged, as stored',
        'auto_round/run/a.py:10: "stays dense"; use: is left unquantized, stays unquantized',
    ]


def test_pages_are_searched_but_neither_decisions_nor_addresses(project: Path) -> None:
    (project / "docs" / "adr" / "0001-a.md").write_text("A walk.\n")
    (project / "docs" / "page.md").write_text("See [ADR 3](adr/0003-start-and-judge.md).\n\nNo Room here.\n")
    (project / "README.md").write_text("It is told.\n")
    status, lines = report(project)
    assert status == 1 and [line.split(";")[0] for line in lines] == ['README.md:1: "told"', 'docs/page.md:3: "Room"']


@pytest.mark.parametrize("text", ["bankrupt", "groom", "prone", "walker_of", "ask it as is", "a dense layer stays"])
def test_parts_of_other_words_are_allowed(project: Path, text: str) -> None:
    (project / "README.md").write_text(text + "\n")
    assert report(project)[0] == 0
