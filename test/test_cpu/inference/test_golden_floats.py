"""Checkpoints of small float types that another implementation made open, and give the logits recorded for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.inference.convert_model import convert_hf_model, post_init
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.schemes import ActivationScheme


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def by_our_loader(folder: Path) -> Any:
    """Through `convert_hf_model` alone, for configs that Transformers' own classes refuse or read themselves."""
    source = CheckpointSource(folder, prepare=lambda model: convert_hf_model(model, "cpu"))
    for name in [*source.blocks, *source.non_block_module_names()]:
        source.load(name)
    model = source.model.float()
    post_init(model)
    return model


def difference(model: Any, golden: Path, name: str) -> float:
    ids = torch.from_numpy(np.load(golden / "_logits" / "input_ids.npy"))
    expected = np.load(golden / "_logits" / f"{name}.npy")
    with torch.no_grad():
        logits = model(ids).logits.float().numpy()
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def float_layers(model: Any) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_rceil", "mxfp8", "nvfp4"])
def test_logits_are_those_recorded(golden: Path, name: str) -> None:
    model = load(golden / f"{name}-auto_round")
    assert len(float_layers(model)) == 14
    assert difference(model, golden, f"{name}-auto_round") < 1e-6


def test_mxint4(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says that inputs are mx_int. Its writer's own loader computed the recorded logits with mx_fp inputs."""
    model = load(golden / "mxint4-auto_round")
    assert len(float_layers(model)) == 14
    assert {a.data_type for m in float_layers(model) if (a := m.format.scheme.activations)} == {"mx_int"}
    as_recorded = ActivationQuantizer(ActivationScheme(4, 32, True, "mx_fp", True))
    monkeypatch.setattr(PackedLinear, "activation", property(lambda self: as_recorded))
    assert difference(model, golden, "mxint4-auto_round") < 1e-6


def test_fp8_static(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded logits are of weights and quantized inputs rounded to bfloat16 once more. FP8 codes that flip by
    that move the logits by a third of what FP8 itself does; with the same roundings there is no difference."""
    model = load(golden / "fp8_static-auto_round")
    assert len(float_layers(model)) == 14
    effect = difference(load(golden / "_source-tiny-llama"), golden, "fp8_static-auto_round")
    assert difference(model, golden, "fp8_static-auto_round") < effect / 2

    def rounded(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        step = self.activation
        assert step is not None and step.scale is not None
        codes = (x / step.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        inputs = (codes.bfloat16() * step.scale.bfloat16()).float()
        return torch.nn.functional.linear(inputs, self.dequantize(torch.bfloat16).float())

    monkeypatch.setattr(PackedLinear, "forward", rounded)
    assert difference(model, golden, "fp8_static-auto_round") < 1e-6


@pytest.mark.parametrize("name", ["fp8_block-auto_round", "fp8_block-fp8", "fpw8a16-auto_round"])
def test_what_transformers_refuses_or_reads_itself(golden: Path, name: str) -> None:
    """Group sizes of 0 and [128, 128], and quant_method fp8."""
    from safetensors.torch import load_file

    folder = golden / name
    model = by_our_loader(folder)
    tensors, source = (
        load_file(folder / "model.safetensors"),
        load_file(golden / "_source-tiny-llama/model.safetensors"),
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 14
    for layer, module in layers.items():
        values = tensors[f"{layer}.weight"].float()
        if "block" in name:
            scale = tensors[f"{layer}.weight_scale_inv"].float()
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            scale = tensors[f"{layer}.weight_scale"].float()
        assert torch.equal(module.dequantize(), values * scale)
        original = source[f"{layer}.weight"].float()
        assert (module.dequantize() - original).norm() / original.norm() < 0.04
        assert (module.activation is None) is ("fpw8a16" in name)
    effect = np.load(golden / "_logits" / "tiny-llama-float32.npy")
    ids = torch.from_numpy(np.load(golden / "_logits" / "input_ids.npy"))
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    assert 0 < np.linalg.norm(logits - effect) / np.linalg.norm(effect) < 0.15


def test_weights_of_the_native_file(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own FP8 layers, on a CPU, dequantize to bfloat16 and leave inputs alone: so do we for this once."""
    model = by_our_loader(golden / "fp8_block-fp8")
    monkeypatch.setattr(PackedLinear, "activation", property(lambda self: None))
    # Recorded in bfloat16: its own rounding is 4e-3 a product.
    assert difference(model, golden, "fp8_block-fp8.bf16") < 2e-2
    assert difference(model, golden, "tiny-llama-float32") > 4e-2


@pytest.mark.parametrize("name", ["mxfp4-auto_round", "nvfp4-auto_round", "fp8_static-auto_round", "mxfp8-auto_round"])
def test_saving_again_keeps_the_packed_tensors(golden: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(golden / name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    before, after = load_file(golden / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["data_type"] in ("mx_fp", "nv_fp", "fp") and saved["quant_method"] == "auto-round"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
