"""Open a checkpoint by Transformers with auto-round 0.16.1's own layers, and write its logits.

judge.py FOLDER IDS.npy OUT.npy DTYPE
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(folder: str, ids: str, out: str, dtype: str) -> None:
    assert version("auto-round") == "0.16.1", "this must run in the peer's environment"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map="cpu", output_loading_info=True
    )
    model.eval()
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise SystemExit(f"{what}: {sorted(map(str, info[what]))[0]} and {len(info[what]) - 1} more")
    if not any(hasattr(module, "qweight") for module in model.modules()):
        raise SystemExit("no packed layer in the model")
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))).logits
    np.save(out, logits.float().numpy())
    print(json.dumps({name: version(name) for name in ("auto-round", "transformers", "torch")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
