"""Open a checkpoint with mlx-lm, and write its logits.

judge.py FOLDER IDS.npy OUT.npy DTYPE
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model


def logits_of(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    """float32 [samples, tokens, vocabulary]."""
    return np.array(model(mx.array(ids)).astype(mx.float32))


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that hold quantized weights, by name."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {name: module for name, module in leaves if isinstance(module.get("scales"), mx.array)}


def main(folder: str, ids: str, out: str, dtype: str) -> None:
    model, _ = load_model(Path(folder))
    if not packed_layers(model):
        raise SystemExit("no packed layer in the model")
    model.set_dtype(getattr(mx, dtype))
    np.save(out, logits_of(model, np.load(ids)))
    print(json.dumps({name: version(name) for name in ("mlx", "mlx-lm")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
