"""What model-free mode writes is what the regular rounding writes, tensor for tensor and word for word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Copy = Callable[..., tuple[Path, Path]]
G32: dict[str, Any] = {"scheme": "W4A16", "group_size": 32}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def equal(free: Callable[..., Path], same_tensors: Callable[..., None], tmp_path: Path) -> Callable[..., Path]:
    """`equal(model, format, **kwargs)`: both flows, compared; returns the model-free one's folder."""
    from auto_round import AutoRound

    def check(model: Any, format: str = "auto_round", **kwargs: Any) -> Path:
        job = AutoRound(str(model), iters=0, disable_opt_rtn=True, device_map="cpu", verify=False, **kwargs)
        job.quantize_and_save(tmp_path / "regular", format=format)
        made = free(model, format=format, **kwargs)
        same_tensors(tmp_path / "regular", made)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "regular", made)]
        one, other = (config.get("quantization_config") for config in configs)
        assert one == other
        assert configs[0]["dtype"] == configs[1]["dtype"]
        assert configs[0]["tie_word_embeddings"] == configs[1].get("tie_word_embeddings", False)
        assert not (made / ".partial").exists()
        return made

    return check


@pytest.mark.parametrize(
    "kwargs",
    [
        {"scheme": "W4A16"}, {"scheme": "W2A16"}, {"scheme": "W2A16G32"}, {"scheme": "W2A16G64"}, {"scheme": "W3A16"},
        {"scheme": "W8A16"}, {"scheme": "W4A16_MIXED"}, {"scheme": "W2A16", "sym": False},
        {"scheme": "W4A16", "sym": False}, {"scheme": "W8A16", "sym": False, "group_size": 32},
        {"scheme": "W4A16", "group_size": -1}, {"scheme": "W4A16", "group_size": 0},
        {"scheme": "W4A16", "group_size": 48}, {"scheme": "MXFP4"}, {"scheme": "MXFP8"}, {"scheme": "MXINT4"},
        {"scheme": "FPW8A16"}, {"scheme": "FP8_BLOCK", "group_size": (32, 32)}, {"scheme": "NVFP4", "act_bits": 16},
    ],
    ids=lambda kwargs: "-".join(str(v) for v in kwargs.values()),
)  # fmt: skip
def test_every_scheme(kwargs: dict[str, Any], equal: Callable[..., Path], packable_folder: Callable[..., str]) -> None:
    equal(packable_folder("llama"), **kwargs)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "gpt2", "opt"])
def test_families(family: str, equal: Callable[..., Path], packable_folder: Callable[..., str]) -> None:
    equal(packable_folder(family), **G32)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("ignored", ["experts", "experts.1.", "self_attn"])
def test_experts_that_stay_dense(
    family: str, ignored: str, equal: Callable[..., Path], packable_folder: Callable[..., str]
) -> None:
    equal(packable_folder(family), ignore_layers=ignored, **G32)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("ignored", ["experts.1.", "experts.1.up_proj", "experts.1.down_proj"])
def test_stacked_experts_that_are_rounded_in_part(
    family: str, ignored: str, equal: Callable[..., Path], packable_folder: Callable[..., str]
) -> None:
    """Format fake writes the experts of a block into one tensor, whether they were rounded or not."""
    equal(packable_folder(family), "fake", ignore_layers=ignored, **G32)


@pytest.mark.parametrize(
    "format",
    ["auto_gptq", "auto_awq", "llm_compressor", "mlx", "auto_round:mlx", "auto_round:auto_gptq", "fake"],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_formats(format: str, family: str, equal: Callable[..., Path], packable_folder: Callable[..., str]) -> None:
    equal(packable_folder(family), format, **G32)


@pytest.mark.parametrize(
    "scheme, format", [("MXFP4", "llm_compressor"), ("INT8", "llm_compressor"), ("FPW8A16", "llm_compressor")]
)
def test_formats_of_other_schemes(
    scheme: str, format: str, equal: Callable[..., Path], packable_folder: Callable[..., str]
) -> None:
    equal(packable_folder("qwen3-moe"), format, scheme=scheme)


def test_layer_configuration(equal: Callable[..., Path], packable_folder: Callable[..., str]) -> None:
    config = {".*k_proj": {"bits": 8, "group_size": 32}, "layers.1": {"bits": 2}, "lm_head": "W8A16"}
    equal(packable_folder("llama-tied"), layer_config=config, ignore_layers="o_proj", **G32)


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-tensor", "modelopt", "ct-channel", "ct-mxfp4"])
def test_quantized_inputs(
    kind: str, equal: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]
) -> None:
    quantized, _ = quantized_copy(packable_folder("llama"), kind, (32, 32))
    equal(quantized, **G32)


def test_experts_in_mxfp4_and_fp8(
    equal: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str], tmp_path: Path
) -> None:
    equal(quantized_copy(packable_folder("gpt-oss"), "mxfp4")[0], **G32)


def test_fp8_mixture(equal: Callable[..., Path], quantized_copy: Copy, packable_folder: Callable[..., str]) -> None:
    equal(quantized_copy(packable_folder("qwen3-moe"), "fp8-block", (32, 32))[0], **G32)


def test_further_layers_and_a_bias_in_float32(
    free: Callable[..., Path], quantized_copy: Copy, byte_tokenizer: Any, tmp_path: Path
) -> None:
    """DeepSeek's files hold a layer for multi-token prediction, which no model class reads, and a correction bias whose
    precision decides between experts."""
    import transformers

    from auto_round import AutoRound

    config = transformers.DeepseekV3Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=24,
        v_head_dim=16, n_group=2, topk_group=1, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "deepseek"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    tensors = read_tensors(folder)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = torch.tensor([14.001, 14.002, 14.003, 14.004])
    tensors |= {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if ".layers.1." in k}
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    AutoRound(str(folder), iters=0, disable_opt_rtn=True, device_map="cpu", **G32).quantize_and_save(
        tmp_path / "regular"
    )
    regular, made = read_tensors(tmp_path / "regular"), read_tensors(free(folder, **G32))
    assert all(torch.equal(regular[name].view(torch.uint8), made[name].view(torch.uint8)) for name in regular)
    assert regular[bias].dtype == torch.float32 and torch.equal(regular[bias], tensors[bias])
    assert set(made) == set(regular)
    further = {name for name in tensors if ".layers.2." in name}
    assert further and all(torch.equal(made[name], tensors[name]) for name in further)
    for name in ("regular", "free"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["job"]["copied"] == dict.fromkeys(further, "it belongs to multi-token prediction")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization_config"]["extra_config"]["model.layers.2.eh_proj"]["bits"] == 16
    assert report["job"]["left"]["model.layers.1.mlp.gate.weight"] == "it chooses experts"


def test_dtypes(equal: Callable[..., Path], packable_folder: Callable[..., str]) -> None:
    equal(packable_folder("llama"), model_dtype="bfloat16", **G32)


def test_logits_are_those_of_the_dequantized_model(
    free: Callable[..., Path], packable_folder: Callable[..., str], logits: Callable[[Any], torch.Tensor]
) -> None:
    for family in ("llama", "mixtral"):
        packed = free(packable_folder(family), f"{family}-packed", **G32)
        dense = free(packable_folder(family), f"{family}-dense", format="fake", **G32)
        assert torch.allclose(logits(packed), logits(dense), atol=1e-4)


@pytest.mark.parametrize(
    "kwargs",
    [
        G32, {"scheme": "W4A16", "group_size": 32, "sym": False}, {"scheme": "W3A16", "group_size": 32},
        {"scheme": "MXFP4"}, {"scheme": "FP8_BLOCK", "group_size": (32, 32)}, {"scheme": "W8A16", "group_size": -1},
        {"scheme": "W4A16", "group_size": 32, "format": "llm_compressor"},
        {"scheme": "W4A16", "group_size": 32, "format": "mlx"},
    ],
    ids=lambda kwargs: "-".join(str(v) for v in kwargs.values()),
)  # fmt: skip
def test_large_layers_in_slices(
    kwargs: dict[str, Any], equal: Callable[..., Path], packable_folder: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows are rounded a few at a time where a layer is large; here every layer is."""
    from auto_round.run.model_free import units as slices

    monkeypatch.setattr(slices, "LARGE", 1000)
    monkeypatch.setattr(slices, "SLICE", 64 * 32)
    equal(packable_folder("opt"), **kwargs)


def test_any_number_of_workers_gives_the_same_files(
    free: Callable[..., Path], resharded: Callable[..., Path], packable_folder: Callable[..., str],
    same_tensors: Callable[..., None],
) -> None:  # fmt: skip
    """And shards: one for each of the input's, cut where they are too large."""
    split = resharded(packable_folder("qwen3-moe"), 3)
    one = free(split, "one", parallelism=1, **G32)
    many = free(split, "many", parallelism=4, max_memory="1MB", **G32)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in (*names, "model.safetensors.index.json", "config.json"):
        assert (one / name).read_bytes() == (many / name).read_bytes(), name
    whole = free(packable_folder("qwen3-moe"), "whole", **G32)
    same_tensors(whole, one)
    small = free(split, "small", max_shard_size="100KB", **G32)
    assert len(list(small.glob("*.safetensors"))) > 3
    same_tensors(whole, small)


def test_several_formats_at_once(
    free: Callable[..., Path], packable_folder: Callable[..., str], same_tensors: Any
) -> None:
    both = free(packable_folder("llama"), "both", format="auto_round,llm_compressor", **G32)
    same_tensors(both / "llm-compressor", free(packable_folder("llama"), "one", format="llm_compressor", **G32))
