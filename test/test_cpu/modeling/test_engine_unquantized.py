"""The table of layers that serving engines keep dense, and its copy in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from auto_round.modeling.layer_rules import ENGINE_UNQUANTIZED, engine_unquantized

PAGE = Path(__file__).resolve().parents[3] / "docs" / "dense-layers.md"


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [
        ("deepseek_v32", "model.layers.3.self_attn.indexer.weights_proj"),
        ("glm_moe_dsa", "model.layers.3.self_attn.indexer.wk"),
        ("deepseek_v4", "model.layers.3.self_attn.compressor.indexer.scorer.weights_proj"),
        ("deepseek_v4", "model.layers.3.self_attn.compressor.gate_proj"),
        ("deepseek_v4", "model.layers.3.self_attn.compressor.indexer.kv_proj"),
        ("deepseek_v4", "layers.3.attn.indexer.compressor.wgate"),
        ("deepseek_v4", "layers.3.attn.indexer.weights_proj"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba"),
        ("qwen3_5_moe", "model.language_model.layers.0.linear_attn.in_proj_a"),
        ("a_family_of_tomorrow", "model.layers.0.linear_attn.in_proj_b"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"),
        ("olmo_hybrid", "model.layers.0.linear_attn.b_proj"),
        ("jamba", "model.layers.0.mamba.dt_proj"),
    ],
)
def test_layers_of_the_table(model_type: str, layer: str) -> None:
    row = engine_unquantized(model_type, layer)
    assert row is not None and row.reason and row.source.startswith(("vLLM ", "SGLang "))


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [
        ("deepseek_v32", "model.layers.3.self_attn.indexer.wq_b"),
        ("deepseek_v32", "model.layers.3.self_attn.kv_b_proj"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz"),
        ("qwen3_next", "model.layers.0.mlp.shared_expert.gate_proj"),
        ("llama", "model.layers.0.mlp.gate_proj"),
        ("olmo_hybrid", "model.layers.0.linear_attn.g_proj"),
        ("zamba2", "model.layers.0.mamba.in_proj"),
        ("llama", "model.layers.0.self_attn.b_proj"),
    ],
)
def test_layers_that_are_quantized(model_type: str, layer: str) -> None:
    assert engine_unquantized(model_type, layer) is None


def test_the_page_has_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and re.search(r"\| (vLLM|SGLang) ", line)]
    wanted = []
    for row in ENGINE_UNQUANTIZED:
        families = "any" if row.families == ".*" else row.families.replace("|", ", ")
        layers = row.layers.replace("|", "\\|")
        wanted.append(f"| {families} | `{layers}` | {row.reason} | {row.source} |")
    assert rows == wanted
