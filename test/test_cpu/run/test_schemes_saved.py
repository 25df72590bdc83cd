"""Bits, symmetry, group sizes and mixtures on one family: what is saved is what Transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def relative(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits(bits: int, sym: bool, make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any) -> None:
    ar = make("llama", bits=bits, sym=sym, iters=0)
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5
    config = read_json(folders[0], "config.json")["quantization_config"]
    assert (config["bits"], config["sym"], config["group_size"], config["quant_method"]) == (
        bits,
        sym,
        32,
        "auto-round",
    )
    packing = "auto_round:auto_gptq" if sym else "auto_round:auto_awq" if bits == 4 else "auto_round"
    assert config["packing_format"] == packing
    assert read_json(folders[0], "quantization_config.json") == config
    assert "quantization_config" not in read_json(folders[1], "config.json")


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [-1, 0, 16, 64, 128])  # 64 does not divide 96, 128 is more than a row
def test_group_sizes(size: int, sym: bool, make: Callable[..., Any], logits: Any, tmp_path: Path) -> None:
    for iters in (0, 1):
        ar = make("llama", group_size=size, sym=sym, iters=iters)
        _, folders = ar.quantize_and_save(tmp_path / str(iters), "auto_round,fake")
        assert relative(logits(folders[0]), logits(folders[1])) < 1e-5


def test_a_mixture(make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any) -> None:
    ar = make(
        "llama",
        iters=1,
        layer_config={
            "k_proj": {"bits": 8, "group_size": -1}, "model.layers.0.mlp.down_proj": "W2A16G32",
            "v_proj": {"sym": False},
            "lm_head": {"bits": 4, "group_size": 64}, "layers.1.mlp.gate_proj": {"bits": 3, "sym": False},
        },
        ignore_layers="o_proj",
    )  # fmt: skip
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5
    extra = read_json(folders[0], "config.json")["quantization_config"]["extra_config"]
    assert extra["model.layers.1.self_attn.o_proj"] == {"bits": 16}
    assert extra["model.layers.0.self_attn.k_proj"] == {"bits": 8, "group_size": -1}
    assert extra["model.layers.0.mlp.down_proj"]["bits"] == 2
    assert extra["lm_head"]["bits"] == 4 and extra["lm_head"]["group_size"] == 64
    assert "model.layers.0.mlp.gate_proj" not in extra


@pytest.mark.parametrize("fmt", ["auto_round:auto_gptq", "auto_round:auto_awq"])
@pytest.mark.parametrize("sym", [True, False])
def test_layouts_by_name(fmt: str, sym: bool, make: Callable[..., Any], logits: Any, tmp_path: Path) -> None:
    _, folders = make("llama", iters=0, sym=sym).quantize_and_save(tmp_path / "out", f"{fmt},fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5


def test_layers_that_no_layout_takes_stay_as_they_are(
    make: Callable[..., Any], logits: Any, tmp_path: Path, packable_folder: Any, read_json: Any
) -> None:
    folder = packable_folder("llama", intermediate_size=80)  # 80 is no multiple of 32
    ar = make(folder, iters=0)
    notes = ar.plan("auto_round").notes
    assert any("mlp.gate_proj stays in full precision: format auto_round: out_features=80" in note for note in notes)
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5
    layers = {layer["name"]: layer for layer in read_json(folders[0], "report.json")["layers"]}
    assert layers["model.layers.0.mlp.gate_proj"]["scheme"] == "full precision"
    assert "80" in layers["model.layers.0.mlp.gate_proj"]["reason"]
    assert layers["model.layers.0.self_attn.q_proj"]["scheme"] == "int4 g32 sym"


def test_some_blocks_only(make: Callable[..., Any], tmp_path: Path, logits: Any) -> None:
    ar = make("llama", iters=1, to_quant_block_names="model.layers.1")
    assert all(name.startswith("model.layers.1.") for name in ar.plan("auto_round").quantized())
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5


def test_small_files(make: Callable[..., Any], tmp_path: Path, logits: Any, read_json: Any) -> None:
    make("llama", iters=0).quantize_and_save(tmp_path / "one")
    make("llama", iters=0).quantize_and_save(tmp_path / "many", max_shard_size="20KB")
    index = read_json(tmp_path / "many", "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    assert relative(logits(tmp_path / "many"), logits(tmp_path / "one")) == 0
