"""Open a checkpoint by Transformers alone, and write its logits.

judge_plain.py FOLDER IDS.npy OUT.npy DTYPE
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


def main(folder: str, ids: str, out: str, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))).logits
    np.save(out, logits.float().numpy())
    print(json.dumps({name: version(name) for name in ("transformers", "torch")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
