"""Whole runs in format mlx and auto_round:mlx: files, names, refusals, and opening in Transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_weights import arrays

from auto_round import AutoRound
from auto_round.errors import UnsupportedError, VerifyError
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.files.safetensors import TensorFiles


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["w3a16-mlx", "w4a16-mlx", "w5a16-mlx", "w6a16-mlx"])
def test_plain_rounding_gives_the_golden_files(
    name: str, golden_folder: Path, tmp_path: Path, read_json: Callable[..., dict[str, Any]]
) -> None:
    scheme = name.split("-")[0].upper()
    ar = AutoRound(str(golden_folder / "_source-tiny-llama"), scheme=scheme, iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out", format="mlx")
    ours, theirs = TensorFiles.open(tmp_path / "out"), TensorFiles.open(golden_folder / name)
    assert set(ours) == set(theirs)
    for key in theirs:
        one, other = ours.read(key), theirs.read(key)
        assert one.dtype == other.dtype and one.shape == other.shape, key
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), key
    config, wanted = read_json(tmp_path / "out", "config.json"), read_json(golden_folder / name, "config.json")
    for key in ("quantization", "quantization_config", "rope_theta", "model_type", "tie_word_embeddings"):
        assert config[key] == wanted[key]
    assert not (tmp_path / "out" / "quantization_config.json").exists()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_transformers_opens_auto_round_mlx(
    bits: int, sym: bool, make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any
) -> None:
    _, folders = make("llama", bits=bits, sym=sym, iters=0).quantize_and_save(tmp_path / "out", "auto_round:mlx,fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5
    report = read_json(folders[0], "report.json")
    assert report["verify"]["passed"] and report["verify"]["loss_reopened"] is not None


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt2", "opt", "gemma3", "phi", "mixtral", "qwen3-moe"])
def test_families_in_transformers(family: str, make: Callable[..., Any], logits: Any, tmp_path: Path) -> None:
    ar = make(family, iters=1, quant_lm_head=True, bits=6)
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round:mlx,fake")
    assert relative(logits(folders[0]), logits(folders[1])) < 1e-5


def test_a_mixture(make: Callable[..., Any], logits: Any, tmp_path: Path) -> None:
    ar = make(
        "llama", iters=0, ignore_layers="o_proj",
        layer_config={"k_proj": {"bits": 8, "group_size": 64}, "v_proj": {"sym": False}, "lm_head": {"bits": 3}},
    )  # fmt: skip
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round:mlx,mlx,fake")
    assert relative(logits(folders[0]), logits(folders[2])) < 1e-5
    one, other = TensorFiles.open(Path(folders[0])), TensorFiles.open(Path(folders[1]))
    assert set(one) == set(other)
    assert all(torch.equal(one.read(k).view(torch.uint8), other.read(k).view(torch.uint8)) for k in one)
    assert one.read("model.layers.0.self_attn.v_proj.biases").dtype == torch.float32


def test_what_was_loaded_can_be_saved_again(make: Callable[..., Any], logits: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make("qwen2", iters=0, bits=5, sym=False).quantize_and_save(tmp_path / "out", "auto_round:mlx")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    one, other = TensorFiles.open(tmp_path / "out"), TensorFiles.open(tmp_path / "again")
    packed = [k for k in one if k.endswith((".scales", ".biases")) or one.read(k).dtype == torch.uint32]
    assert packed
    for key in packed:
        assert one.read(key).dtype == other.read(key).dtype
        assert torch.equal(one.read(key).view(torch.uint8), other.read(key).view(torch.uint8)), key
    assert relative(logits(tmp_path / "again"), logits(tmp_path / "out")) == 0


def test_casting_keeps_scales_and_biases(make: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make("llama", iters=0, sym=False).quantize_and_save(tmp_path / "out", "auto_round:mlx")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    dense = layer.dequantize()
    half = copy.deepcopy(model).to(torch.bfloat16).model.layers[0].mlp.up_proj
    assert (half.scales.dtype, half.biases.dtype, half.dtype) == (torch.float16, torch.float32, torch.bfloat16)
    assert torch.equal(half.dequantize(), dense)
    codes, scales, zeros = arrays(layer)
    grouped = codes.view(96, -1, 32).float() - zeros.float().unsqueeze(-1)
    assert torch.equal((grouped * scales.float().unsqueeze(-1)).view(96, 64), dense)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("kept", ["", r"experts\.", "self_attn"])
def test_experts_are_stacked(family: str, kept: str, make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    ar = make(family, iters=0, ignore_layers=kept)
    ar.quantize_and_save(tmp_path / "out", "mlx")
    files = TensorFiles.open(tmp_path / "out")
    front = "model.layers.1." + ("block_sparse_moe" if family == "mixtral" else "mlp")
    assert not any("experts." in name for name in files)
    assert files.read(f"{front}.gate.weight").shape == (4, 64)
    stacked = files.read(f"{front}.switch_mlp.up_proj.weight")
    dense = kept.startswith("experts")
    assert stacked.dtype == (torch.float32 if dense else torch.uint32) and stacked.shape[0] == 4
    assert (f"{front}.switch_mlp.up_proj.scales" in files) != dense
    entry = read_json(tmp_path / "out", "config.json")["quantization"][f"{front}.switch_mlp.up_proj"]
    assert entry == (False if dense else {"group_size": 32, "bits": 4})
    assert read_json(tmp_path / "out", "report.json")["verify"]["passed"]


def test_experts_of_different_widths_are_refused_before_work(make: Callable[..., Any], tmp_path: Path) -> None:
    ar = make("qwen3-moe", iters=0, layer_config={r"experts\.1\.": {"bits": 8}})
    with pytest.raises(UnsupportedError, match="stacks the 4 experts.*all experts of a block the same bits"):
        ar.quantize_and_save(tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()
    ar.quantize_and_save(tmp_path / "out", "auto_round:mlx")  # separate tensors


def test_models_that_mlx_lm_cannot_take(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'mlx' cannot hold a model of type 'gpt2'.*transposes.*auto_round:mlx"):
        make("gpt2", iters=0).quantize_and_save(tmp_path / "out", "mlx")
    notes = make("opt", iters=0).plan("mlx").notes
    assert any("'opt' were not tried in mlx-lm" in note for note in notes)
    assert not any("not tried" in note for note in make("llama", iters=0).plan("mlx").notes)


def test_group_sizes_that_mlx_lacks_are_refused_before_work(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match="groups of 32, 64 or 128, not group_size 16.*formats that can: .*auto_round"
    ):
        make("llama", iters=0, group_size=16).quantize_and_save(tmp_path / "out", "mlx")
    with pytest.raises(UnsupportedError, match="layer model.layers.0.self_attn.k_proj.*not group_size -1"):
        make("llama", iters=0, layer_config={"k_proj": {"group_size": -1}}).plan("mlx")


def test_a_planted_fault_is_found(make: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    from auto_round.layouts import integers

    right, calls = integers.pack_rows, []

    def wrong(codes: torch.Tensor, bits: int) -> torch.Tensor:
        calls.append(1)
        return right(codes ^ 1 if len(calls) == 3 else codes, bits)

    monkeypatch.setattr(integers, "pack_rows", wrong)
    with pytest.raises(VerifyError, match="layers.0"):
        make("llama", iters=0).quantize_and_save(tmp_path / "out", "mlx")


def test_a_path_and_both_ways_to_save_give_the_same_bytes(
    make: Callable[..., Any], weights_hash: Any, tmp_path: Path
) -> None:
    for family in ("llama-tied", "mixtral"):
        kwargs = dict(iters=1, bits=3, quant_lm_head=True)
        ar = make(family, **kwargs)
        ar.quantize()
        ar.save_quantized(tmp_path / family / "kept", format="mlx")
        make(family, **kwargs).quantize_and_save(tmp_path / family / "direct", "mlx")
        assert weights_hash(tmp_path / family / "kept") == weights_hash(tmp_path / family / "direct")


def test_bits_per_weight_are_those_of_the_file(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    make("llama", iters=0, sym=False).quantize_and_save(tmp_path / "out", "mlx,auto_round")
    for name, wanted in (("mlx", 4 + (16 + 32) / 32), ("auto-round", 4 + (16 + 4) / 32)):
        layers = [layer for layer in read_json(tmp_path / "out" / name, "report.json")["layers"] if layer["bits"]]
        assert len(layers) == 14 and {layer["bits"] for layer in layers} == {wanted}
        assert f"{wanted:.2f} bits per quantized weight" in (tmp_path / "out" / name / "README.md").read_text()
