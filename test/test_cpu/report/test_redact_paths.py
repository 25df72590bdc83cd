"""Nothing of the machine in what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_round.calibration.data.spec import redact_dataset
from auto_round.report.run_report import redact_path, redact_paths


@pytest.mark.parametrize(("text", "wanted"), [
    ("/home/me/models/tiny", "tiny"), ("tensor a of /home/me/x.safetensors: NaN", "tensor a of x.safetensors: NaN"),
    ("see ~/data/t.jsonl, then", "see t.jsonl, then"), ("('/a/b/c')", "('c')"), ("../up/two", "two"),
    ("org/name", "org/name"), ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
    ("tokens/s and/or", "tokens/s and/or"), ("int4 g128 sym", "int4 g128 sym"), ("a / b", "a / b"), ("/", "/"),
    (r"re:.*\.experts\.\d+$", r"re:.*\.experts\.\d+$"),
])  # fmt: skip
def test_texts(text: str, wanted: str) -> None:
    assert redact_paths(text) == wanted
    assert redact_paths({text: [text, 3, None, {"k": text}]}) == {wanted: [wanted, 3, None, {"k": wanted}]}


def test_known_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my models" / "tiny"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert redact_paths(f"{folder}/model.safetensors", [str(folder)]) == "tiny/model.safetensors"
    assert redact_paths("of my models/tiny it is", ["my models/tiny"]) == "of tiny it is"
    assert redact_paths("org/name", ["org/name"]) == "org/name"


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").touch()
    assert (
        redact_dataset("data/a.jsonl:num=3,NeelNanda/pile-10k:split=train")
        == "a.jsonl:num=3,NeelNanda/pile-10k:split=train"
    )
    assert redact_dataset(f"{tmp_path}/data/a.jsonl") == "a.jsonl" and redact_dataset("pile") == "pile"
    assert redact_dataset("'/a/my, b.txt':num=2,C:/x/y.json") == "'my, b.txt':num=2,C:/x/y.json"
    assert redact_path("data") == "data" and redact_path("~/x/y") == "y"
