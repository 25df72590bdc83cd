"""`auto-round generate`, and `--backend` there and in `eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound
from auto_round.cli import main


@pytest.fixture(scope="module")
def folders(packable_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same small model dense, in our format, GPTQ's and AWQ's."""
    made = {"dense": packable_folder("llama")}
    for name, fmt in (("ours", "auto_round"), ("gptq", "auto_gptq"), ("awq", "auto_awq"), ("meta", "auto_gptq")):
        made[name] = str(tmp_path_factory.mktemp(name) / "out")
        ar = AutoRound(made["dense"], scheme="W4A16", group_size=32, iters=0, disable_opt_rtn=True)
        ar.quantize_and_save(made[name], format=fmt)
    # As GPTQModel writes it: it tells how it quantized.
    file = Path(made["meta"]) / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05}
    file.write_text(json.dumps(config))
    return made


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main.run([*words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("kind", ["dense", "ours", "gptq", "awq", "meta"])
def test_any_folder(kind: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", folders[kind], "--prompt", "hello", "--max_new_tokens", "5", "--device", "cpu"]
    code, out, err = run(capsys, *words)
    assert code == 0 and out.endswith("\n")
    last = err.strip().splitlines()[-1]
    assert last.startswith("prefill ") and "tokens/s" in last and "dense (" in last and "peak RAM" in last
    assert ("dense (15)" in last) is (kind == "dense")


def test_a_backend_by_name(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [folders["ours"], "--prompt", "hello", "--max_new_tokens", "3", "--device", "cpu", "--model_dtype", "fp32"]
    code, out, err = run(capsys, "generate", *words, "--backend", "torch")
    assert code == 0 and "layers run with auto_round:torch_zp (14), dense (1)" in err
    cases: list[tuple[str, str, int, str]] = [
        ("ours", "marlin", 7, "runs on cuda, not cpu"), ("ours", "marlinn", 2, "did you mean 'marlin'"),
        ("awq", "marlin", 7, "use backend='auto'"), ("dense", "torch", 2, "is not quantized"),
    ]  # fmt: skip
    for kind, name, want, says in cases:
        for verb in (["generate", "--prompt", "x"], ["eval"]):
            code, out, err = run(capsys, verb[0], folders[kind], *verb[1:], "--device", "cpu", "--backend", name)
            assert code == want and says in err, (kind, name, verb, err)


def test_evaluation_with_a_backend(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a small text to measure on, " * 8)
    more = ["--eval_text", str(tmp_path / "text.txt"), "--seqlen", "16", "--device", "cpu", "--max_windows", "2"]
    lines: dict[str, Any] = {}
    for kind in ("ours", "gptq"):
        for start in (["eval"], ["--eval"]):
            code, out, err = run(capsys, *start, folders[kind], *more, "--backend", "torch")
            assert code == 0 and "perplexity" in out, err
            lines[kind] = next(line for line in out.splitlines() if "perplexity" in line)
    assert lines["ours"] == lines["gptq"]


def test_what_is_missing_is_said(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate")[0] == 2
    assert "auto-round generate MODEL" in run(capsys, "generate", "--help")[1]
    code, _, err = run(capsys, "generate", folders["dense"])
    assert code == 2 and "no prompt was given" in err
    assert run(capsys, "generate", "--prompt", "x", "/no/such/folder")[0] == 3
    code, _, err = run(capsys, "generate", folders["dense"], "--prompt", "x", "--temperature", "0", "--device", "cpu")
    assert code == 2 and "temperature=0.0" in err
    assert run(capsys, "generate", folders["dense"], "--prompt", "x", "--bits", "4")[0] == 2
