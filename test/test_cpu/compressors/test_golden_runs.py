"""Whole runs of plain rounding give the very tensors that another implementation wrote for the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.modeling.tensor_files import TensorFiles

RUNS: dict[str, dict[str, Any]] = {
    "w4a16-auto_round": {"scheme": "W4A16"},
    "w3a16-auto_round": {"scheme": "W3A16"},
    "w8a16-auto_round": {"scheme": "W8A16"},
    "w2a16-auto_round-group_size64": {"scheme": "W2A16", "group_size": 64},
    "w4a16-auto_round_auto_awq-symfalse": {"scheme": "W4A16", "sym": False},
    "w4a16-auto_round-layer_config": {"scheme": "W4A16", "layer_config": {"k_proj": {"bits": 8}}},
    "w4a16-fake": {"scheme": "W4A16"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_tensors_are_the_same(name: str, golden_folder: Path, tmp_path: Path) -> None:
    ar = AutoRound(str(golden_folder / "_source-tiny-llama"), iters=0, disable_opt_rtn=True, **RUNS[name])
    ar.quantize_and_save(tmp_path / "out", format="fake" if name.endswith("fake") else "auto_round")
    ours, theirs = TensorFiles.open(tmp_path / "out"), TensorFiles.open(golden_folder / name)
    assert set(ours) == set(theirs)
    for key in theirs:
        if name.endswith("layer_config") and key == "lm_head.weight":
            continue  # its own test
        one, other = ours.read(key), theirs.read(key)
        assert one.dtype == other.dtype and torch.equal(one, other), key


def test_the_head_is_the_same(golden_folder: Path, tmp_path: Path) -> None:
    """Its writer rounded the head as asked for and stored the result dense."""
    config = {"lm_head": {"bits": 4, "group_size": 64}}
    source = str(golden_folder / "_source-tiny-llama")
    ar = AutoRound(source, scheme="W4A16", layer_config=config, iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out", format="fake")
    theirs = TensorFiles.open(golden_folder / "w4a16-auto_round-layer_config").read("lm_head.weight")
    assert torch.equal(TensorFiles.open(tmp_path / "out").read("lm_head.weight"), theirs)
