from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from auto_round.errors import ConfigError, ModelError
from auto_round.modeling.files import folder as hub


def test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    assert hub.model_folder(tmp_path) == tmp_path == hub.model_folder(str(tmp_path))


def test_wrong_folders_never_ask_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    def asked(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(ModelError, match="did you mean 'smollm2'"):
        hub.model_folder(str(tmp_path / "smollm"))
    for wrong in ("./nothing", "a/b/c", "~/nothing-here", "", "-x/y", tmp_path / "missing"):
        with pytest.raises(ModelError, match="no model folder"):
            hub.model_folder(wrong)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ModelError, match="is a file"):
        hub.model_folder(str(file))


def test_only_needed_files_are_fetched(tmp_path: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        seen.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.model_folder("org/name") == tmp_path
    assert seen["repo"] == "org/name"
    assert {"*.bin", "*.py", "*.pt", "*.gguf", "original/*", "onnx/*"} <= set(seen["ignore_patterns"])
    files = [
        "README.md", "LICENSE", "additional_chat_templates/tool.jinja", "assets/sign.png", "tokenizer.model",
        "model.safetensors", "original/model.safetensors", "run.py", "training_args.bin", "w.bin",
    ]  # fmt: skip
    assert fetched(files, seen) == files[:6]
    hub.model_folder("org/name", trust_remote_code=True)
    assert fetched(files, seen) == [*files[:6], "run.py"]
    (tmp_path / "config.json").write_text("{}")
    hub.model_folder("org/name", allow_pickle=True)
    assert "pytorch_model.bin" in fetched(["pytorch_model.bin", "pytorch_model-1.bin"], seen)


def fetched(files: list[str], options: dict[str, Any]) -> list[str]:
    """What the hub's client would bring, in the given order."""
    from huggingface_hub.utils import filter_repo_objects

    return list(filter_repo_objects(files, ignore_patterns=options["ignore_patterns"]))


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: Any) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def down(*_args: Any, **_kwargs: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", down)
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        hub.model_folder("org/name")
    assert "\n" not in str(caught.value)


def test_modelscope(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        hub.model_folder("org/name", platform="model_scope")
    fake = types.ModuleType("modelscope")
    fake.snapshot_download = lambda repo, allow_patterns: str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert hub.model_folder("org/name", platform="model_scope") == tmp_path
    monkeypatch.setenv("AR_USE_MODELSCOPE", "1")
    assert hub.model_folder("org/name") == tmp_path
    with pytest.raises(ConfigError, match="platform='x'"):
        hub.model_folder("org/name", platform="x")
