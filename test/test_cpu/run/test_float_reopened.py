"""Small floats, weights and inputs: the reopened file computes what the model in memory does, in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PRESETS = ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FP8_STATIC", "FP8_BLOCK")
COMPRESSED = "earlier:int8"
CELLS = [*((name, "auto_round") for name in PRESETS), *((n, COMPRESSED) for n in ("NVFP4", "FP8_STATIC", "INT8"))]


@pytest.mark.parametrize(("scheme", "fmt"), CELLS)
def test_logits(
    scheme: str, fmt: str, make: Callable[..., Any], logits: Callable[[Any], torch.Tensor],
    packable_folder: Callable[..., str], earlier_int8: str, tmp_path: Path,
) -> None:  # fmt: skip
    """Nothing is left to chance: inputs that differ in the last bit fall on other codes, and a percent of that is seen
    in the logits."""
    folder = packable_folder("llama", hidden_size=128, intermediate_size=256)
    options = {"scheme": scheme, "group_size": None, "model_dtype": "float32", "iters": 0, "disable_opt_rtn": True}
    job = make(folder, **options)
    model, _ = job.quantize()
    layers = job._result.layers
    make(folder, **options).quantize_and_save(tmp_path / "out", format=fmt)
    wanted, found = logits(model), logits(tmp_path / "out")
    assert layers and model.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
