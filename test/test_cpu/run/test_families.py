"""Every family: saved packed and dense, opened by Transformers, the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Linear layers in two blocks that are quantized by default.
LAYERS = {
    "llama": 14, "llama-tied": 14, "qwen2": 14, "mistral": 14, "phi": 12, "opt": 12, "gpt2": 8, "gemma3": 14,
    "falcon-alibi": 8, "mixtral": 8 + 2 * 4 * 3, "qwen3-moe": 8 + 2 * 4 * 3, "gpt-oss": 8 + 2 * 4 * 3,
    "qwen2-moe": 8 + (3 + 4 * 3) + 3,  # its second block has no experts
}  # fmt: skip
OTHERWISE_WRITTEN = ("mixtral", "gpt-oss", "qwen3-moe")  # experts that checkpoints store in another way


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", LAYERS)
def test_packed_equals_dense(
    family: str, make: Callable[..., Any], logits: Any, packable_model: Any, tmp_path: Path, read_json: Any
) -> None:
    ar = make(family, iters=0, quant_lm_head=True)
    model, folders = ar.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    assert model.__class__.__name__ == "SavedModel"
    assert folders == [str(tmp_path / "out" / name) for name in ("auto-round", "fake")]
    report = read_json(folders[0], "report.json")
    assert report["verify"]["passed"] and report["verify"]["layers"] == LAYERS[family] + 1
    packed, dense, original = logits(folders[0]), logits(folders[1]), logits(packable_model(family))
    assert relative(packed, dense) < 1e-5
    assert 1e-4 < relative(dense, original) < 0.4


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3-moe", "gemma3"])
def test_tuned_asymmetric(family: str, make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any) -> None:
    ar = make(family, iters=3, sym=False, bits=2, lr=0.02)
    _, folders = ar.quantize_and_save(tmp_path / "out", format=["auto_round", "fake"])
    blocks = read_json(folders[0], "report.json")["blocks"]
    assert any(block["loss_after"] < block["loss_before"] for block in blocks)
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5


@pytest.mark.parametrize("family", OTHERWISE_WRITTEN)
@pytest.mark.parametrize(
    "kept", [r"mlp\.experts\.", r"layers\.0\.mlp\.experts\.", r"experts\.1\.", r"experts.*down_proj"]
)
def test_experts_left_dense_are_found_again(
    family: str, kept: str, make: Callable[..., Any], logits: Any, tmp_path: Path
) -> None:
    """Names of dense experts differ by family; what Transformers does not find it fills with random numbers."""
    ar = make(family, iters=0, disable_opt_rtn=True, ignore_layers=[kept])
    model, _ = ar.quantize()
    ar.save_quantized(tmp_path / "out")
    assert relative(logits(tmp_path / "out"), logits(model)) < 1e-5


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-moe", "gpt-oss", "phi"])
def test_a_path_a_model_and_both_ways_to_save_give_the_same_bytes(
    family: str, make: Callable[..., Any], logits: Any, packable_model: Any, tmp_path: Path
) -> None:
    """Each tensor, that is: in which order a file holds them may differ."""

    def weights_hash(folder: Path) -> str:
        tensors = sorted(load_file(folder / "model.safetensors").items())
        named = ((name, str(t.dtype), tuple(t.shape), t.view(torch.uint8).numpy().tobytes()) for name, t in tensors)
        return hashlib.sha256(
            repr([(*spec, hashlib.sha256(data).digest()) for *spec, data in named]).encode()
        ).hexdigest()

    hashes = []
    for index, from_path in enumerate((True, False)):
        kwargs = dict(iters=2, bits=2, lr=0.02, quant_lm_head=True)
        ar = make(family if from_path else packable_model(family), **kwargs)
        model, _ = ar.quantize()
        assert ar.model is model
        kept = tmp_path / f"{index}-kept"
        ar.save_quantized(kept, format="auto_round,fake")
        assert relative(logits(model), logits(kept / "fake")) < 1e-5
        direct = tmp_path / f"{index}-direct"
        make(family if from_path else packable_model(family), **kwargs).quantize_and_save(direct, "auto_round,fake")
        for folder in (kept, direct):
            hashes.append((weights_hash(folder / "auto-round"), weights_hash(folder / "fake")))
    assert len(set(hashes)) == 1


def test_the_users_model_keeps_its_dtype_its_gradients_and_its_other_weights(
    make: Callable[..., Any], packable_model: Any, logits: Any
) -> None:
    model = packable_model("llama").to(torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    wanted = {n: (p.dtype, p.requires_grad, p.device) for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result, layers = make(model, iters=2).quantize()
    assert result is model
    assert {n: (p.dtype, p.requires_grad, p.device) for n, p in model.named_parameters()} == wanted
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name, entry in layers.items() if entry["bits"] == 4}
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_tied_head_that_is_quantized_leaves_the_embedding(
    make: Callable[..., Any], packable_model: Any, tmp_path: Path, logits: Any, read_json: Any
) -> None:
    original = packable_model("llama-tied")
    model, _ = make(packable_model("llama-tied"), iters=0, quant_lm_head=True).quantize()
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
    make("llama-tied", iters=0, quant_lm_head=True).quantize_and_save(tmp_path / "out")
    assert read_json(tmp_path / "out", "config.json")["tie_word_embeddings"] is False
    assert relative(logits(tmp_path / "out"), logits(model)) < 1e-5


def test_a_tied_head_that_is_not_quantized_stays_tied(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    from auto_round.modeling.files.safetensors import TensorFiles

    make("llama-tied", iters=0).quantize_and_save(tmp_path / "out")
    assert read_json(tmp_path / "out", "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in set(TensorFiles.open(tmp_path / "out"))
