"""Checkpoints made by another implementation open through Transformers and give the logits recorded for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from auto_round.inference.linear import QuantLinear

DIRECT = [
    "w4a16-auto_round", "w3a16-auto_round", "w8a16-auto_round", "w2a16-auto_round-group_size64",
    "w4a16-auto_round_auto_awq-symfalse", "w4a16-fake",
]  # fmt: skip
CONVERTED = [
    "w4a16-auto_gptq", "w4a16-auto_gptq-symfalse", "w3a16-auto_gptq", "w4a16-auto_awq", "w4a16-auto_awq-symfalse",
]  # fmt: skip


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    if folder.name in CONVERTED:
        kwargs.setdefault("quantization_config", AutoRoundConfig())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def naive_dense(tensors: dict[str, np.ndarray], layer: str, bits: int, group: int, awq: bool) -> np.ndarray:
    """float32 [out, in], decoded bit by bit from the layouts' text (symmetric and asymmetric alike)."""
    qweight, qzeros = tensors[f"{layer}.qweight"], tensors[f"{layer}.qzeros"]
    scales = tensors[f"{layer}.scales"].astype(np.float32)

    def bit(words: np.ndarray, position: int) -> np.ndarray:
        return (words[..., position // 32].astype(np.int64) >> (position % 32)) & 1

    def stream(words: np.ndarray, count: int) -> np.ndarray:
        return np.stack([sum(bit(words, i * bits + b) << b for b in range(bits)) for i in range(count)], -1)

    if awq:
        inverse = (0, 4, 1, 5, 2, 6, 3, 7)
        out = scales.shape[1]
        codes = np.stack([(qweight[:, o // 8].astype(np.int64) >> (4 * inverse[o % 8])) & 15 for o in range(out)])
        zeros = np.stack([(qzeros[:, o // 8].astype(np.int64) >> (4 * inverse[o % 8])) & 15 for o in range(out)])
    else:
        codes = stream(qweight.T, qweight.shape[0] * 32 // bits)
        zeros = ((stream(qzeros, scales.shape[1]) + 1) % (1 << bits)).T
    where = np.arange(codes.shape[1]) // group
    return ((codes - zeros[:, where]) * scales.T[:, where]).astype(np.float32)


@pytest.mark.parametrize("name", DIRECT + CONVERTED)
def test_logits_are_those_recorded(golden: Path, name: str) -> None:
    model = load(golden / name)
    ids = torch.from_numpy(np.load(golden / "_logits" / "input_ids.npy"))
    expected = np.load(golden / "_logits" / f"{name}.npy")
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    # The 3-bit reference was computed in float16 (each of its values is one), whose own noise on this model is 1.3e-3.
    in_half = bool((expected == expected.astype(np.float16)).all())
    assert in_half == name.startswith("w3")
    assert error < (3e-3 if in_half else 1e-5)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == (0 if name.endswith("fake") else 14)


@pytest.mark.parametrize("name", [n for n in DIRECT + CONVERTED if "fake" not in n] + ["w4a16-auto_round-layer_config"])
def test_weights_are_those_in_the_file(golden: Path, name: str) -> None:
    from safetensors import safe_open

    model = load(golden / name)
    # numpy has no bfloat16, so only the packed tensors are read.

    with safe_open(golden / name / "model.safetensors", "np") as file:
        keys = [k for k in file.keys() if k.split(".")[-1] in ("qweight", "qzeros", "scales")]
        tensors = {k: file.get_tensor(k) for k in keys}
    config = json.loads((golden / name / "config.json").read_text())["quantization_config"]
    count = 0
    for layer, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        bits = 8 if "layer_config" in name and "k_proj" in layer else config["bits"]
        dense = naive_dense(tensors, layer, bits, config["group_size"], "awq" in name)
        assert np.array_equal(module.dequantize().numpy(), dense), layer
        count += 1
    assert count == 14


def test_a_head_listed_as_quantized_but_stored_dense(golden: Path) -> None:
    """This file's extra_config names lm_head, yet it holds lm_head.weight: the file is believed."""
    from safetensors.torch import load_file

    model = load(golden / "w4a16-auto_round-layer_config")
    assert type(model.lm_head) is torch.nn.Linear
    stored = load_file(golden / "w4a16-auto_round-layer_config" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, stored.float())
    assert {m.format.scheme.bits for n, m in model.named_modules() if n.endswith("k_proj")} == {8}


@pytest.mark.parametrize("name", ["w4a16-auto_round", "w4a16-auto_gptq-symfalse", "w4a16-auto_awq-symfalse"])
def test_saving_again_keeps_the_packed_tensors(golden: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = load(golden / name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    before, after = load_file(golden / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_generation(golden: Path) -> None:
    model = load(golden / "w4a16-auto_round", torch.bfloat16)
    tokens = model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 3
