"""A quantized head: how candidates are compared, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.ggml.types import ggml_scheme
from auto_round.run import head
from auto_round.run.head import HeadInputs, head_divergence, quantize_head
from auto_round.schemes import QuantizationScheme


def made(bits: int = 3) -> tuple[LayerTask, HeadInputs]:
    torch.manual_seed(0)
    module = torch.nn.Linear(32, 50)
    task = LayerTask("lm_head", module, module.weight.detach() * 8, QuantizationScheme(bits, 16), bias=module.bias.data)
    z = torch.randn(600, 32) @ torch.randn(32, 32) / 6 + 1
    return task, HeadInputs(z[:500].t() @ z[:500], z[500:], z[500:] + 0.01 * torch.randn(100, 32))


def test_divergence_is_that_of_the_predictions() -> None:
    task, inputs = made()
    layer, before, after = quantize_head(task, inputs, torch.float16, True)
    assert after < before  # tuned, then
    assert task.bias is not None
    full = torch.distributions.Categorical(logits=inputs.full @ task.weight.t() + task.bias)
    found = torch.distributions.Categorical(logits=inputs.quantized @ layer.dequantize().t() + task.bias)
    expected = torch.distributions.kl_divergence(full, found).mean()
    assert after == pytest.approx(float(expected), rel=1e-4)
    assert head_divergence(task, layer, inputs) == after


def test_what_brings_predictions_no_closer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    task, inputs = made()
    worse = quantize_layer(task, False, torch.float16)
    monkeypatch.setattr(head, "descend_layer", lambda *_: worse)
    layer, before, after = quantize_head(task, inputs, torch.float16, True)
    assert before == after
    assert not torch.equal(layer.codes.scale, worse.codes.scale)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt"])
@pytest.mark.parametrize("low_memory", [True, False])
def test_the_head_is_tuned_and_recorded(
    family: str, low_memory: bool, make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any
) -> None:
    ar = make(family, iters=2, bits=3, quant_lm_head=True, low_cpu_mem_usage=low_memory)
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    last = read_json(folders[0], "report.json")["blocks"][-1]
    assert last["name"] == "lm_head" and 0 < last["loss_after"] <= last["loss_before"]
    one, other = logits(folders[0]), logits(folders[1])
    assert float((one - other).abs().max() / other.abs().max()) < 1e-5


def test_without_tuning_it_is_rounded_and_not_listed(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    make("llama", iters=0, quant_lm_head=True).quantize_and_save(tmp_path / "out")
    assert all(b["name"] != "lm_head" for b in read_json(tmp_path / "out", "report.json")["blocks"])


@pytest.mark.parametrize("name", ["Q6_K", "Q4_K", "Q8_0", "Q4_1"])
def test_a_head_in_a_ggml_type(name: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(256, 60)
    weight = module.weight.detach() * 8
    weight[3, :64] = 0  # steps of zero
    task = LayerTask("lm_head", module, weight, ggml_scheme(name), bias=module.bias.data, ggml=name)
    z = torch.randn(600, 24) @ torch.randn(24, 256) / 5 + 0.2 * torch.randn(600, 256)
    inputs = HeadInputs(z[:500].t() @ z[:500], z[500:], z[500:] + 0.01 * torch.randn(100, 256))
    layer, before, after = quantize_head(task, inputs, torch.float16, True)
    assert layer.codes.kind.name == name
    assert head_divergence(task, layer, inputs) == after < before
    searched = quantize_layer(task, True, torch.float16).codes
    assert torch.equal(searched.d, layer.codes.d)  # descent moves codes alone
    assert bool(torch.isfinite(layer.dequantize()).all())
