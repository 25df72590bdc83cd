"""Whole runs on Mixtral: experts lie in the file, and are spoken of, as Mixtral's own checkpoints name them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.eval.evaluate import load_model
from auto_round.modeling.files.safetensors import TensorFiles

FORMATS = ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_gptq", "auto_awq")
MOE = "model.layers.{}.block_sparse_moe"


def quantization_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def folder_of(out: Path, fmt: str) -> Path:
    return out / fmt.replace("_", "-").replace(":", "-")


@pytest.fixture
def opened(logits: Callable[[Any], torch.Tensor]) -> Callable[[Path], torch.Tensor]:
    """Logits of a folder in any of the formats, compared with those of what `save_pretrained` makes of it."""

    def compute(folder: Path) -> torch.Tensor:
        model = load_model(folder, dtype=torch.float32)
        again = folder.parent / f"{folder.name}-again"
        model.save_pretrained(again)
        assert set(TensorFiles.open(again)) == set(TensorFiles.open(folder))
        assert torch.equal(logits(load_model(again, dtype=torch.float32)), logits(model))
        return logits(model)

    return compute


@pytest.mark.parametrize("sym", [True, False])
def test_every_packing_has_the_familys_names(
    sym: bool, make: Callable[..., Any], logits: Any, opened: Callable[[Path], torch.Tensor], tmp_path: Path
) -> None:
    formats = FORMATS if sym else FORMATS[::2]
    ar = make("mixtral", sym=sym, iters=0, ignore_layers="layers.1.self_attn.q_proj")
    ar.quantize_and_save(tmp_path / "out", format=",".join([*formats, "fake"]))
    expected = logits(tmp_path / "out" / "fake")
    for fmt in formats:
        folder = folder_of(tmp_path / "out", fmt)
        names = set(TensorFiles.open(folder))
        assert not any(".mlp." in name for name in names)
        for block in range(2):
            front = MOE.format(block)
            assert f"{front}.gate.weight" in names
            for expert in range(4):
                for leaf in ("w1", "w2", "w3"):
                    stored = {name for name in names if name.startswith(f"{front}.experts.{expert}.{leaf}.")}
                    leaves = {name.rpartition(".")[2] for name in stored}
                    assert leaves == {"qweight", "qzeros", "scales"} | ({"g_idx"} if fmt == "auto_gptq" else set())
        config = quantization_of(folder)
        assert ".mlp." not in json.dumps(config) and "gate_proj" not in json.dumps(config)
        if fmt == "auto_awq":
            assert f"{MOE.format(1)}.gate" in config["modules_to_not_convert"]
        elif fmt == "auto_gptq":
            assert r"-:^model\.layers\.\d+\.block_sparse_moe\.gate$" in config["dynamic"]
        else:
            assert config["extra_config"][f"{MOE.format(0)}.gate"] == {"bits": 16}
            assert config["block_name_to_quantize"] == "model.layers"
        assert torch.allclose(opened(folder), expected, atol=1e-5), fmt


def test_bits_of_single_experts(
    make: Callable[..., Any], logits: Any, opened: Callable[[Path], torch.Tensor], tmp_path: Path
) -> None:
    layers = {r"layers\.0.*experts\.1\.gate_proj": {"bits": 8}, r"layers\.1.*experts\.2\.": {"bits": 2}}
    ar = make("mixtral", iters=0, layer_config=layers)
    ar.quantize_and_save(tmp_path / "out", format="auto_round,auto_gptq,fake")
    expected = logits(tmp_path / "out" / "fake")
    ours, gptq = (folder_of(tmp_path / "out", fmt) for fmt in ("auto_round", "auto_gptq"))
    extra = quantization_of(ours)["extra_config"]
    bits = {f"{MOE.format(0)}.experts.1.w1": 8} | {f"{MOE.format(1)}.experts.2.w{i}": 2 for i in (1, 2, 3)}
    assert {name: entry["bits"] for name, entry in extra.items() if "\\" not in name and "experts" in name} == bits
    rules = quantization_of(gptq)["dynamic"]
    assert {rule["bits"] for name, rule in rules.items() if "w" in name and rule} == {8, 2}
    for folder in (ours, gptq):
        assert torch.allclose(opened(folder), expected, atol=1e-5)


@pytest.mark.parametrize(("kept", "dense"), [
    (r"mlp\.experts\.", "block_sparse_moe.experts.1.w1.weight"),
    (r"experts\.1\.", "block_sparse_moe.experts.1.gate_proj.weight"),
    (r"experts\..*\.gate_proj", "block_sparse_moe.experts.1.gate_proj.weight"),
])  # fmt: skip
@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "auto_awq"])
def test_dense_experts_are_found_and_saved_again(
    kept: str, dense: str, fmt: str, make: Callable[..., Any], logits: Any, opened: Callable[[Path], torch.Tensor],
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """All of a block as the family has them; beside packed ones under a name that Transformers does not join."""
    ar = make("mixtral", iters=0, ignore_layers=[kept])
    ar.quantize_and_save(tmp_path / "out", format=f"{fmt},fake")
    folder = folder_of(tmp_path / "out", fmt)
    assert f"model.layers.0.{dense}" in TensorFiles.open(folder)
    said = {"auto_round": "extra_config", "auto_gptq": "dynamic", "auto_awq": "modules_to_not_convert"}[fmt]
    names = [name.replace("\\.", ".").replace("\\d+", "1") for name in quantization_of(folder)[said]]
    assert any("block_sparse_moe.experts.1.w1" in name for name in names)
    caplog.clear()
    assert torch.allclose(opened(folder), logits(tmp_path / "out" / "fake"), atol=1e-5)
    assert "stored dense" not in caplog.text


@pytest.mark.parametrize(("fmt", "options"), [
    ("earlier:int8", {"scheme": "INT8", "group_size": None}), ("auto_round:mlx", {}),
])  # fmt: skip
def test_packed_tensors_called_weight_keep_the_modules_last_names(
    fmt: str, options: dict[str, Any], make: Callable[..., Any], opened: Callable[[Path], torch.Tensor],
    earlier_int8: str, tmp_path: Path,
) -> None:  # fmt: skip
    make("mixtral", iters=0, **options).quantize_and_save(tmp_path / "out", format=fmt)
    assert "model.layers.0.block_sparse_moe.experts.3.down_proj.weight" in TensorFiles.open(tmp_path / "out")
    assert bool(opened(tmp_path / "out").isfinite().all())
