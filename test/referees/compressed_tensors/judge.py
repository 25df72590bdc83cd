"""Open a checkpoint by Transformers with the compressed-tensors library, and write its logits.

judge.py FOLDER IDS.npy OUT.npy DTYPE [dequantize]

With `dequantize` weights are dequantized while they are read, and activations stay as they are.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig


def main(folder: str, ids: str, out: str, dtype: str, mode: str = "") -> None:
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if mode else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    if not mode and not any(hasattr(module, "quantization_scheme") for module in model.modules()):
        raise SystemExit("no quantized layer in the model")
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))).logits
    np.save(out, logits.float().numpy())
    print(json.dumps({name: version(name) for name in ("compressed-tensors", "transformers", "torch")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
