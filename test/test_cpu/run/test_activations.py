"""Whole runs with quantized activations: what is tuned, saved, opened again and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import ConfigError, UnsupportedError, VerifyError
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.files.safetensors import TensorFiles

STATIC = {"act_dynamic": False}


@pytest.fixture
def int8(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model="llama", **kw: make(
        model, **{"scheme": "INT8", "group_size": None, "iters": 0, "disable_opt_rtn": True, **kw}
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied"])
@pytest.mark.parametrize("options", [{}, STATIC, STATIC | {"act_sym": False}, {"act_sym": False, "sym": False}])
def test_saved_opened_and_in_memory_are_one(
    family: str,
    options: dict[str, Any],
    int8: Callable[..., Any],
    logits: Callable[[Any], torch.Tensor],
    earlier_int8: str,
    tmp_path: Path,
) -> None:
    int8(family, **options).quantize_and_save(tmp_path / "out", format=earlier_int8)
    ar = int8(family, **options)
    model, _ = ar.quantize()
    ar.save_quantized(tmp_path / "saved", format="llm_compressor")
    ours = logits(tmp_path / "out")
    assert torch.equal(ours, logits(model))
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14
    weights_only = logits_without_activations(model, logits)
    assert 1e-4 < float((ours - weights_only).norm() / ours.norm()) < 0.2
    one, other = TensorFiles.open(tmp_path / "out"), TensorFiles.open(tmp_path / "saved")
    assert set(one) == set(other) and all(torch.equal(one.read(k), other.read(k)) for k in one)


def logits_without_activations(model: Any, logits: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    kept = {m: m.format for m in model.modules() if isinstance(m, PackedLinear)}
    for module in kept:
        module.format = replace(module.format, scheme=replace(module.format.scheme, act_bits=16))
    found = logits(model)
    for module, fmt in kept.items():
        module.format = fmt
    return found


def test_a_model_object_quantizes_its_activations_from_then_on(
    int8: Callable[..., Any], packable_model: Callable[..., Any], logits: Callable[[Any], torch.Tensor],
    earlier_int8: str, tmp_path: Path,
) -> None:  # fmt: skip
    model = packable_model("llama")
    model.save_pretrained(tmp_path / "source")
    int8(str(tmp_path / "source")).quantize_and_save(tmp_path / "out", format=earlier_int8)
    live, _ = int8(model).quantize()
    assert live is model and torch.equal(logits(live), logits(tmp_path / "out"))


def test_static_scales_are_the_largest_inputs(
    int8: Callable[..., Any], packable_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    int8(**STATIC).quantize_and_save(tmp_path / "out", format="llm_compressor")
    files = TensorFiles.open(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(packable_folder("llama"), dtype=torch.float32)
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[torch.Tensor]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(torch.stack(token_ids))
    assert len(largest) == 14
    for name, value in largest.items():
        scale = files.read(f"{name}.input_scale")
        assert scale.shape == (1,) and float(scale) == pytest.approx(value / 127.5, rel=1e-4)


@pytest.mark.parametrize("options", [{}, STATIC])
def test_tuning_sees_the_quantized_activations(
    options: dict[str, Any], make: Callable[..., Any], tmp_path: Path
) -> None:
    """Four bits on both sides, where rounding has something to gain."""
    scheme = {"scheme": "INT4", "group_size": 32, "act_group_size": -1, **options}
    tuned = make("llama", iters=100, **scheme)
    tuned.quantize_and_save(tmp_path / "out", format="auto_round:llm_compressor")
    blocks = json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]
    assert all(b["loss_after"] <= b["loss_before"] for b in blocks)
    assert any(b["loss_after"] < b["loss_before"] for b in blocks)
    weights_only = make("llama", iters=1, scheme="W4A16", group_size=32)
    weights_only.quantize_and_save(tmp_path / "weights", format="auto_round")
    other = json.loads((tmp_path / "weights" / "report.json").read_text())["blocks"]
    assert blocks[0]["loss_before"] > 1.2 * other[0]["loss_before"]  # the loss holds the activations' error too


def test_a_quantized_head_and_mixed_layers(
    make: Callable[..., Any], logits: Callable[[Any], torch.Tensor], earlier_int8: str, tmp_path: Path
) -> None:
    ar = make(
        "llama", scheme="INT8", group_size=None, iters=0, quant_lm_head=True,
        layer_config={"mlp": STATIC, "o_proj": {"bits": 16, "act_bits": 16}},
    )  # fmt: skip
    ar.quantize_and_save(tmp_path / "out", format=f"llm_compressor,{earlier_int8}")
    ours = logits(tmp_path / "out" / "earlier-int8")
    assert bool(torch.isfinite(ours).all())
    files = TensorFiles.open(tmp_path / "out" / "llm-compressor")
    assert files.read("lm_head.weight").dtype == torch.int8 and "lm_head.input_scale" not in files
    assert "model.layers.0.mlp.up_proj.input_scale" in files
    assert files.read("model.layers.0.self_attn.o_proj.weight").dtype == torch.float32


def test_experts_one_by_one(
    make: Callable[..., Any], logits: Callable[[Any], torch.Tensor], earlier_int8: str, tmp_path: Path
) -> None:
    ar = make("qwen3-moe", scheme="INT8", group_size=None, act_dynamic=False, iters=0)
    ar.quantize_and_save(tmp_path / "out", format=earlier_int8)
    files = TensorFiles.open(tmp_path / "out")
    for expert in range(4):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert float(files.read(f"model.layers.0.mlp.experts.{expert}.{leaf}.input_scale")) > 0
    assert files.read("model.layers.0.mlp.gate.weight").dtype == torch.float32
    assert bool(torch.isfinite(logits(tmp_path / "out")).all())


def test_format_fake_says_what_it_leaves_out(int8: Callable[..., Any], tmp_path: Path) -> None:
    ar = int8()
    assert any("does not quantize activations" in note for note in ar.plan("fake").notes)
    assert not any("does not quantize activations" in note for note in ar.plan("llm_compressor").notes)
    ar.quantize_and_save(tmp_path / "out", format="fake")


@pytest.mark.parametrize("fmt", ["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "mlx"])
def test_formats_that_hold_weights_only(fmt: str, int8: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="formats that can: auto_round:llm_compressor, fake, llm_compressor"):
        int8().plan(fmt)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"act_bits": 1}, ConfigError, "act_bits=1"), ({"act_bits": 9}, ConfigError, "act_bits=9"),
    ({"act_group_size": 32, "act_dynamic": False}, UnsupportedError, "a static scale is one for the whole layer"),
    ({"act_data_type": "mx_fq"}, UnsupportedError, "activations of data type 'mx_fq'"),
    ({"act_data_type": "fp", "act_bits": 4}, UnsupportedError, "'fp' with 4 bits is not available"),
    ({"act_group_size": (1, 8)}, ConfigError, "is a block"),
])  # fmt: skip
def test_what_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, int8: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=message):
        int8(**options).plan("fake")


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "input_scale"])
def test_the_check_after_saving_looks_at_every_part(
    leaf: str, int8: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_round.formats.config_compressed_tensors import CompressedTensorsFormat

    honest = CompressedTensorsFormat.pack

    def broken(self: Any, layer: Any, **options: Any) -> dict[str, torch.Tensor]:
        tensors = honest(self, layer, **options)
        if layer.name.endswith("layers.1.mlp.up_proj"):
            tensor = tensors[f"{layer.name}.{leaf}"]
            tensor.view(-1)[0] = tensor.view(-1)[0] + 1
        return tensors

    monkeypatch.setattr(CompressedTensorsFormat, "pack", broken)
    for fmt in ("llm_compressor", "auto_round:llm_compressor"):
        with pytest.raises(VerifyError, match=r"layers.1.mlp.up_proj does not hold what was tuned"):
            int8(**STATIC).quantize_and_save(tmp_path / fmt.replace(":", "-"), format=fmt)


@pytest.mark.parametrize("scheme", ["INT8", "FP8_STATIC", "MXFP4", "NVFP4", "FP8_BLOCK", "FPW8A16", "W4A16"])
def test_the_long_name_is_plain_compressed_tensors(
    scheme: str, make: Callable[..., Any], packable_folder: Callable[..., str], tmp_path: Path
) -> None:
    """As auto-round writes it, tensor for tensor and word for word what `llm_compressor` gives."""
    folder = packable_folder("llama", hidden_size=128, intermediate_size=256)
    ar = make(folder, scheme=scheme, group_size=None, iters=0, layer_config={"o_proj": {"bits": 16, "act_bits": 16}})
    ar.quantize_and_save(tmp_path / "out", format="llm_compressor,auto_round:llm_compressor")
    one, other = (tmp_path / "out" / name for name in ("llm-compressor", "auto-round-llm-compressor"))
    config = json.loads((other / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config == json.loads((one / "config.json").read_text())
    files = TensorFiles.open(one), TensorFiles.open(other)
    assert set(files[0]) == set(files[1]) and all(torch.equal(files[0].read(k), files[1].read(k)) for k in files[0])
