"""`QuantConfig` and recipe files: round trips, what is refused and in which words, and overriding."""

from __future__ import annotations

import inspect
import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from auto_round import AutoRound
from auto_round.cli.arguments import QUANTIZE_GROUPS
from auto_round.config import PARTS, RECIPE_VERSION, QuantConfig, read_recipe
from auto_round.errors import ConfigError

# A value other than the default for every key that a recipe may hold.
CHANGED: dict[str, dict[str, Any]] = {
    "source": {"platform": "model_scope", "model_dtype": "bfloat16"},
    "weights": {
        "scheme": "W8A16", "bits": 2, "group_size": [64, 128], "sym": False, "data_type": "int", "act_bits": 8,
        "act_group_size": -1, "act_sym": True, "act_data_type": "int", "act_dynamic": False, "super_bits": 6,
        "super_group_size": 8, "rotation_config": {"a": 1}, "layer_config": {"k_proj": {"bits": 8}, ".*mlp": "W8A16"},
        "ignore_layers": ["mlp", "lm_head"], "quant_lm_head": True, "to_quant_block_names": ["model.layers.0"],
        "scale_dtype": "fp32", "static_kv_dtype": "fp8", "static_kv_granularity": "head",
        "static_attention_dtype": "fp8", "static_attention_granularity": "head",
    },
    "data": {"dataset": "a:num=3", "nsamples": 3, "seqlen": 16, "seed": 7, "imatrix": "a.gguf"},
    "tuning": {
        "algorithm": "gptq", "damping": 0.5, "iters": 3, "lr": 0.5, "minmax_lr": 1e-5, "momentum": 0.9, "batch_size": 2,
        "gradient_accumulate_steps": 2, "enable_adam": True, "enable_minmax_tuning": False,
        "enable_quanted_input": False, "not_use_best_mse": True, "disable_opt_rtn": True, "on_nan": "rtn", "amp": False,
        "enable_torch_compile": False, "enable_deterministic_algorithms": True, "model_free": "auto",
    },
    "memory": {
        "device_map": "cuda:1", "max_memory": {"cpu": "4GB"}, "low_gpu_mem_usage": True, "low_cpu_mem_usage": False,
    },
    "output": {"format": "auto_round,fake", "max_shard_size": 1000, "verify": False, "strict": True},
}  # fmt: skip
WHOLE = {
    "version": 1, "model": "org/name", "supply": {"dataset": "list of 3 samples"}, "environment": {"AR_X": "1"},
    **CHANGED,
}  # fmt: skip


def test_every_key_of_a_recipe_is_tried() -> None:
    for part, kind in PARTS.items():
        assert set(CHANGED[part]) == {f.name for f in fields(kind) if "local" not in f.metadata}


def test_round_trips() -> None:
    config = QuantConfig.from_dict(WHOLE)
    assert config.to_dict() == WHOLE
    assert QuantConfig.from_yaml(config.to_yaml()) == config == QuantConfig.from_json(config.to_json())
    assert yaml.safe_load(config.to_yaml()) == json.loads(config.to_json()) == WHOLE
    assert QuantConfig.from_keywords(config.keywords()).to_dict() == {"version": 1, **CHANGED}
    with pytest.raises(FrozenInstanceError):
        config.data.seed = 3  # type: ignore[misc]


def test_what_is_left_out_takes_its_default() -> None:
    assert QuantConfig.from_dict({"version": 1}) == QuantConfig()
    assert QuantConfig.from_dict(QuantConfig().to_dict()) == QuantConfig()
    assert QuantConfig.from_yaml("version: 1\ntuning: {lr: 5e-3}").tuning.lr == 0.005


def test_defaults_are_those_of_autoround() -> None:
    values = QuantConfig().keywords()
    parameters = inspect.signature(AutoRound.__init__).parameters.values()
    named = {p.name: p.default for p in parameters if p.name in values}
    assert len(named) == 14
    assert named | {"gradient_accumulate_steps": 1, "layer_config": {}} == {k: values[k] for k in named}


def test_every_key_is_a_flag() -> None:
    flags = {flag.dest for group in QUANTIZE_GROUPS for flag in group.flags}
    assert set(QuantConfig().keywords()) - flags == {"rotation_config", "damping"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 1\ntuning: {itres: 3}", "unknown key 'tuning.itres'; did you mean 'iters'"),
        ("version: 1\ntunning: {}", "unknown key 'tunning'; did you mean 'tuning'"),
        ("version: 1\niters: 3", "unknown key 'iters'; it belongs under 'tuning'"),
        ("version: 1\ndata: {iters: 3}", "unknown key 'data.iters'; it belongs under 'tuning'"),
        ("version: 1\ntuning: {iters: many}", "tuning.iters='many' is not allowed; give a whole number"),
        ("version: 1\ntuning: {iters: true}", "tuning.iters=True is not allowed; give a whole number"),
        ("version: 1\ntuning: {lr: fast}", "tuning.lr='fast' is not allowed; give a number"),
        ("version: 1\ntuning: {amp: 1}", "tuning.amp=1 is not allowed; give true or false"),
        ("version: 1\nweights: {ignore_layers: mlp}", "weights.ignore_layers='mlp' is not allowed; give a list"),
        ("version: 1\nweights: {group_size: [1, 2, 3]}", "give a whole number or a list"),
        ("version: 1\nweights: {layer_config: [a]}", "give a mapping"),
        ("version: 1\nweights: {layer_config: {1: 2}}", "give a mapping"),
        ("version: 1\nweights: W4A16", "weights='W4A16' is not allowed; give a mapping"),
        ("version: 1\noutput: {max_shard_size: [1]}", "give a whole number or a text"),
        ("version: 1\nsource: {trust_remote_code: true}", "does not belong in a recipe: only you can allow"),
        ("version: 2", "has version 2, and this version of auto-round reads up to 1; update"),
        ("version: 0", "version 0 is not allowed"),
        ("version: true", "version True is not allowed"),
        ("default_stage: {}", "is no recipe of auto-round: it has no version"),
        ("- 1", "is no recipe"),
        ("", "is no recipe"),
        ("version: 1\nversion: 1", "'version' is given twice"),
        ("version: [", "is not YAML"),
        ("version: 1\ndata: !!python/object:os.system {}", "is not YAML"),
        ("? {a: 1}\n: 2", "is not YAML"),
    ],
)
def test_what_is_refused(text: str, says: str, tmp_path: Path) -> None:
    assert RECIPE_VERSION == 1
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="recipe.yaml") as error:
        read_recipe(tmp_path)
    assert says in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe .*recipe.yaml cannot be read: No such file"):
        read_recipe(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes cannot be read"):
        read_recipe(tmp_path / "bytes")


def test_what_is_given_beside_a_recipe_overrides_it(caplog: pytest.LogCaptureFixture) -> None:
    config = QuantConfig.from_dict({"version": 1, "tuning": {"iters": 5, "lr": 0.5}, "data": {"seed": 7}})
    with caplog.at_level("INFO", logger="auto_round"):
        found = config.keywords_with({"iters": 6, "bs": 2, "seed": 7}, "recipe r")
    assert (found["iters"], found["lr"], found["batch_size"], found["seed"]) == (6, 0.5, 2, 7)
    assert "recipe r is used, but for batch_size=2 instead of 8, iters=6 instead of 5" in caplog.text
    assert "seed" not in caplog.text


def test_a_given_scheme_replaces_all_of_the_recipes(caplog: pytest.LogCaptureFixture) -> None:
    config = QuantConfig.from_dict({"version": 1, "weights": {"scheme": "W2A16", "group_size": 32, "sym": False}})
    with caplog.at_level("INFO", logger="auto_round"):
        found = config.keywords_with({"scheme": "MXFP4"})
    assert found["scheme"] == "MXFP4" and "group_size" not in found and "sym" not in found
    assert "group_size='default' instead of 32, scheme='MXFP4' instead of 'W2A16'" in caplog.text


def test_what_a_recipe_could_not_hold_is_demanded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantConfig.from_dict(WHOLE)
    with pytest.raises(ConfigError, match=r"cannot hold dataset \(list of 3 samples\); give --dataset beside it"):
        config.keywords_with({})
    assert config.keywords_with({"dataset": "mbpp"})["dataset"] == "mbpp"
    assert "was made with AR_X=1, which changes the result; set it too" in caplog.text
    caplog.clear()
    monkeypatch.setenv("AR_X", "1")
    assert config.keywords_with({"dataset": "mbpp"}) and "AR_X" not in caplog.text
