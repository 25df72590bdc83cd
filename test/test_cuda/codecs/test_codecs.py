"""Codes and tuning steps of small floats on a GPU are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, encode, spec_for_bits
from auto_round.codecs.minifloat import MINIFLOATS, dequantize_minifloat
from auto_round.schemes import PRESET_SCHEMES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TYPES: list[tuple[str, int, Any]] = [
    ("mx_fp", 4, 32), ("mx_fp", 8, 32), ("mx_fp8e5m2", 8, 32), ("mx_fp_rceil", 4, 32), ("mx_int", 4, 32),
    ("nv_fp", 4, 16), ("fp", 8, 0), ("fp", 8, -1), ("fp", 8, (128, 128)),
]  # fmt: skip


@pytest.mark.parametrize("name", MINIFLOATS)
def test_elements(name: str) -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-12, 6, 1 << 16)
    x[:3] = torch.tensor([float("inf"), float("-inf"), -0.0])
    element = MINIFLOATS[name]
    codes = element.encode(x)
    assert torch.equal(element.encode(x.cuda()).cpu(), codes)
    assert torch.equal(element.decode(codes.cuda()).cpu(), element.decode(codes))
    assert torch.equal(element.nearest(x.cuda()).cpu(), element.nearest(x))


@pytest.mark.parametrize(("name", "bits", "size"), TYPES)
def test_weights(name: str, bits: int, size: Any) -> None:
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(2)).bfloat16()
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    here, there = encode(weight, family, size), encode(weight.cuda(), family, size)
    assert torch.equal(there.codes.cpu(), here.codes) and torch.equal(there.scale.cpu(), here.scale)
    values = dequantize_minifloat(there.codes, family.element, there.scale, size, there.global_scale)
    assert torch.equal(
        values.cpu(), dequantize_minifloat(here.codes, family.element, here.scale, size, here.global_scale)
    )


@pytest.mark.parametrize("preset", ["MXFP4", "MXFP8_RCEIL", "NVFP4", "FP8_BLOCK"])
def test_inputs(preset: str) -> None:
    scheme = PRESET_SCHEMES[preset].activations
    assert scheme is not None
    x = torch.randn(4, 7, 256, generator=torch.Generator().manual_seed(3))
    g = torch.tensor(500.0) if scheme.has_global_scale else None
    step = ActivationQuantizer(scheme, global_scale=g)
    assert torch.equal(step(x.cuda()).cpu(), step(x))


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "FP8_STATIC"])
@pytest.mark.parametrize("compiled", [False, True])
def test_tuned_runs(scheme: str, compiled: bool, tmp_path: Any) -> None:
    import transformers

    from auto_round import AutoRound

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    ids = [torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    ar = AutoRound(
        str(tmp_path / "model"), None, scheme=scheme, iters=10, nsamples=8, seqlen=64, dataset=ids,
        device_map="cuda:0", enable_torch_compile=compiled,
    )  # fmt: skip
    ar.quantize_and_save(tmp_path / "out", format="fake")
