"""Whole runs in auto_gptq and auto_awq. Each is opened again by the run itself, which compares every integer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.modeling.files.safetensors import TensorFiles


def open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=AutoRoundConfig())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi", "qwen3-moe", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("sym", [True, False])
def test_three_formats_of_one_run_compute_the_same(
    family: str, sym: bool, make: Callable[..., Any], logits: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    ar = make(family, sym=sym, iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out", format="auto_gptq,auto_awq,auto_round")
    gptq, awq, ours = (tmp_path / "out" / name for name in ("auto-gptq", "auto-awq", "auto-round"))
    expected = logits(ours)
    for folder in (gptq, awq):
        assert torch.allclose(logits(open_model(folder)), expected, atol=1e-5)


def test_every_expert_has_its_tensors(make: Callable[..., Any], tmp_path: Path) -> None:
    make("qwen3-moe", iters=0).quantize_and_save(tmp_path / "out", format="auto_gptq")
    names = set(TensorFiles.open(tmp_path / "out"))
    for expert in range(4):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            base = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            assert {f"{base}.{t}" for t in ("qweight", "qzeros", "scales", "g_idx")} <= names
    assert "model.layers.1.mlp.gate.weight" in names


def test_linear_layers_outside_the_blocks_are_named(
    make: Callable[..., Any], packable_folder: Callable[..., str], read_json: Callable[..., Any], tmp_path: Path
) -> None:
    """OPT projects its embeddings; readers of AWQ would take these layers for packed."""
    folder = packable_folder("opt", word_embed_proj_dim=32)
    make(folder, iters=0).quantize_and_save(tmp_path / "out", format="auto_awq")
    listed = read_json(tmp_path / "out", "config.json")["quantization_config"]["modules_to_not_convert"]
    assert sorted(listed) == ["lm_head", "model.decoder.project_in", "model.decoder.project_out"]


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_packed_head(
    family: str, make: Callable[..., Any], logits: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    ar = make(family, iters=0, layer_config={"lm_head": {"bits": 8}}, ignore_layers="layers.1.mlp.down_proj")
    ar.quantize_and_save(tmp_path / "out", format="auto_gptq,auto_round")
    expected = logits(tmp_path / "out" / "auto-round")
    assert torch.allclose(logits(open_model(tmp_path / "out" / "auto-gptq")), expected, atol=1e-5)


@pytest.mark.parametrize(("options", "reason"), [
    ({"layer_config": {"mlp": {"group_size": 64}}, "group_size": 32, "ignore_layers": "down_proj"}, "one group size"),
    ({"quant_lm_head": True}, "lm_head"),
    ({"layer_config": {"k_proj": {"bits": 8}}}, "4-bit"),
    ({"scheme": "W2A16"}, "4-bit"),
])  # fmt: skip
def test_what_awq_cannot_say_is_refused_before_work(
    make: Callable[..., Any], packable_folder: Callable[..., str], tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    wide = packable_folder("llama", intermediate_size=128)  # groups of 64 divide all outputs of the MLP
    ar = make(wide, iters=0, **options)
    with pytest.raises(UnsupportedError, match=f"{reason}.*formats that can: auto_gptq"):
        ar.quantize_and_save(tmp_path / "out", format="auto_awq")
    assert not (tmp_path / "out").exists()
