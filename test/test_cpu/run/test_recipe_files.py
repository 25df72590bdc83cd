"""Recipe files of whole runs: the same recipe gives the same bytes, in every flow, and tells nothing of the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from auto_round import AdamRoundConfig, AutoRound, QuantizationScheme, RTNConfig, SignRoundConfig
from auto_round.algorithms.gptq import GPTQConfig
from auto_round.calib_dataset import DATASETS, register_dataset
from auto_round.cli import main
from auto_round.config import QuantConfig, read_recipe
from auto_round.errors import ConfigError, Stopped
from auto_round.output.folders import inspect_folder
from auto_round.run import blocks

TEXTS = [" ".join(f"w{i}x{j}" for j in range(40)) for i in range(30)]
DATA = ["--nsamples", "4", "--seqlen", "24", "--batch_size", "2", "--group_size", "32"]


@pytest.fixture(autouse=True)
def _space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the reports, which tell times and memory."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != "report.json"}


# (command, flags): each is run with flags, and again with the model and the recipe alone.
RUNS: dict[str, tuple[Any, str]] = {
    "tuned": (main.run, "--iters 2 --lr 0.02 --bits 2 --seed 7 --asym --ignore_layers q_proj --device_map cpu"),
    "adam-kv": (main.run, "--iters 2 --adam --static_kv_dtype fp8 --model_dtype fp32"),
    "search": (main.run_opt_rtn, "--layer_config {k_proj:{bits:8},down_proj:{scheme:W8A16,sym:false}}"),
    "two-formats": (main.run_opt_rtn, "--format auto_round,fake --quant_lm_head"),
    "model-free": (main.run_rtn, "--max_shard_size 40KB --to_quant_block_names model.layers.0"),
    "regular-rtn": (main.run_rtn, "--disable_model_free --max_shard_size 40KB"),
    "gptq": (main.run, "--algorithm gptq --iters 0"),
    "mixed-preset": (main.run_rtn, "--scheme W4A16_MIXED"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_recipe_gives_the_same_bytes(name: str, packable_folder: Callable[..., str], tmp_path: Path) -> None:
    command, flags = RUNS[name]
    model, out, again = packable_folder("llama"), tmp_path / "out", tmp_path / "again"
    assert command([model, *DATA, *flags.split(), "--output_dir", str(out)]) == 0
    recipes = sorted(out.rglob("recipe.yaml"))
    assert len(recipes) == (2 if name == "two-formats" else 1)
    assert main.run(["--model", model, "--recipe", str(recipes[0]), "--output_dir", str(again)]) == 0
    assert tree(again) == tree(out)
    AutoRound.from_recipe(model, recipes[-1].parent).quantize_and_save(tmp_path / "python")
    assert tree(tmp_path / "python") == tree(out)


@pytest.mark.parametrize("flags", ["--format gguf:q4_k_m --iters 1", "--scheme GGUF:Q4_0 --iters 0"])
def test_gguf_files(flags: str, gguf_folder: Callable[..., str], tmp_path: Path) -> None:
    data = ["--nsamples", "4", "--seqlen", "24", "--batch_size", "2"]
    model, out, again = gguf_folder("llama"), tmp_path / "out", tmp_path / "again"
    assert main.run([model, *data, *flags.split(), "--output_dir", str(out)]) == 0
    assert main.run([model, "--recipe", str(out), "--output_dir", str(again)]) == 0
    assert tree(again) == tree(out) and len(list(out.glob("*.gguf"))) == 1


def test_a_resumed_run_writes_the_recipe_of_one_that_was_not_stopped(
    packable_folder: Callable[..., str], tmp_path: Path, stop_at: Any
) -> None:
    model = packable_folder("llama")
    given: dict[str, Any] = {"iters": 1, "nsamples": 4, "seqlen": 24, "group_size": 32}
    AutoRound(model, **given).quantize_and_save(tmp_path / "whole")
    with pytest.raises(Stopped), stop_at(blocks, "_quantize_block", 2):
        AutoRound(model, **given).quantize_and_save(tmp_path / "out")
    AutoRound(model, low_gpu_mem_usage=True, verify=False, **given).quantize_and_save(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_dry_run_writes_what_the_run_writes(packable_folder: Callable[..., str], tmp_path: Path) -> None:
    model, file, out = packable_folder("llama"), tmp_path / "my.yaml", tmp_path / "out"
    words = [model, "--iters", "0", "--disable_opt_rtn", "--group_size", "32"]
    assert main.run([*words, "--dry_run", "--save_recipe", str(file), "--output_dir", str(out)]) == 0
    assert not out.exists()
    assert main.run([*words, "--output_dir", str(out)]) == 0
    assert (out / "recipe.yaml").read_text() == file.read_text()
    assert AutoRound(model, iters=0, disable_opt_rtn=True, group_size=32).recipe().tuning.iters == 0


def test_flags_override_the_file(
    packable_folder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file, out = packable_folder("llama"), tmp_path / "my.yaml", tmp_path / "out"
    file.write_text("version: 1\ntuning: {iters: 0, disable_opt_rtn: true}\nweights: {bits: 3, group_size: 32}\n")
    assert main.run([model, "--recipe", str(file), "--bits", "8", "--output_dir", str(out)]) == 0
    assert f"recipe {file} is used, but for bits=8 instead of 3" in capsys.readouterr().err
    weights = read_recipe(out).weights
    assert (weights.bits, weights.group_size) == (8, 32)
    assert AutoRound.from_recipe(model, file, algorithm=SignRoundConfig(iters=3, bits=2)).iters == 3
    gptq = AutoRound(model, algorithm="gptq", iters=0).recipe()
    assert AutoRound.from_recipe(model, gptq, algorithm="rtn").settings.gptq is None
    assert main.run([model, "--recipe", str(file), "--algorithm", "auto_round", "--dry_run"]) == 0
    assert "iters=200" in capsys.readouterr().out


def test_mode_that_was_only_offered_is_left_where_more_is_asked(packable_folder: Callable[..., str]) -> None:
    config = QuantConfig.from_dict(
        {"version": 1, "tuning": {"model_free": "auto", "iters": 0, "disable_opt_rtn": True}}
    )
    model = packable_folder("llama")
    assert AutoRound.from_recipe(model, config, group_size=32).model_free
    ar = AutoRound.from_recipe(model, config, group_size=32, iters=3, nsamples=4)
    assert not ar.model_free and ar.iters == 3


@pytest.mark.parametrize(
    "given",
    [
        {"alg_configs": SignRoundConfig(iters=3, momentum=0.5, bits=2)},
        {"alg_configs": AdamRoundConfig(iters=3, lr=0.5), "disable_opt_rtn": True},
        {"alg_configs": RTNConfig(disable_opt_rtn=True)},
        {"alg_configs": "rtn"},
        {"adam": True, "iters": 4, "bs": 2, "gradient_accumulate_steps": 3},
        {"scheme": QuantizationScheme(bits=3, group_size=32), "scale_dtype": torch.bfloat16},
        {"scheme": {"bits": 8, "group_size": 64}, "layer_config": {"k_proj": QuantizationScheme(bits=4)}},
        {"layer_config": "{k_proj:{bits:8}}", "ignore_layers": "q_proj;v_proj", "format": ["auto_round", "fake"]},
        {"model_dtype": torch.bfloat16, "device_map": torch.device("cpu"), "max_memory": {"cpu": "8GB"}},
        {"enable_torch_compile": 1, "amp": 0, "group_size": "64"},
        {"alg_configs": GPTQConfig(damping=0.5, bits=3), "iters": 2}, {"algorithm": "gptq", "iters": 0},
        {"model_free": True}, {"model_free": "auto", "iters": 0},
    ],
)  # fmt: skip
def test_objects_and_spellings_become_plain_values(given: dict[str, Any], packable_folder: Callable[..., str]) -> None:
    model = packable_folder("llama")
    one = AutoRound(model, **given)
    text = one.settings.config.to_yaml()
    other = AutoRound.from_recipe(model, QuantConfig.from_yaml(text), max_memory=given.get("max_memory"))
    assert replace(other.settings, layer_config=one.settings.layer_config) == one.settings
    assert other.settings.config.to_yaml() == text and other.model_free == one.model_free
    assert one.layer_config == other.layer_config


def test_layer_config_of_a_run_can_be_given_back(packable_folder: Callable[..., str]) -> None:
    model = packable_folder("llama")
    again = AutoRound(model, layer_config=AutoRound(model, bits=8).layer_config)
    recipe = QuantConfig.from_yaml(again.recipe().to_yaml())
    assert AutoRound.from_recipe(model, recipe).layer_config == again.layer_config


def test_nothing_of_the_machine_is_in_it(packable_folder: Callable[..., str], tmp_path: Path) -> None:
    model = packable_folder("llama")
    file = tmp_path / "my texts" / "a.txt"
    file.parent.mkdir()
    file.write_text("\n".join(TEXTS))
    given: dict[str, Any] = {"iters": 0, "nsamples": 4, "seqlen": 24, "group_size": 32, "device_map": "cpu"}
    ar = AutoRound(model, dataset=f"'{file}':num=3,mbpp", **given)
    text = ar.recipe().to_yaml()
    assert str(tmp_path) not in text and "my texts" not in text and str(Path(model).parent) not in text
    values = yaml.safe_load(text)
    assert values["model"] == Path(model).name and values["memory"] == {"device_map": "cpu"}
    assert values["data"]["dataset"] == "'a.txt':num=3,mbpp"
    assert values["supply"] == {"dataset": "local files a.txt"}
    ar = AutoRound(model, dataset=str(file), **given)
    ar.quantize_and_save(tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot hold dataset .local files a.txt.; give --dataset beside it"):
        AutoRound.from_recipe(model, tmp_path / "out")
    AutoRound.from_recipe(model, tmp_path / "out", dataset=str(file)).quantize_and_save(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_data_that_a_recipe_cannot_hold(
    packable_folder: Callable[..., str], token_ids: list[torch.Tensor], dataloader: Any,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    model = packable_folder("llama")
    monkeypatch.delitem(DATASETS, "of_a_test", raising=False)

    @register_dataset("of_a_test", description="texts")
    def _texts() -> Any:
        return iter(TEXTS)

    for dataset, words in [
        (token_ids, "list of 8 samples, given in Python"),
        (dataloader, "DataLoader, given in Python"),
        ("of_a_test:num=3", "datasets registered by the program: of_a_test"),
    ]:
        assert AutoRound(model, dataset=dataset, iters=0).recipe().supply == {"dataset": words}
        assert not AutoRound(model, dataset=dataset, iters=0, disable_opt_rtn=True).recipe().supply
    monkeypatch.delitem(DATASETS, "of_a_test")
    monkeypatch.setenv("AR_ENABLE_UNIFY_MOE_INPUT_SCALE", "1")
    ar = AutoRound(model, dataset=token_ids, iters=0)
    ar.save_recipe(tmp_path / "r.yaml")
    assert "cannot hold list of 8 samples, given in Python: dataset must be given again" in caplog.text
    assert ar.recipe().environment == {"AR_ENABLE_UNIFY_MOE_INPUT_SCALE": "1"}
    assert "# What stands under supply could not be written here" in (tmp_path / "r.yaml").read_text()


def test_an_importance_file_must_be_given_again(gguf_folder: Callable[..., str], tmp_path: Path) -> None:
    model, file = gguf_folder("llama"), tmp_path / "importance.gguf"
    given: dict[str, Any] = {"scheme": "GGUF:Q4_K_M", "nsamples": 4, "seqlen": 24, "iters": 0}
    AutoRound(model, save_imatrix=file, **given).quantize_and_save(tmp_path / "first")
    ar = AutoRound(model, imatrix=file, **given)
    assert ar.recipe().supply == {"imatrix": "importance file importance.gguf"}
    with pytest.raises(ConfigError, match="give --imatrix beside it"):
        AutoRound.from_recipe(model, ar.recipe())
    assert AutoRound.from_recipe(model, ar.recipe(), imatrix=file).settings == ar.settings


def test_permissions_are_not_passed_on(packable_folder: Callable[..., str], tmp_path: Path) -> None:
    ar = AutoRound(packable_folder("llama"), trust_remote_code=True, allow_pickle=True)
    ar.save_recipe(tmp_path / "r.yaml")
    text = (tmp_path / "r.yaml").read_text()
    assert "# It was made with --trust_remote_code, which a recipe cannot allow." in text
    again = AutoRound.from_recipe(packable_folder("llama"), tmp_path / "r.yaml")
    assert not again.settings.trust_remote_code and not again.settings.allow_pickle


@pytest.mark.parametrize("free", [True, False])
def test_it_belongs_to_the_result(free: bool, packable_folder: Callable[..., str], tmp_path: Path) -> None:
    """The same command ends at once, with flags or with the recipe; a file that is missing is made again."""
    model, out = packable_folder("llama"), tmp_path / "out"
    given: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "model_free": free}
    AutoRound(model, **given).quantize_and_save(out)
    report = json.loads((out / "report.json").read_text())
    assert "recipe.yaml" in report["small_files"] and not inspect_folder(out).foreign
    before = (out / "report.json").stat().st_mtime_ns
    AutoRound.from_recipe(model, out).quantize_and_save(out)
    assert (out / "report.json").stat().st_mtime_ns == before
    (out / "recipe.yaml").unlink()
    AutoRound(model, **given).quantize_and_save(out)
    assert (out / "recipe.yaml").exists() and (out / "report.json").stat().st_mtime_ns != before
    (out / "recipe.yaml").write_text("mine")
    assert inspect_folder(out).foreign == ("recipe.yaml",)


def test_models_that_were_quantized_in_memory(packable_folder: Callable[..., str], tmp_path: Path) -> None:
    model = packable_folder("llama")
    ar = AutoRound(model, iters=0, disable_opt_rtn=True, group_size=32)
    ar.quantize()
    ar.save_quantized(tmp_path / "out", format="auto_round", max_shard_size="1GB")
    output = read_recipe(tmp_path / "out").output
    assert (output.format, output.max_shard_size) == ("auto_round", "1GB")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--recipe", "missing.yaml"], 2, "recipe missing.yaml cannot be read"),
        (["--save_recipe", "."], 6, "--save_recipe . is a folder"),
        (["--save_recipe", "no/such/folder/r.yaml", "--dry_run"], 6, "does not exist"),
    ],
)
def test_files_that_cannot_be_used(
    words: list[str], code: int, says: str, packable_folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([packable_folder("llama"), *words]) == code
    assert says in capsys.readouterr().err
