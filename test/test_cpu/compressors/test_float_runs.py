"""Whole runs with small floats: every preset, plain, searched and tuned, and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PRESETS = (
    "MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK"
)  # fmt: skip
PLAIN = {"iters": 0, "disable_opt_rtn": True}
HOW: dict[str, dict[str, Any]] = {"plain": PLAIN, "searched": {"iters": 0}, "tuned": {"iters": 3}}


@pytest.fixture
def run(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, scheme, **kw: make(model, **{"scheme": scheme, "group_size": None, **kw})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scheme", PRESETS)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_saved_weights_are_those_in_memory(
    family: str, scheme: str, how: str, run: Callable[..., Any], logits: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ar = run(family, scheme, **HOW[how])
    model, layers = ar.quantize()
    assert bool(torch.isfinite(logits(model)).all())
    ar.save_quantized(tmp_path / "out", format="fake")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "experts" not in name:
            assert torch.equal(module.weight, reopened.get_submodule(name).weight), name
