"""What lies beside the weights: report, model card, config, tokenizer; and the plan that is printed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import ConfigError


@pytest.fixture(scope="module")
def saved(packable_folder: Any, token_ids: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    from auto_round import AutoRound

    out = tmp_path_factory.mktemp("saved") / "out"
    ar = AutoRound(
        packable_folder("llama"), scheme="W4A16", group_size=32, iters=4, lr=0.02, dataset=token_ids, nsamples=8,
        seqlen=24, batch_size=2, gradient_accumulate_steps=2, layer_config={"k_proj": {"bits": 8}},
        ignore_layers="layers.0.mlp",
    )  # fmt: skip
    ar.quantize_and_save(out)
    return ar, out


def test_report(saved: Any, read_json: Any) -> None:
    ar, out = saved
    report = read_json(out, "report.json")
    assert report["format"] == "auto_round" and report["model"] == Path(ar.plan().model).name
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers) == 15
    assert layers["model.layers.1.self_attn.k_proj"]["scheme"] == "int8 g32 sym"
    assert layers["model.layers.0.mlp.up_proj"]["scheme"] == "full precision"
    assert layers["model.layers.1.self_attn.q_proj"]["bits"] == pytest.approx(4 + (16 + 4) / 32)
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(block["steps"] == 4 and block["loss_after"] <= block["loss_before"] for block in report["blocks"])
    assert report["job"]["settings"]["lr"] == 0.02 and report["job"]["settings"]["gradient_accumulate_steps"] == 2
    assert report["verify"]["passed"] and report["peak_rss_bytes"] > 10**7
    assert set(report["seconds"]) >= {"calibration", "quantization", "verify"}


def test_sums_and_sizes_are_those_of_the_files(saved: Any, read_json: Any) -> None:
    ar, out = saved
    report = read_json(out, "report.json")
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(report["files"]) == weights
    for name in weights:
        data = (out / name).read_bytes()
        assert report["files"][name] == hashlib.sha256(data).hexdigest() and report["sizes"][name] == len(data)


def test_the_plan_says_the_bytes(saved: Any, read_json: Any) -> None:
    ar, out = saved
    planned = ar.plan("auto_round").bytes_on_disk["auto_round"]
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert planned <= written <= planned + 10_000  # the header


def test_model_card(saved: Any) -> None:
    _, out = saved
    text = (out / "README.md").read_text()
    assert text.startswith("---\n") and "library_name: transformers" in text
    assert "int4 g32 sym" in text and "SignRound" in text and "AutoModelForCausalLM" in text
    assert "model.layers.1.self_attn.k_proj" in text and "int8 g32 sym" in text
    assert str(out.parent) not in text  # nothing of this machine


def test_side_files(saved: Any, read_json: Any, packable_folder: Any) -> None:
    _, out = saved
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "quantization_config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".part", ".tmp", ".bin", ".pt"))]
    source = Path(packable_folder("llama"))
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config, original = read_json(out, "config.json"), read_json(source, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["hidden_size"] == original["hidden_size"]
    assert "_name_or_path" not in config


def test_config(saved: Any, read_json: Any) -> None:
    _, out = saved
    config = read_json(out, "config.json")["quantization_config"]
    assert config["block_name_to_quantize"] == "model.layers" and config["data_type"] == "int"
    assert config["extra_config"]["model.layers.0.mlp.up_proj"] == {"bits": 16}
    assert config["extra_config"]["model.layers.0.self_attn.k_proj"] == {"bits": 8}
    assert config["iters"] == 4 and config["lr"] == 0.02


def test_a_model_object_brings_its_own_files(
    make: Callable[..., Any], packable_model: Any, byte_tokenizer: Any, tmp_path: Path, read_json: Any
) -> None:
    from transformers import AutoTokenizer

    ar = make(packable_model("gpt2"), tokenizer=byte_tokenizer, iters=0)
    model, folder = ar.quantize_and_save(tmp_path / "out")
    assert model is ar.model and folder == str(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == byte_tokenizer("ab")["input_ids"]
    assert read_json(folder, "config.json")["architectures"] == ["GPT2LMHeadModel"]
    with pytest.raises(ConfigError, match="quantize.. and then save_quantized"):
        ar.quantize_and_save(tmp_path / "again")


def test_the_plan_as_text(make: Callable[..., Any], tmp_path: Path) -> None:
    ar = make("llama", iters=50, ignore_layers="o_proj", layer_config={"v_proj": {"bits": 8}})
    text = ar.plan("auto_round,fake", output_dir=str(tmp_path / "out")).render()
    for words in (
        "W4A16G32 (int4 g32 sym)", "2 (model.layers.0 .. model.layers.1)", "12 quantized of 15", "iters=50",
        "100 in total", "format auto_round", "format fake", "compute            cpu, ",
        "model.layers.0.self_attn.o_proj: full",
        "int8 g32 sym", str(tmp_path / "out"),
    ):  # fmt: skip
        assert words in text, words
    assert "fused by vLLM" in text  # q and k with 4 bits, v with 8
    assert not (tmp_path / "out").exists()


def test_planning_reads_no_weight(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.modeling.files.safetensors import TensorFiles

    ar = make("mixtral", iters=5)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFiles, "read", refuse)
    assert "steps" in ar.plan("auto_round").render()


def test_what_quantize_returns(make: Callable[..., Any]) -> None:
    for model_kind in ("path", "again"):
        model, layers = make("llama", iters=0, layer_config={"k_proj": {"bits": 8}}).quantize()
        assert isinstance(model, torch.nn.Module), model_kind
        assert layers["model.layers.0.self_attn.k_proj"]["bits"] == 8
        assert layers["model.layers.0.self_attn.q_proj"]["bits"] == 4


def test_text_as_data_needs_the_tokenizer_and_the_default_set_needs_no_network(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_json: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make("llama", dataset=["some words that are long enough " * 5] * 4, nsamples=4, iters=0).quantize()
    make("llama", dataset=None, nsamples=4, iters=0).quantize_and_save(tmp_path / "out")
    assert "samples" in str(read_json(tmp_path / "out", "report.json")["job"]["data"])
