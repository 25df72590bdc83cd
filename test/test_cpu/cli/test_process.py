"""The command line as a process: help without heavy imports, and the module's entry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from auto_round import __version__
from auto_round.cli import main
from auto_round.cli.arguments import QUANTIZE_GROUPS

REPO = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "safetensors", "rich", "numpy")


def process(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "auto_round", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})


def test_help_is_complete() -> None:
    done = process("--help")
    assert done.returncode == 0
    for group in QUANTIZE_GROUPS:
        for flag in group.flags:
            assert flag.hidden or f"--{flag.dest}" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["eval", "--help"], ["list", "env"], ["m", "--tasks", "x"]])
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    code = (
        f"import sys; from auto_round.cli.main import run; run({words!r});"
        f"bad = [m for m in {HEAVY!r} if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    )
    done = process(code=code)
    assert done.returncode == 0, done.stderr


def test_version_and_exit_code() -> None:
    assert process("--version").stdout == f"auto-round {__version__}\n"
    done = process("m", "--no_such_flag")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["list", "recipe"], ["--version"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "auto_round", *words], stdout=write, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(write)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("words", [[], ["eval"], ["list"]])
def test_nothing_given_shows_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main.run(words) == 2
    assert "usage: auto-round" in capsys.readouterr().out


def test_help_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["help", "eval"]) == 0
    assert "--reference" in capsys.readouterr().out
