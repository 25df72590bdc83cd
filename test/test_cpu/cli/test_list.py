from __future__ import annotations

import pytest

from auto_round.cli import main
from auto_round.cli.list import text_table
from auto_round.recipes import RECIPES
from auto_round.schemes import PRESET_SCHEMES


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.run(list(words)) == 0
    return capsys.readouterr().out


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "list", "format")
    assert text == shown(capsys, "list", "formats") == shown(capsys, "--list", "format")
    row = next(line for line in text.splitlines() if line.startswith("auto_round "))
    assert "W4A16" in row


def test_schemes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "list", "scheme").splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} >= set(PRESET_SCHEMES)
    w4 = next(line for line in lines if line.startswith("W4A16 "))
    assert "int4 g128 sym" in w4 and "auto_round" in w4
    assert "gguf:q4_k_m" in next(line for line in lines if line.startswith("GGUF:Q4_K_M "))
    for preset in ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK"):
        assert "not yet" not in next(line for line in lines if line.startswith(f"{preset} "))
    assert "auto_round:llm_compressor, fake" in next(line for line in lines if line.startswith("INT8 "))


def test_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "list", "dataset")
    assert "NeelNanda/pile-10k" in text and "builtin" in text


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "list", "backends")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 150
    (torch_row,) = [line.split() for line in lines if line.startswith("auto_round:torch ")]
    assert torch_row[1:6] == ["cpu/cuda/xpu", "2,3,4,8", "FP32/FP16/BF16", "0", "gptq"] and "yes," in torch_row
    assert "use gptqmodel:exllamav2" in " ".join(text.split())


def test_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_OMP_NUM_THREADS", "2")
    text = shown(capsys, "list", "env")
    row = next(line for line in text.splitlines() if line.startswith("AR_OMP_NUM_THREADS"))
    assert row.split()[1] == "2"


def test_recipes_match_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "list", "recipe")
    table = {r: tuple(RECIPES[r].settings().values()) for r in RECIPES}
    assert table == {
        "default": (8, 200, 2048, 128, None, False),
        "best": (8, 1000, 2048, 512, None, False),
        "light": (8, 50, 2048, 128, 5e-3, False),
        "opt_rtn": (8, 0, 2048, 128, None, False),
        "rtn": (8, 0, 2048, 0, None, True),
    }
    assert all(r.command in text for r in RECIPES.values())


def test_table_wraps_its_last_column() -> None:
    text = text_table(("a", "b"), [("xx", "one two three four five six seven")], width=24)
    lines = text.splitlines()
    assert lines[0] == "a   b" and lines[1].startswith("xx  one two") and lines[2].startswith("    ")
    assert " ".join(line[4:].strip() for line in lines[1:]) == "one two three four five six seven"


@pytest.mark.parametrize("word", ["alg", "algs", "algorithm", "algorithms"])
def test_algorithms(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "list", word)
    assert "gptq" in text and "error feedback" in text
    assert "auto_round" in text and "awq" in text and "AWQ smoothing" in text
