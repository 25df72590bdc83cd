"""Whole runs of plain rounding give the very tensors that another implementation wrote for the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from auto_round import AutoRound
from auto_round.formats.base import available_formats
from auto_round.modeling.files.safetensors import TensorFiles

RUNS: dict[str, dict[str, Any]] = {
    "w4a16-auto_round": {"scheme": "W4A16"},
    "w3a16-auto_round": {"scheme": "W3A16"},
    "w8a16-auto_round": {"scheme": "W8A16"},
    "w2a16-auto_round-group_size64": {"scheme": "W2A16", "group_size": 64},
    "w4a16-auto_round_auto_awq-symfalse": {"scheme": "W4A16", "sym": False},
    "w4a16-auto_round-layer_config": {"scheme": "W4A16", "layer_config": {"k_proj": {"bits": 8}}},
    "w4a16-fake": {"scheme": "W4A16"},
    "w3a16-auto_gptq": {"scheme": "W3A16"},
    "w4a16-auto_gptq": {"scheme": "W4A16"},
    "w4a16-auto_gptq-symfalse": {"scheme": "W4A16", "sym": False},
    "w4a16-auto_awq": {"scheme": "W4A16"},
    "w4a16-auto_awq-symfalse": {"scheme": "W4A16", "sym": False},
    "w4a16-llm_compressor": {"scheme": "W4A16"},
    "int8-llm_compressor": {"scheme": "INT8"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_tensors_are_the_same(name: str, golden_folder: Path, tmp_path: Path) -> None:
    ar = AutoRound(str(golden_folder / "_source-tiny-llama"), iters=0, disable_opt_rtn=True, **RUNS[name])
    fmt = name.split("-")[1]
    ar.quantize_and_save(tmp_path / "out", format=fmt if fmt in available_formats() else "auto_round")
    ours, theirs = TensorFiles.open(tmp_path / "out"), TensorFiles.open(golden_folder / name)
    assert set(ours) == set(theirs)
    for key in theirs:
        if name.endswith("layer_config") and key == "lm_head.weight":
            continue  # its own test
        one, other = ours.read(key), theirs.read(key)
        assert one.dtype == other.dtype and torch.equal(one, other), key


@pytest.mark.parametrize("name", [n for n in RUNS if n.split("-")[1] in ("auto_gptq", "auto_awq")])
def test_configs_say_the_same(name: str, golden_folder: Path, tmp_path: Path) -> None:
    """Every key of theirs, but the version, which is ours. More keys are ours to add."""
    ar = AutoRound(str(golden_folder / "_source-tiny-llama"), iters=0, disable_opt_rtn=True, **RUNS[name])
    ar.quantize_and_save(tmp_path / "out", format=name.split("-")[1])
    ours = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    theirs = json.loads((golden_folder / name / "quantization_config.json").read_text())
    assert {k: ours.get(k) for k in theirs if k != "autoround_version"} == {
        k: v for k, v in theirs.items() if k != "autoround_version"
    }
    assert json.loads((tmp_path / "out" / "quantization_config.json").read_text()) == ours
    if ours["quant_method"] == "gptq":
        assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == ours


def test_the_head_is_the_same(golden_folder: Path, tmp_path: Path) -> None:
    """Its writer rounded the head as asked for and stored the result dense."""
    config = {"lm_head": {"bits": 4, "group_size": 64}}
    source = str(golden_folder / "_source-tiny-llama")
    ar = AutoRound(source, scheme="W4A16", layer_config=config, iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out", format="fake")
    theirs = TensorFiles.open(golden_folder / "w4a16-auto_round-layer_config").read("lm_head.weight")
    assert torch.equal(TensorFiles.open(tmp_path / "out").read("lm_head.weight"), theirs)


@pytest.mark.parametrize("name", [n for n in RUNS if n.endswith("llm_compressor")])
def test_the_config_is_the_same(name: str, golden_folder: Path, tmp_path: Path) -> None:
    source = str(golden_folder / "_source-tiny-llama")
    AutoRound(source, iters=0, disable_opt_rtn=True, **RUNS[name]).quantize_and_save(tmp_path / "out", "llm_compressor")
    ours, theirs = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "out", golden_folder / name)
    )
    assert ours == {key: value for key, value in theirs.items() if value is not None or key in ours}


def test_int8_logits(golden_folder: Path, earlier_int8: str, tmp_path: Path) -> None:
    """Through our own loader, against what Transformers computed with another library from the other's file."""
    from transformers import AutoModelForCausalLM

    source = str(golden_folder / "_source-tiny-llama")
    ar = AutoRound(source, scheme="INT8", iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out", format=earlier_int8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.from_numpy(np.load(golden_folder / "_logits" / "input_ids.npy"))
    theirs = torch.from_numpy(np.load(golden_folder / "_logits" / "int8-llm_compressor.npy"))
    with torch.no_grad():
        ours = model(ids).logits
    # Codes of activations on a border fall either way from one processor to the next.
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-2
