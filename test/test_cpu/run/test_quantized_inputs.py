"""Checkpoints in FP8 and MXFP4 are quantized as the dense models that they stand for, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auto_round.errors import UnsupportedError

Copy = Callable[..., tuple[Path, Path]]


@pytest.fixture
def same(make: Callable[..., Any], weights_hash: Callable[[Any], str], tmp_path: Path) -> Callable[..., Path]:
    """`same(quantized, dense, format, **kwargs)`: both runs write the same; returns the first one's folder."""

    def check(quantized: Path, dense: Path, format: str = "auto_round", **kwargs: Any) -> Path:
        folders = []
        for name, model in (("quantized", quantized), ("dense", dense)):
            make(str(model), **kwargs).quantize_and_save(tmp_path / name, format=format)
            folders.append(tmp_path / name)
        assert weights_hash(folders[0]) == weights_hash(folders[1])
        one, other = (json.loads((folder / "config.json").read_text()) for folder in folders)
        assert one == other
        return folders[0]

    return check


@pytest.mark.parametrize("kind", ["fp8-block", "modelopt", "ct-channel", "ct-mxfp4"])
def test_rounding_only(
    kind: str, same: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]
) -> None:
    same(*quantized_copy(packable_folder("llama"), kind, (32, 32)), iters=0, disable_opt_rtn=True)


def test_tuned(same: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]) -> None:
    folder = same(*quantized_copy(packable_folder("llama"), "fp8-block"), iters=2, nsamples=4)
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == "auto-round"
    report = json.loads((folder / "report.json").read_text())
    assert report["job"]["stored_as"] == "14 tensors in FP8 e4m3" and report["verify"]["passed"]
    assert "14 tensors in FP8 e4m3" in (folder / "README.md").read_text()


def test_mixture_of_experts_in_fp8(
    same: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]
) -> None:
    same(*quantized_copy(packable_folder("qwen3-moe"), "fp8-block"), iters=0, nsamples=4)


def test_deepseek(
    same: Callable[..., Path], make: Callable[..., Any], quantized_copy: Copy, byte_tokenizer: Any, tmp_path: Path
) -> None:
    """Latent attention and a mixture, in blocks of FP8; scales of its cache are refused before any work."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=24,
        v_head_dim=16, n_group=2, topk_group=1, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    quantized, dense = quantized_copy(tmp_path / "model", "fp8-block", (32, 32))
    same(quantized, dense, iters=0, nsamples=4)
    with pytest.raises(UnsupportedError, match="DeepseekV3Attention caches compressed latents"):
        make(str(quantized), iters=0, static_kv_dtype="fp8").plan()


def test_experts_in_mxfp4(same: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]) -> None:
    folder = same(*quantized_copy(packable_folder("gpt-oss"), "mxfp4"), iters=0, disable_opt_rtn=True)
    assert "model.layers.0.mlp.experts.3.up_proj.qweight" in load_file(folder / "model.safetensors")


def test_dense_output_is_an_ordinary_checkpoint(
    same: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]
) -> None:
    """Nothing of the old declaration is left for Transformers to act on."""
    from transformers import AutoModelForCausalLM

    quantized = quantized_copy(packable_folder("gpt-oss"), "mxfp4")
    folder = same(*quantized, format="fake", iters=0, disable_opt_rtn=True, ignore_layers="experts")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wanted = load_file(quantized[1] / "model.safetensors")
    for name in ("gate_up_proj", "down_proj_bias"):
        found = getattr(model.model.layers[1].mlp.experts, name)
        assert torch.equal(found, wanted[f"model.layers.1.mlp.experts.{name}"])


def test_a_plan_is_that_of_the_dense_model(
    make: Callable[..., Any], quantized_copy: Copy, packable_folder: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 0)  # grows while tests run
    quantized, dense = quantized_copy(packable_folder("qwen3-moe"), "fp8-block")
    one, other = make(str(quantized), iters=0).plan(), make(str(dense), iters=0).plan()
    assert dict(one.layers) == dict(other.layers) and one.bytes_on_disk == other.bytes_on_disk
    assert (one.peak_ram, one.compute) == (other.peak_ram, other.compute)
    assert "stored as" in one.render() and "stored as" not in other.render()


def test_in_memory_and_with_the_whole_model_asked_for(
    make: Callable[..., Any], quantized_copy: Copy, packable_folder: Callable[..., str], logits: Any
) -> None:
    quantized, dense = quantized_copy(packable_folder("llama"), "fp8-block")
    kwargs: dict[str, Any] = dict(iters=0, disable_opt_rtn=True, low_cpu_mem_usage=False)
    one, _ = make(str(quantized), **kwargs).quantize()
    other, _ = make(str(dense), **kwargs | {"low_cpu_mem_usage": True}).quantize()
    assert torch.equal(logits(one), logits(other))


def test_what_is_not_read_is_refused_before_any_work(
    make: Callable[..., Any], quantized_copy: Copy, packable_folder: Callable[..., str], tmp_path: Path
) -> None:
    make("llama", iters=0, disable_opt_rtn=True).quantize_and_save(tmp_path / "int4")
    with pytest.raises(UnsupportedError, match=r"quantized already \(auto-round, 4 bits\).*give the original model"):
        make(str(tmp_path / "int4"))


def test_measured_against_the_dense_weights(quantized_copy: Copy, packable_folder: Callable[..., str]) -> None:
    """An FP8 model as reference of an evaluation is what was quantized: its dequantized weights."""
    from auto_round.eval.evaluate import load_model

    quantized, dense = quantized_copy(packable_folder("qwen3-moe"), "ct-tensor")
    one = load_model(quantized, dtype=torch.float32, dequantized=True)
    other = load_model(dense, dtype=torch.float32)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-5)
