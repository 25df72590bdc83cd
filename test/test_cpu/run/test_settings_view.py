"""The read-only attributes of AutoRound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound, SignRoundConfig
from auto_round.errors import ConfigError, UnsupportedError


def test_what_was_given_can_be_read(packable_folder: Callable[..., str]) -> None:
    given = {
        "bits": 3, "group_size": 32, "sym": False, "iters": 7, "lr": 0.01, "minmax_lr": 0.02, "seqlen": 24,
        "nsamples": 5, "dataset": "a.json", "batch_size": 2, "gradient_accumulate_steps": 3, "seed": 9, "amp": False,
        "low_gpu_mem_usage": True, "low_cpu_mem_usage": False, "enable_torch_compile": False, "platform": "hf",
        "quant_lm_head": True, "momentum": 0.5, "not_use_best_mse": True, "disable_opt_rtn": True,
    }  # fmt: skip
    ar = AutoRound(packable_folder("llama"), device_map="cpu", scale_dtype="fp32", ignore_layers="o_proj", **given)
    assert {name: getattr(ar, name) for name in given} == given
    assert ar.device == "cpu" and ar.scale_dtype is torch.float32 and ar.ignore_layers == ("o_proj",)
    assert ar.tokenizer is not None and ar.scheme.bits == 3 and ar.model_free is False and ar.formats is None
    assert ar.data_type == "int" and ar.act_bits == 16 and ar.act_data_type == "float" and ar.act_dynamic
    assert ar.optimizer is None and not ar.mllm and not ar.diffusion
    with pytest.raises(AttributeError):
        ar.bits = 4
    with pytest.raises(AttributeError):
        ar.no_such_thing  # noqa: B018


def test_defaults_are_filled_in(packable_folder: Callable[..., str]) -> None:
    ar = AutoRound(packable_folder("llama"), device_map="cpu", enable_adam=True)
    assert (ar.iters, ar.lr, ar.minmax_lr, ar.batch_size, ar.gradient_accumulate_steps) == (200, 0.005, 0.005, 8, 1)
    assert ar.optimizer is torch.optim.AdamW and ar.enable_adam and ar.dataset is None
    rtn = AutoRound(packable_folder("llama"), device_map="cpu", iters=0, batch_size=3)
    assert (rtn.iters, rtn.lr, rtn.batch_size, rtn.enable_minmax_tuning) == (0, None, 3, False)


@pytest.mark.parametrize(
    ("scheme", "want"),
    [
        ("MXFP4", {"act_bits": 4, "act_data_type": "mx_fp", "data_type": "mx_fp", "group_size": 32}),
        ("MXFP4_RCEIL", {"act_bits": 4, "act_data_type": "mx_fp_rceil"}),
        ("NVFP4", {"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "data_type": "nv_fp"}),
        ("FP8_STATIC", {"act_bits": 8, "act_data_type": "fp", "group_size": -1, "act_dynamic": False}),
        ("GGUF:Q4_K_M", {"bits": 4, "super_bits": 6, "super_group_size": 8, "sym": False}),
    ],
)
def test_schemes(scheme: str, want: dict[str, Any], packable_folder: Callable[..., str]) -> None:
    ar = AutoRound(packable_folder("llama"), scheme=scheme, device_map="cpu", iters=1)
    assert {name: getattr(ar, name) for name in want} == want


def test_layer_config_is_resolved(make: Callable[..., Any]) -> None:
    ar = make("llama", layer_config={"k_proj": {"bits": 8}, "lm_head": {"bits": 16}}, ignore_layers="down_proj")
    ar.post_init()
    found = ar.layer_config
    assert found["model.layers.0.self_attn.k_proj"]["bits"] == 8
    assert found["model.layers.0.self_attn.k_proj"]["act_bits"] == 16
    assert found["model.layers.1.mlp.down_proj"]["bits"] == found["lm_head"]["bits"] == 16
    assert found["model.layers.1.mlp.up_proj"]["in_blocks"] and not found["lm_head"]["in_blocks"]
    assert ar.quant_block_list == [["model.layers.0", "model.layers.1"]]
    found["lm_head"]["bits"] = 3  # a copy
    assert ar.layer_config["lm_head"]["bits"] == 16
    again = make("llama", layer_config=ar.layer_config)
    assert again.layer_config == ar.layer_config


def test_chosen_blocks(make: Callable[..., Any]) -> None:
    for name in ("model.layers.1", r"layers\.1$"):
        assert make("llama", to_quant_block_names=name).quant_block_list == [["model.layers.1"]]
    assert make("llama", to_quant_block_names=[["model.layers.1"]]).quant_block_list == [["model.layers.1"]]


def test_layer_config_lists_a_gguf_files_embeddings(gguf_folder: Callable[..., str]) -> None:
    config = {"model.embed_tokens": {"bits": 8}}
    ar = AutoRound(gguf_folder("llama"), format="gguf:q4_k_m", layer_config=config, iters=0, device_map="cpu")
    embedding = ar.layer_config["model.embed_tokens"]
    assert embedding["bits"] == 8 and embedding["mostly"] == "gguf:q8_0" and not embedding["in_blocks"]
    again = AutoRound(gguf_folder("llama"), format="gguf:q4_k_m", layer_config=ar.layer_config, iters=0)
    assert again.layer_config == ar.layer_config
    assert "model.embed_tokens" not in AutoRound(gguf_folder("llama"), iters=0, device_map="cpu").layer_config


def test_a_head_and_an_embedding_that_are_one_tensor(gguf_folder: Callable[..., str]) -> None:
    config = {"model.embed_tokens": {"bits": 8}, "lm_head": {"bits": 6}}
    ar = AutoRound(gguf_folder("llama-tied"), format="gguf:q4_k_m", layer_config=config, iters=0, device_map="cpu")
    assert ar.layer_config["model.embed_tokens"]["mostly"] == ar.layer_config["lm_head"]["mostly"] == "gguf:q6_k"
    assert any("model.embed_tokens is Q6_K, not Q8_0: the head shares its tensor" in n for n in ar.plan().notes)


def test_a_format_of_its_own_scheme(gguf_folder: Callable[..., str]) -> None:
    ar = AutoRound(gguf_folder("llama"), scheme="W2A16", format="gguf:q4_k_m", iters=0, device_map="cpu")
    assert ar.bits == 4 and ar.formats == ["gguf:q4_k_m"] and ar.super_bits == 6
    assert {fields["mostly"] for fields in ar.layer_config.values()} <= {"gguf:q4_k", "gguf:q6_k", "gguf:q8_0"}


def test_the_format_is_the_default_of_saving(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    ar = make("llama", format="auto_gptq", iters=0, disable_opt_rtn=True)
    assert ar.plan().formats == ("auto_gptq",)
    ar.quantize_and_save(tmp_path / "out")
    assert read_json(tmp_path, "out", "config.json")["quantization_config"]["quant_method"] == "gptq"
    assert ar.formats == ["auto_gptq"]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"format": "auto_rond"}, ConfigError, "did you mean 'auto_round'"),
        ({"format": "auto_gptq", "scheme": "MXFP4"}, UnsupportedError, "format 'auto_gptq' cannot hold"),
        ({"format": "auto_awq", "bits": 2}, UnsupportedError, "format 'auto_awq' cannot hold"),
        ({"format": "gguf:q*_k_s"}, ConfigError, "gguf:q4_k_s"),
        ({"scheme": "gguf:q*_1"}, ConfigError, "GGUF:Q4_1"),
        ({"scheme": "W4A17"}, ConfigError, "did you mean"),
        ({"data_type": "mx_fp", "bits": 3}, UnsupportedError, "not available"),
        ({"group_size": "a,b"}, ConfigError, "ROWS,COLUMNS"),
        ({"layer_config": {"k_proj": {"bit": 8}}}, ConfigError, "did you mean 'bits'"),
        ({"layer_config": {"k_proj": {"scheme": "W9A16"}}}, ConfigError, "unknown scheme"),
        ({"layer_config": {"k_proj": {"scale_dtype": "fp32"}}}, UnsupportedError, "whole model"),
        ({"dataset": "mbpp:nume=3"}, ConfigError, "nume"),
        ({"alg_configs": "autorond"}, ConfigError, "did you mean"),
        ({"device_map": "cdua:0"}, ValueError, "cdua"),
        ({"strict": "yes"}, ConfigError, "strict"),
        ({"backend": "transform"}, ConfigError, "AutoRoundConfig"),
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_opened(
    given: dict[str, Any], error: type[Exception], says: str
) -> None:
    from auto_round.errors import AutoRoundError

    with pytest.raises(error if error is not ValueError else AutoRoundError, match=says) as raised:
        AutoRound("/no/such/model", **given)
    if error is not ValueError:
        assert isinstance(raised.value, ValueError)


def test_model_free(packable_folder: Callable[..., str]) -> None:
    ar = AutoRound(packable_folder("llama"), model_free=True, layer_config={"k_proj": {"bits": 8}}, group_size=32)
    assert ar.model_free and ar.iters == 0
    assert ar.layer_config["model.layers.0.self_attn.k_proj"]["bits"] == 8
    assert ar.quant_block_list == [["model.layers.0", "model.layers.1"]]


def test_settings_of_a_config(packable_folder: Callable[..., str]) -> None:
    ar = AutoRound(packable_folder("llama"), alg_configs=SignRoundConfig(iters=3, bits=2, group_size=32), batch_size=4)
    assert (ar.iters, ar.bits, ar.group_size, ar.batch_size) == (3, 2, 32, 4)
    assert ar.alg_configs == SignRoundConfig(iters=3, batch_size=4)


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        ({"bits": 8, "group_size": (128, 128), "data_type": "int"}, ConfigError),
        (
            {"bits": 8, "group_size": (128, 128), "data_type": "fp", "act_bits": 8, "act_group_size": 128,
             "act_dynamic": False},
            UnsupportedError,
        ),
        (
            {"bits": 8, "group_size": (128, 128), "data_type": "fp", "act_bits": 8, "act_group_size": (128, 128)},
            ConfigError,
        ),
    ],
)  # fmt: skip
def test_schemes_that_cannot_be(scheme: dict[str, Any], error: type[ValueError]) -> None:
    with pytest.raises(error):
        AutoRound("/no/such/model", scheme=scheme)
