"""Open a GPTQ or AWQ checkpoint by GPTQModel's own loader, and write its logits.

judge_load.py FOLDER IDS.npy OUT.npy DTYPE
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import numpy as np
import torch
from gptqmodel import GPTQModel


def main(folder: str, ids: str, out: str, dtype: str) -> None:
    model = GPTQModel.load(folder, device="cpu", dtype=getattr(torch, dtype))
    packed = [name for name, module in model.model.named_modules() if hasattr(module, "qweight")]
    if not packed:
        raise SystemExit("no packed layer in the model")
    with torch.no_grad():
        logits = model.model(torch.from_numpy(np.load(ids))).logits
    np.save(out, logits.float().numpy())
    print(json.dumps({name: version(name) for name in ("gptqmodel", "transformers", "torch")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
