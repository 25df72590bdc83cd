"""What our formats write, the loader opens: logits equal to those of the model with dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_weights import arrays
from safetensors.torch import load_file, save_file

from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.inference.convert_model import convert_hf_model, infer_target_device
from auto_round.inference.linear import QuantLinear
from auto_round.schemes import QuantizationScheme as Scheme

IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8], [7, 7, 1, 0, 60, 31, 12, 2]])


def open_model(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def error_of(model: Any, fake: Any) -> float:
    with torch.no_grad():
        a, b = model(IDS).logits, fake(IDS).logits
    return float((a - b).norm() / b.norm())


def check(written: Any, **kwargs: Any) -> Any:
    model = open_model(written.folder, **kwargs)
    for name, layer in written.layers.items():
        module = model.get_submodule(name)
        codes, scale, zero = arrays(module)
        assert torch.equal(codes, layer.codes.codes), name
        assert torch.equal(module.dequantize(), layer.dequantize()), name
        point = layer.codes.zero_point
        assert torch.equal(zero, point if isinstance(point, torch.Tensor) else torch.full_like(zero, point)), name
        assert torch.equal(scale, layer.codes.scale), name
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(written.layers)
    assert error_of(model, written.fake) < 1e-5
    return model


@pytest.mark.parametrize("group_size", [32, -1, 128, 48])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_loaded_logits_are_the_fake_ones(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], bits: int, sym: bool, group_size: int
) -> None:
    check(write_checkpoint(llama(), Scheme(bits=bits, sym=sym, group_size=group_size)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fault_1_asymmetric_zero_points_are_what_the_packing_says(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], bits: int
) -> None:
    """Writing zp - 1 under a packing that means "no -1" triples the error of the weights: the two must agree."""
    written = write_checkpoint(llama(), Scheme(bits=bits, sym=False, group_size=32))
    name = "model.layers.0.mlp.up_proj"
    qzeros = load_file(written.folder / "model.safetensors")[f"{name}.qzeros"]
    mask, first = (1 << bits) - 1, int(written.layers[name].codes.zero_point[0, 0])
    assert written.config["packing_format"] == ("auto_round:auto_awq" if bits == 4 else "auto_round")
    assert int(qzeros[0, 0]) & mask == first  # column 0 is the lowest bits in both layouts: stored as it is
    check(written)


def test_fault_17_asymmetric_4_bits_load_without_other_packages(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any]
) -> None:
    written = write_checkpoint(llama(), Scheme(bits=4, sym=False, group_size=32))
    model = check(written)
    assert {m.format.packing for m in model.modules() if isinstance(m, QuantLinear)} == {"awq"}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_0_wraps_in_gptq_packing(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], bits: int
) -> None:
    model = llama()
    with torch.no_grad():  # no negative weight: the zero point is 0, stored as 2**bits - 1
        model.model.layers[0].mlp.up_proj.weight.abs_()
    written = write_checkpoint(model, Scheme(bits=bits, sym=False, group_size=32), None, "auto_round:auto_gptq")
    assert (written.layers["model.layers.0.mlp.up_proj"].codes.zero_point == 0).all()
    check(written)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_not_rounded_by_the_load_dtype(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], dtype: torch.dtype, sym: bool
) -> None:
    """Weights in `dtype` are the float32 weights rounded once: float16 scales must not pass through bfloat16."""
    written = write_checkpoint(llama(), Scheme(bits=4, group_size=32, sym=sym))
    model = open_model(written.folder, dtype)
    loses = 0
    for move in (None, torch.float32, torch.bfloat16):
        if move is not None:
            model.to(move)
        for name, layer in written.layers.items():
            module = model.get_submodule(name)
            assert module.scales.dtype == torch.float16 and torch.equal(module.scales.T, layer.codes.scale)
            assert torch.equal(module.dequantize(dtype), layer.dequantize().to(dtype))
            loses += int((layer.codes.scale.bfloat16().half() != layer.codes.scale).sum())
    assert loses  # rounding the scales would have shown
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.bfloat16


def test_forced_awq_packing_holds_symmetric_layers(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any]
) -> None:
    written = write_checkpoint(llama(), Scheme(bits=4, group_size=32), None, "auto_round:auto_awq")
    assert written.config["packing_format"] == "auto_round:auto_awq"
    check(written)


def test_mixed_recipes_and_a_quantized_head(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    layers = {
        "model.layers.0.self_attn.k_proj": Scheme(bits=8, group_size=32),
        "model.layers.1.mlp.down_proj": Scheme(bits=16),
        "model.layers.1.self_attn.q_proj": Scheme(bits=4, group_size=16, sym=False),
        "model.layers.1.self_attn.v_proj": Scheme(bits=3, group_size=64, sym=False),
        "lm_head": Scheme(bits=4, group_size=64),
    }
    written = write_checkpoint(llama(), Scheme(bits=4, group_size=32), layers, max_shard_size=20000)
    assert len(list(written.folder.glob("*.safetensors"))) > 1
    model = check(written)
    assert isinstance(model.lm_head, QuantLinear)
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear


def test_a_quantized_head_is_no_longer_tied(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    built = llama(tie_word_embeddings=True)
    head = torch.nn.Linear(64, 96, bias=False)
    head.weight.data = built.model.embed_tokens.weight.detach().clone()
    built.lm_head = head  # what a quantizer does before it quantizes a tied head
    built.all_tied_weights_keys = {}
    written = write_checkpoint(built, Scheme(group_size=32), {"lm_head": Scheme(bits=8, group_size=32)})
    assert json.loads((written.folder / "config.json").read_text())["tie_word_embeddings"]
    model = check(written)
    assert model.config.tie_word_embeddings is False


def test_tied_embeddings_stay_tied(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    written = write_checkpoint(llama(tie_word_embeddings=True), Scheme(group_size=32))
    assert "lm_head.weight" not in load_file(written.folder / "model.safetensors")
    model = check(written)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_fake_format_is_an_ordinary_checkpoint(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    written = write_checkpoint(llama(torch.bfloat16), Scheme(bits=3, group_size=32), None, "fake")
    stored = load_file(written.folder / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in stored.values()) and not written.config
    model = open_model(written.folder, torch.bfloat16)
    assert "quantization_config" not in json.loads((written.folder / "config.json").read_text())
    for name, layer in written.layers.items():
        assert torch.equal(model.get_submodule(name).weight, layer.dequantize(torch.bfloat16))


@pytest.mark.parametrize("format_name", ["auto_round", "fake"])
@pytest.mark.parametrize("sym", [True, False])
def test_conv1d_layers(write_checkpoint: Callable[..., Any], sym: bool, format_name: str) -> None:
    """GPT-2 stores its weights as [in, out] and has biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    built = GPT2LMHeadModel(config).eval()
    for name, parameter in built.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    written = write_checkpoint(built, Scheme(bits=4, group_size=32, sym=sym), None, format_name)
    assert len(written.layers) == 8
    if format_name == "fake":
        assert error_of(open_model(written.folder), written.fake) < 1e-6
    else:
        model = check(written)
        assert model.transformer.h[0].attn.c_attn.out_features == 192


@pytest.mark.parametrize("sym", [True, False])
def test_experts_become_linear_layers(write_checkpoint: Callable[..., Any], sym: bool) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from auto_round.modeling.experts import unfuse_experts

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    fused = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        before = fused(IDS).logits
        assert len(unfuse_experts(fused)) == 2
        assert torch.allclose(fused(IDS).logits, before, atol=1e-5)
    dense = {f"model.layers.1.mlp.experts.{e}.{p}": Scheme(bits=16) for e in (0, 3) for p in ("up_proj", "down_proj")}
    written = write_checkpoint(fused, Scheme(bits=4, group_size=32, sym=sym), dense)
    assert sum("experts" in name for name in written.layers) == 24 - 4
    model = check(written)
    assert type(model.model.layers[1].mlp.experts.get_submodule("0.up_proj")) is torch.nn.Linear


def test_a_dense_checkpoint_of_experts_stays_fused(write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Experts listed as 16 bits: no layer of theirs is replaced."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    written = write_checkpoint(Qwen3MoeForCausalLM(config).eval(), Scheme(bits=4, group_size=32))
    assert len(written.layers) == 4
    model = check(written)
    assert model.model.layers[0].mlp.experts.gate_up_proj.dim() == 3


def test_save_and_load_again(llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    layers = {"model.layers.0.self_attn.v_proj": Scheme(bits=3, group_size=64, sym=False)}
    written = write_checkpoint(llama(attention_bias=True), Scheme(bits=2, group_size=32, sym=False), layers)
    model = check(written)
    model.save_pretrained(tmp_path / "again")
    first, second = load_file(written.folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(first) == set(second) and all(torch.equal(second[k], v) for k, v in first.items())
    again = open_model(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_training_through_packed_layers_reaches_the_input(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any]
) -> None:
    model = open_model(write_checkpoint(llama(), Scheme(group_size=32)).folder)
    model(IDS).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_a_missing_tensor_is_named(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    folder = write_checkpoint(llama(), Scheme(group_size=32)).folder
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.qzeros"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.qzeros"):
        open_model(folder)


def test_a_missing_tensor_is_named_when_the_files_were_not_seen(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(llama(), Scheme(group_size=32)).folder
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("auto_round.inference.convert_model.checkpoint_tensors", lambda model: None)
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.scales"):
        open_model(folder)


def test_loading_without_seeing_the_files(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_checkpoint(llama(), Scheme(group_size=32), {"lm_head": Scheme(bits=8, group_size=32)})
    monkeypatch.setattr("auto_round.inference.convert_model.checkpoint_tensors", lambda model: None)
    check(written)


def test_bits_that_the_files_do_not_have(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    folder = write_checkpoint(llama(), Scheme(group_size=32)).folder
    rewrite(folder, lambda c: c.update(bits=8))
    with pytest.raises(ModelError, match=r"qweight has shape \[8, 64\].*asks for \[16, 64\]"):
        open_model(folder)


def test_packed_tensors_that_the_config_calls_dense(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any]
) -> None:
    folder = write_checkpoint(llama(), Scheme(group_size=32)).folder
    rewrite(folder, lambda c: c.update(extra_config={"model.layers.0.mlp.up_proj": {"bits": 16}}))
    with pytest.raises(ModelError, match="model.layers.0.mlp.up_proj is packed"):
        open_model(folder)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"packing_format": "auto_round:fp8"}, UnsupportedError, "auto_round:fp8"),
        ({"data_type": "mx_fp", "bits": 6}, UnsupportedError, "mx_fp"),
        ({"act_bits": 8}, UnsupportedError, "activations of 8 bits"),
        ({"rotation_config": {"block_size": 32}}, UnsupportedError, "rotation_config"),
        ({"backend": "marlin"}, UnsupportedError, "runs on cuda, not cpu.*use backend='auto'"),
        ({"backend": "torhc"}, ConfigError, "did you mean 'torch'"),
        ({"extra_config": [1]}, ConfigError, "extra_config"),
    ],
)
def test_what_cannot_run_is_said_without_leaving_python(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], change: dict[str, Any], error: type, text: str
) -> None:
    folder = write_checkpoint(llama(), Scheme(group_size=32)).folder
    rewrite(folder, lambda c: c.update(change))
    with pytest.raises(error, match=text):
        open_model(folder)


@pytest.mark.parametrize("backend", ["auto", "torch", "auto_round:torch", "auto_round:torch_zp"])
def test_a_backend_by_name(llama: Callable[..., Any], write_checkpoint: Callable[..., Any], backend: str) -> None:
    from transformers import AutoRoundConfig

    for sym in (True, False):
        folder = write_checkpoint(llama(), Scheme(group_size=32, sym=sym)).folder
        model = open_model(folder, quantization_config=AutoRoundConfig(backend=backend))
        assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
        shutil.rmtree(folder)


def test_a_device_map(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    check(write_checkpoint(llama(), Scheme(group_size=32)), device_map={"": "cpu"})


def test_a_model_without_a_config_is_refused(llama: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        convert_hf_model(llama())


def test_target_device() -> None:
    assert infer_target_device() == infer_target_device("cpu") == infer_target_device({"": "cpu"}) == "cpu"
    assert infer_target_device("cuda:1") == infer_target_device({"a": "cpu", "b": "cuda:0", "c": "disk"}) == "cuda"
    assert infer_target_device(torch.device("cuda", 0)) == "cuda"
