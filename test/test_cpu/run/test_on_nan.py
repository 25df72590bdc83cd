"""What a run does about NaN and Inf in weights, calibration, tuning and scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.errors import AutoRoundError, ConfigError, NumericsError, UnsupportedError

Q1 = "model.layers.1.self_attn.q_proj"
QKV1 = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def edited(packable_folder: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """`edited(change, family="llama")`: a copy of a model's folder whose tensors `change` edited in place."""
    from safetensors.torch import load_file, save_file

    def make(change: Edit, family: str = "llama", source: str | None = None) -> str:
        copy = tmp_path / f"edited-{family}"
        shutil.copytree(source or packable_folder(family), copy)
        tensors = {name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return str(copy)

    return make


def nan_in_q1(t: dict[str, torch.Tensor]) -> None:
    t[f"{Q1}.weight"][3, 5] = float("nan")


def overflow_in_block_0(t: dict[str, torch.Tensor]) -> None:
    t["model.layers.0.mlp.down_proj.weight"][:, ::2] = 3e38


def huge_but_finite(t: dict[str, torch.Tensor]) -> None:
    """Activations near 1e25: their squared error is beyond float32."""
    t["model.layers.0.mlp.down_proj.weight"] *= 1e25


def quantize(folder: str, out: Path, token_ids: Any, format: str = "auto_round", **options: Any) -> dict[str, Any]:
    values = {"iters": 2, "group_size": 32, "dataset": token_ids, "seqlen": 24, "nsamples": 8, "batch_size": 4}
    AutoRound(folder, **(values | options)).quantize_and_save(out, format)
    return json.loads((out / "report.json").read_text())


def left(report: dict[str, Any]) -> list[str]:
    """Layers of the blocks in full precision, routers left out."""
    dense = (r for r in report["layers"] if r["bits"] is None and "chooses experts" not in (r["reason"] or ""))
    return [r["name"] for r in dense if r["name"].startswith("model.layers")]


@pytest.mark.parametrize("policy", ["fail", "rtn"])
def test_a_damaged_weight_is_named(edited: Any, token_ids: Any, tmp_path: Path, policy: str) -> None:
    with pytest.raises(NumericsError, match=f"{Q1}.weight' holds 1 NaN"):
        quantize(edited(nan_in_q1), tmp_path / "out", token_ids, on_nan=policy)
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("iters", [0, 2])
@pytest.mark.parametrize("where", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_damage_outside_the_blocks_is_named(
    edited: Any, token_ids: Any, tmp_path: Path, where: str, iters: int
) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t[where].view(-1)[7] = float("inf")

    with pytest.raises(NumericsError, match=where):
        quantize(edited(change), tmp_path / "out", token_ids, iters=iters, disable_opt_rtn=True, verify=False)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("auto_round", {}),
        ("auto_gptq", {}),
        ("auto_awq", {"sym": False}),
        ("llm_compressor", {}),
        ("mlx", {}),
        ("auto_round", {"scheme": "MXFP4"}),
        ("auto_round", {"scheme": "W8A16"}),
        ("fake", {}),
    ],
)
def test_a_damaged_layer_stays_like_an_ignored_one(
    edited: Any, packable_folder: Any, token_ids: Any, tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    if "scheme" in options:
        options = options | {"group_size": None}
    options = {"iters": 0, "disable_opt_rtn": True} | options
    report = quantize(edited(nan_in_q1), tmp_path / "out", token_ids, format, on_nan="keep", **options)
    clean = packable_folder("llama")
    ignored = quantize(clean, tmp_path / "ref", token_ids, format, ignore_layers=",".join(QKV1), **options)
    assert left(report) == left(ignored) == QKV1
    reasons = {r["name"]: r["reason"] for r in report["layers"]}
    assert reasons[Q1].startswith("its weight holds 1 NaN") and "fuse" in reasons[QKV1[1]]
    assert report["numerics"]["kept"].keys() == set(QKV1)
    assert report["verify"]["passed"] and report["verify"]["loss_reopened"] is None
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "ref"))
    for config in (one, two):
        config.get("quantization_config", {}).pop("on_nan", None)
        config.get("quantization_config", {}).pop("provider", None)
    assert one == two
    kept, reference = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "ref"))
    assert kept.keys() == reference.keys()
    different = [n for n in kept if not torch.equal(kept[n].view(torch.uint8), reference[n].view(torch.uint8))]
    assert different == [f"{Q1}.weight"] and kept[f"{Q1}.weight"][3, 5].isnan()


def test_gguf_keeps_a_damaged_layer_dense(edited: Any, gguf_folder: Any, token_ids: Any, tmp_path: Path) -> None:
    from auto_round.gguf.reader import GgufTensors

    folder = edited(nan_in_q1, source=gguf_folder("llama"))
    report = quantize(folder, tmp_path / "out", token_ids, "gguf:q4_k_m", on_nan="keep", iters=0, group_size=None)
    assert left(report) == QKV1 and report["verify"]["passed"]
    file = GgufTensors(next((tmp_path / "out").glob("*.gguf")))
    assert file.tensors["blk.1.attn_q.weight"].kind == file.tensors["blk.1.attn_k.weight"].kind == "F32"
    assert file.tensors["blk.0.attn_q.weight"].kind == "Q4_K"
    assert int(file.stored("blk.1.attn_q.weight").isnan().sum()) == 1


def test_gguf_refuses_a_damaged_embedding(edited: Any, gguf_folder: Any, token_ids: Any, tmp_path: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t["model.embed_tokens.weight"][7, 0] = float("nan")

    folder = edited(change, source=gguf_folder("llama"))
    with pytest.raises(NumericsError, match="embed_tokens.*stores it as Q"):
        quantize(folder, tmp_path / "out", token_ids, "gguf:q4_0", on_nan="keep", iters=0, group_size=None)


def test_overflow_in_calibration_fails_and_names_the_block(edited: Any, token_ids: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="block model.layers.0 gives NaN or Inf in full precision"):
        quantize(edited(overflow_in_block_0), tmp_path / "out", token_ids)


@pytest.mark.parametrize("iters", [0, 2])
def test_overflow_in_calibration_falls_back_to_rounding(
    edited: Any, token_ids: Any, tmp_path: Path, iters: int
) -> None:
    folder = edited(overflow_in_block_0)
    report = quantize(folder, tmp_path / "out", token_ids, on_nan="rtn", iters=iters)
    plain = quantize(folder, tmp_path / "ref", token_ids, on_nan="rtn", iters=0, disable_opt_rtn=True)
    assert left(report) == [] and len(report["numerics"]["rounded_plainly"]) == 14
    assert plain["numerics"]["rounded_plainly"] == {}
    names = ("out", "ref")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1
    reasons = {r["name"]: r["reason"] for r in report["layers"]}
    assert "block model.layers.0 gives NaN or Inf" in reasons["model.layers.0.mlp.up_proj"]
    assert "no finite calibration data since block model.layers.0" in reasons[Q1]


def test_overflow_in_calibration_keeps_the_block_at_fault(edited: Any, token_ids: Any, tmp_path: Path) -> None:
    report = quantize(edited(overflow_in_block_0), tmp_path / "out", token_ids, on_nan="keep")
    assert {name.split(".")[2] for name in left(report)} == {"0"} and len(left(report)) == 7
    assert Q1 in report["numerics"]["rounded_plainly"] and report["verify"]["passed"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sum(entry.get("bits") == 16 for entry in config["extra_config"].values()) == 7


def test_experts_that_stay_are_fused_as_ever(edited: Any, token_ids: Any, tmp_path: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t["model.layers.0.self_attn.o_proj.weight"][:] = 3e38

    report = quantize(edited(change, "qwen3-moe"), tmp_path / "out", token_ids, on_nan="keep", iters=0)
    assert all(name.startswith("model.layers.0") for name in left(report)) and report["verify"]["passed"]
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_gguf_cannot_keep_a_block_once_it_has_begun(
    edited: Any, gguf_folder: Any, token_ids: Any, tmp_path: Path
) -> None:
    folder = edited(overflow_in_block_0, source=gguf_folder("llama"))
    with pytest.raises(NumericsError, match="fixes the type of every tensor"):
        quantize(folder, tmp_path / "out", token_ids, "gguf:q4_0", on_nan="keep", group_size=None)
    assert not list((tmp_path / "out").glob("*.gguf"))
    report = quantize(folder, tmp_path / "plain", token_ids, "gguf:q4_0", on_nan="rtn", group_size=None)
    assert report["numerics"]["clamped_scales"]["model.layers.0.mlp.down_proj"] > 0


def test_a_loss_beyond_float32(edited: Any, token_ids: Any, tmp_path: Path) -> None:
    folder = edited(huge_but_finite)
    with pytest.raises(NumericsError, match="block model.layers.0: the loss is inf"):
        quantize(folder, tmp_path / "a", token_ids)
    report = quantize(folder, tmp_path / "b", token_ids, on_nan="rtn")
    assert "model.layers.0.mlp.up_proj" in report["numerics"]["rounded_plainly"]
    assert any("loss is inf" in line for line in report["numerics"]["incidents"])
    kept = quantize(folder, tmp_path / "c", token_ids, on_nan="keep")
    assert "model.layers.0.mlp.up_proj" in left(kept)


def test_fixed_scales_leave_nothing_to_fall_back_on(edited: Any, token_ids: Any, tmp_path: Path) -> None:
    folder = edited(overflow_in_block_0)
    options = {"scheme": "FP8_STATIC", "group_size": None, "iters": 0}
    with pytest.raises(NumericsError, match="scales of the inputs of .* come from calibration data"):
        quantize(folder, tmp_path / "a", token_ids, on_nan="rtn", **options)
    report = quantize(folder, tmp_path / "kept", token_ids, on_nan="keep", **options)
    assert len(left(report)) == 14 and "no finite one" in report["numerics"]["kept"][Q1]
    with pytest.raises(NumericsError, match="key-value cache"):
        quantize(folder, tmp_path / "b", token_ids, on_nan="rtn", static_kv_dtype="fp8")


def test_scales_beyond_float16_are_clamped_and_counted(
    edited: Any, token_ids: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t[f"{Q1}.weight"][3, :32] = 1e7

    caplog.set_level("WARNING", "auto_round")
    report = quantize(edited(change), tmp_path / "out", token_ids, iters=0, disable_opt_rtn=True)
    assert report["numerics"]["clamped_scales"] == {Q1: 1} and report["verify"]["passed"]
    assert f"1 scales were beyond the range of their dtype and are clamped to its largest value: {Q1};" in caplog.text
    options = {"iters": 0, "disable_opt_rtn": True, "scale_dtype": "fp32"}
    report = quantize(str(tmp_path / "edited-llama"), tmp_path / "wide", token_ids, "fake", **options)
    assert report["numerics"]["clamped_scales"] == {}


def test_quantizing_in_memory_keeps_too(edited: Any, token_ids: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = edited(nan_in_q1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ar = AutoRound(model, tokenizer, iters=0, group_size=32, dataset=token_ids, seqlen=24, on_nan="keep")
    _, layers = ar.quantize()
    assert [name for name, fields in layers.items() if fields["bits"] == 16 and "layers" in name] == QKV1
    ar.save_quantized(tmp_path / "out")
    assert left(json.loads((tmp_path / "out" / "report.json").read_text())) == QKV1


def test_what_is_refused(packable_folder: Any) -> None:
    with pytest.raises(ConfigError, match="on_nan='skip' is not allowed; use fail, rtn, keep"):
        AutoRound(packable_folder("llama"), on_nan="skip")
    with pytest.raises(UnsupportedError, match="model-free mode plans every byte"):
        AutoRound(packable_folder("llama"), on_nan="keep", model_free=True)


@pytest.mark.parametrize("policy", ["rtn", "keep"])
def test_an_interrupted_run_remembers_what_was_not_finite(
    edited: Any, token_ids: Any, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_round.run import blocks as blockwise

    folder = edited(overflow_in_block_0)
    whole = quantize(folder, tmp_path / "whole", token_ids, on_nan=policy)
    real = blockwise._quantize_block

    def stopping(index: int, *args: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return real(index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "_quantize_block", stopping)
        with pytest.raises((KeyboardInterrupt, AutoRoundError)):
            quantize(folder, tmp_path / "out", token_ids, on_nan=policy)
    report = quantize(folder, tmp_path / "out", token_ids, on_nan=policy)
    for key in ("numerics", "layers", "files"):
        assert report[key] == whole[key], key
