"""mlx-lm opens what `make_cells.py` wrote and computes what it should.

Run inside mlx-lm's environment, with the folder in MLX_CELLS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

sys.path.insert(0, str(Path(__file__).parent))
from judge import logits_of, packed_layers  # noqa: E402

PLACE = Path(os.environ.get("MLX_CELLS", "cells"))
CELLS = sorted(path.name for path in PLACE.iterdir() if (path / "logits.npy").exists()) if PLACE.is_dir() else []
LIMIT = 1e-2


def test_there_are_cells() -> None:
    assert CELLS, f"no cells in {PLACE.resolve()}: make_cells.py writes them, and MLX_CELLS names their folder"


@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str) -> None:
    folder = PLACE / name
    model, config = load_model(folder / "checkpoint")
    layers = packed_layers(model)
    named = {n: v for n, v in config["quantization"].items() if isinstance(v, dict)}
    found = {n: {"group_size": m.group_size, "bits": m.bits} for n, m in layers.items()}
    assert found and found == named
    weights = np.load(folder / "weights.npz")
    compared = 0
    for key in weights.files:
        layer = layers.get(key)
        if layer is not None:  # float16 scales times codes of at most 8 bits, and their bias: exact in float32
            parts = layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
            found = np.array(mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits))
            assert np.array_equal(found, weights[key]), key
            compared += 1
    logits, wanted = logits_of(model, np.load(folder / "ids.npy")), np.load(folder / "logits.npy")
    difference = np.linalg.norm(logits - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    print(f"{name}: {len(layers)} layers, {compared} compared, logits differ by {difference.max():.1e}")
    assert difference.max() < LIMIT
