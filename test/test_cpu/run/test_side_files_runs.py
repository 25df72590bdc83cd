"""What lies beside the weights after a run, regular and model-free."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round.errors import ModelError, VerifyError
from auto_round.output.verify import SAMPLE
from auto_round.run import finalize as finish

FLOWS = pytest.mark.parametrize("model_free", [False, True])
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def folder(packable_folder: Callable[..., str], tmp_path: Path) -> Path:
    """A tiny model with a tokenizer, a template beside it and keys that nobody knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    copy = tmp_path / "secret-place" / "tiny"
    shutil.copytree(packable_folder("llama"), copy)
    words = {f"w{i}": i for i in range(90)} | {"The": 90, "fox": 91, "def": 92, "<unk>": 93}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="w2")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (copy / "NEWS.md").write_text("news")
    (copy / "training_args.bin").write_bytes(b"pickle")
    (copy / "own.py").write_text("raise SystemExit")
    config = json.loads((copy / "config.json").read_text())
    config = {"zeta": {"b": 1, "a": 2}, "_name_or_path": str(copy), **config}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def saved(make: Callable[..., Any], folder: Path, out: Path, model_free: bool, **options: Any) -> Path:
    options = {"scheme": "W4A16", "group_size": 32, **options}
    if model_free:
        options |= {"model_free": True}
    else:
        options |= {"iters": 0, "disable_opt_rtn": True}
    make(str(folder), **options).quantize_and_save(out, format="auto_round")
    return out


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@FLOWS
def test_everything_comes_along(model_free: bool, make: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    out = saved(make, folder, tmp_path / "out", model_free)
    for name in ("NEWS.md", "additional_chat_templates/tool.jinja", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "own.py").exists() and not (out / "training_args.bin").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["verify"]["tokenizer"] is True
    assert "additional_chat_templates/tool.jinja" in report["small_files"]


def test_both_flows_write_one_config(make: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    one, other = (config_of(saved(make, folder, tmp_path / str(free), free)) for free in (False, True))
    for config in (one, other):
        config["quantization_config"] = {
            k: v for k, v in config["quantization_config"].items() if k not in ("iters", "enable_quanted_input")
        }
    assert one == other and list(one) == list(other)
    assert list(one)[0] == "zeta" and list(one["zeta"]) == ["b", "a"] and "_name_or_path" not in one
    assert one["rope_theta"] == one["rope_parameters"]["rope_theta"] and one["dtype"] == one["torch_dtype"]


def test_a_model_object_writes_both_spellings_too(
    make: Callable[..., Any], packable_model: Any, tmp_path: Path
) -> None:
    make(packable_model("llama"), iters=0, disable_opt_rtn=True).quantize_and_save(tmp_path / "out", format="fake")
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["dtype"] == config["torch_dtype"]
    assert config["architectures"] == ["LlamaForCausalLM"]


@FLOWS
def test_an_output_inside_the_models_folder(
    model_free: bool, make: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People run it where the model lies: what runs wrote there, and what this one writes, is no part of the model."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("AR_WORK_SPACE", raising=False)  # journals then lie in the model's folder too
    expected = {p.name for p in saved(make, folder, tmp_path / "out", model_free).iterdir()}
    for name in ("tmp_autoround", "deep/other", "tmp_autoround"):  # the last is replaced or found to be there already
        made = saved(make, folder, Path(name), model_free)
        assert {p.name for p in made.iterdir()} == expected
        assert not (made / "tmp_autoround").exists() and not (made / "deep").exists()


@FLOWS
@pytest.mark.parametrize("spoiled", ["vocabulary", "template", "broken"])
def test_a_tokenizer_that_says_something_else(
    spoiled: str, model_free: bool, make: Callable[..., Any], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    honest = finish.copy_side_files

    def dishonest(origin: Path, target: Path, trusted: bool) -> list[Path]:
        names = honest(origin, target, trusted)
        file = target / "tokenizer.json"
        if spoiled == "vocabulary":
            file.write_text(file.read_text().replace('"fox"', '"dog"'))
        elif spoiled == "broken":
            file.write_text("{")
        else:
            (target / "chat_template.jinja").write_text("other")
        return names

    monkeypatch.setattr(finish, "copy_side_files", dishonest)
    with pytest.raises(VerifyError, match="tokenizer gives other|AutoTokenizer opens, and its own does not"):
        saved(make, folder, tmp_path / "out", model_free)


@FLOWS
def test_a_source_without_a_tokenizer(model_free: bool, make: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    for file in [*folder.glob("*tok*"), *folder.glob("chat*")]:
        file.unlink()
    out = saved(make, folder, tmp_path / "out", model_free)
    assert json.loads((out / "report.json").read_text())["verify"]["tokenizer"] is False


@FLOWS
def test_a_link_that_leads_away_is_refused_first(
    model_free: bool, make: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ModelError, match="notes.txt is a link"):
        saved(make, folder, tmp_path / "out", model_free)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.safetensors"))


@FLOWS
def test_nothing_that_is_written_names_a_path(
    model_free: bool, make: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "secret-data" / "texts.jsonl"
    data.parent.mkdir()
    data.write_text("\n".join(json.dumps({"text": "The fox def w1 w2 w3 " * 30}) for _ in range(4)))
    options: dict[str, Any] = {"group_size": 32}
    if not model_free:
        options |= {"scheme": "W4A16", "iters": 1, "dataset": str(data), "nsamples": 2, "seqlen": 16}
        options |= {"disable_opt_rtn": False}
    ar = make(str(folder), **({"model_free": True, "scheme": "W4A16"} if model_free else {}), **options)
    ar.quantize_and_save(tmp_path / "out", format="auto_round")
    for file in (tmp_path / "out").rglob("*"):
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert "secret-" not in text and str(tmp_path) not in text, file.name
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == report["job"]["model"] == "tiny"


def test_the_sample_has_several_scripts() -> None:
    assert set("aл狐す여🦊") <= set(SAMPLE)
