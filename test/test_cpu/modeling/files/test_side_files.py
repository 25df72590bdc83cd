"""Which files beside the weights come along."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_round.errors import ModelError
from auto_round.modeling.files.folder import copy_side_files, side_files

TAKEN = (
    "LICENSE", "NOTICE.md", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja", "assets/deep/sign.png",
    "chat_template.jinja", "chat_templates/a.jinja", "generation_config.json", "merges.txt", "mergekit_config.yml",
    "pooling/config.json", "special.tiktoken", "spiece.model", "tokenizer.json", "trainer_state.json", "weird name",
)  # fmt: skip
LEFT = (
    ".git/config", ".gitattributes", ".cache/x.json", "README.md", "config.json", "report.json", "model.safetensors",
    "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
    "q.gguf", "tf_model.h5", "flax_model.msgpack", "model.safetensors.index.fp16.json", "quantization_config.json",
    "quantize_config.json", "hf_quant_config.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth",
    "training_args.bin", "modeling_own.py", "parts/layer.py", "original/params.json", "original/tokenizer.model",
    "onnx/config.json", "metal/model.bin", "checkpoint-10/config.json", "checkpoint-10/model.safetensors",
    "checkpoint-10/vocab.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "assets/w.pt",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*TAKEN, *LEFT):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


def names(folder: Path, trusted: bool = False) -> list[str]:
    return [path.as_posix() for path in side_files(folder, trusted)]


def test_everything_but_what_is_named(folder: Path) -> None:
    assert names(folder) == sorted(TAKEN)
    assert set(names(folder, trusted=True)) - set(TAKEN) == {"modeling_own.py", "parts/layer.py"}


def test_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    copy_side_files(folder, tmp_path / "out", trusted=False)
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == set(TAKEN) and (tmp_path / "out" / "weird name").read_text() == "weird name"


def test_an_output_inside_the_model_is_not_copied_into_itself(folder: Path) -> None:
    target = folder / "mine" / "out"
    target.mkdir(parents=True)
    (target / "vocab.json").write_text("{}")
    copy_side_files(folder, target, trusted=False)
    assert not (target / "mine").exists() and (target / "LICENSE").is_file()


def test_outputs_of_ours_are_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_WORK_SPACE", str(folder / "work"))
    for name, text in (
        ("made/report.json", '{"schema_version": 1, "format": "gguf:q4_0"}'), ("made/q.gguf", ""), ("made/card", ""),
        ("begun/.partial/x", ""), ("begun/vocab.json", ""), ("other/report.json", '{"format": 1}'),
        ("odd/report.json", "{"), ("work/resume/run.json", ""), ("ar_work_space/resume/run.json", ""),
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert names(folder) == sorted([*TAKEN, "other/report.json", "odd/report.json"])


def test_links(folder: Path, tmp_path: Path) -> None:
    (folder / "again").symlink_to(folder)
    (folder / "more").symlink_to(folder / "assets")
    (folder / "missing").symlink_to(folder / "nothing")
    assert names(folder) == sorted([*TAKEN, "more/deep/sign.png"])
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("key")
    (folder / "away").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="away is a link to"):
        names(folder)
    (folder / "away").unlink()
    (folder / "assets" / "key.txt").symlink_to(tmp_path / "secret" / "key")
    with pytest.raises(ModelError, match="key.txt is a link to"):
        names(folder)


def test_the_hubs_cache_is_links_to_blobs(tmp_path: Path) -> None:
    """Every file of a snapshot is one, in folders too; they are copied as files."""
    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / "0123"
    for name in ("LICENSE", "additional_chat_templates/tool.jinja"):
        blob = root / "blobs" / name.rpartition("/")[2]
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(name)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    copy_side_files(snapshot, tmp_path / "out", trusted=False)
    for name in ("LICENSE", "additional_chat_templates/tool.jinja"):
        copied = tmp_path / "out" / name
        assert copied.read_text() == name and not copied.is_symlink()
