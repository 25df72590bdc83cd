"""Experts that no calibration token reaches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.modeling.files.safetensors import TensorFiles


@pytest.mark.parametrize("iters", [0, 2])
def test_they_are_listed_and_have_finite_scales(
    iters: int, make: Callable[..., Any], packable_model: Any, tmp_path: Path, read_json: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model = packable_model("qwen3-moe")
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.zeros_(parameter)  # a router without a view sends every token to the same two of four
    with caplog.at_level(logging.WARNING, logger="auto_round"):
        make(model, iters=iters).quantize_and_save(tmp_path / "out")
    layers = read_json(tmp_path / "out", "report.json")["layers"]
    listed = {one["name"] for one in layers if "no calibration token" in (one["reason"] or "")}
    experts = {one["name"] for one in layers if ".experts." in one["name"]}
    assert listed < experts and 2 * len(listed) == len(experts)
    assert f"no calibration token reached {len(listed)} expert layers" in caplog.text
    files = TensorFiles.open(tmp_path / "out")
    for name in listed:
        scales = files.read(f"{name}.scales")
        assert bool(torch.isfinite(scales).all()) and bool((scales != 0).all())


def test_with_enough_tokens_there_are_none(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    make("qwen3-moe", iters=1).quantize_and_save(tmp_path / "out")
    reasons = {one["reason"] for one in read_json(tmp_path / "out", "report.json")["layers"] if one["bits"]}
    assert reasons == {None}
