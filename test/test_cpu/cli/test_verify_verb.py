"""`auto-round verify FOLDER` against the digests in report.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound
from auto_round.cli import main
from auto_round.errors import ConfigError, OutputError, VerifyError


@pytest.fixture
def saved(packable_folder: Callable[..., str], token_ids: Any, tmp_path: Path) -> Path:
    ar = AutoRound(packable_folder("llama"), iters=0, disable_opt_rtn=True, group_size=32, dataset=token_ids)
    ar.quantize_and_save(tmp_path / "out")
    return tmp_path / "out"


def test_files_that_are_the_same_and_files_that_are_not(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"model.safetensors", "config.json", "quantization_config.json", "tokenizer.json"}
    report = json.loads((saved / "report.json").read_text())
    assert names <= {*report["files"], *report["small_files"]} and "lock" not in report["small_files"]
    capsys.readouterr()
    assert main.run(["verify", str(saved)]) == 0
    assert "files are unchanged" in capsys.readouterr().out
    for name in sorted(names):
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
        assert main.run(["verify", str(saved)]) == VerifyError.exit_code
        assert f"{saved / name} differs" in capsys.readouterr().err
        (saved / name).unlink()
        assert main.run(["verify", str(saved)]) == VerifyError.exit_code
        assert f"{saved / name} is missing" in capsys.readouterr().err
        (saved / name).write_bytes(data)
    assert main.run(["verify", str(saved)]) == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": {}}', '{"files": {"a": 3}}', '{"files": {"../a": "x"}}', "[" * 100_000]
)
def test_reports_that_say_nothing(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(text)
    assert main.run(["verify", str(tmp_path)]) == OutputError.exit_code
    assert "report.json" in capsys.readouterr().err


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["verify"]) == ConfigError.exit_code
    assert main.run(["verify", "--deep", str(tmp_path)]) == ConfigError.exit_code
    assert main.run(["verify", str(tmp_path)]) == OutputError.exit_code
    assert main.run(["verify", "--help"]) == 0
