"""Dequantized weights of our checkpoints, as compressed-tensors computes them, against ours: equal to the last bit.

Runs in the referee's environment, on checkpoints that the first command writes (below .referees, or below --root, which
then is AR_REFEREES for the second one):

    python tools/referees.py --programs compressed_tensors --twins
    .referees/compressed_tensors/bin/python -m pytest --noconftest test/referees/compressed_tensors
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

WORK = Path(os.environ.get("AR_REFEREES", Path(__file__).resolve().parents[3] / ".referees")) / "work" / "tiny"
FOLDERS = sorted(WORK.glob("*-llm_compressor"))
HOW = "not there; `python tools/referees.py --programs compressed_tensors --twins` writes it"


def test_there_are_checkpoints() -> None:
    assert FOLDERS, f"{WORK}/*-llm_compressor: {HOW}"


@pytest.mark.parametrize("folder", FOLDERS, ids=[f.name for f in FOLDERS])
def test_the_weights_are_ours(folder: Path) -> None:
    dense = WORK / folder.name.replace("-llm_compressor", "-fake-float32")
    assert dense.is_dir(), f"{dense}: {HOW}"
    with safe_open(folder / "model.safetensors", "pt") as file:
        zeros = [file.get_tensor(k).dtype for k in file.keys() if k.endswith("weight_zero_point")]
    if torch.int32 in zeros:
        pytest.skip("0.20.0 does not open packed zero points without dequantizing")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long))  # the first forward pass unpacks
    quantized = {name: m for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    assert quantized
    with safe_open(dense / "model.safetensors", "pt") as file:
        for name, module in quantized.items():
            assert torch.equal(module.weight.data, file.get_tensor(f"{name}.weight")), name
