"""What cannot work is refused before any work, with words that help."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound, RTNConfig, SignRoundConfig
from auto_round.errors import (
    AutoRoundError,
    ConfigError,
    DataError,
    DeviceError,
    ModelError,
    OutputError,
    UnsupportedError,
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        AutoRound(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["T5Config", "BertConfig"])
def test_not_a_causal_language_model(name: str, tmp_path: Path) -> None:
    import transformers

    getattr(transformers, name)().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        AutoRound(str(tmp_path))


def test_an_encoder_decoder_object() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        AutoRound(transformers.T5ForConditionalGeneration(config))


def test_a_model_that_is_quantized_already(make: Callable[..., Any], tmp_path: Path) -> None:
    make("llama", iters=0, disable_opt_rtn=True).quantize_and_save(tmp_path / "out")
    with pytest.raises(UnsupportedError, match="quantized already"):
        AutoRound(str(tmp_path / "out"))


@pytest.mark.parametrize("given", [{"scheme": "W5A16"}, {"scheme": "W6A16"}, {"bits": 7}])
def test_a_format_that_cannot_hold_the_scheme(given: dict[str, Any], make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'auto_round' cannot hold.*formats that can: .*fake"):
        make("llama", iters=0, **given).quantize_and_save(tmp_path / "out", format="auto_round")
    assert not (tmp_path / "out").exists()


def test_a_format_that_cannot_hold_one_layer(make: Callable[..., Any], tmp_path: Path) -> None:
    ar = make("llama", iters=0, layer_config={"k_proj": {"bits": 5}})
    with pytest.raises(UnsupportedError, match="layer model.layers.0.self_attn.k_proj.*formats that can: .*fake"):
        ar.quantize_and_save(tmp_path / "out")
    ar = make("llama", iters=0, layer_config={"k_proj": {"bits": 8}})
    with pytest.raises(UnsupportedError, match=r"4-bit.*formats that can: .*auto_round, auto_round:auto_gptq, .*fake"):
        ar.quantize_and_save(tmp_path / "out", format="auto_round:auto_awq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt, error", [("auto_rond", ConfigError), ("gguf:q9_z", ConfigError), ("", ConfigError)])
def test_unknown_formats(fmt: str, error: type[AutoRoundError], make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(error, match="vailable: .*auto_round|GGUF types are "):
        make("llama", iters=0).quantize_and_save(tmp_path / "out", fmt)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "dataset, error",
    [
        ([], DataError), (["short"], DataError), ("no-such-dataset", ConfigError), ("./none.json", DataError),
        (5, ConfigError), ([torch.tensor([3, 4, 999])], DataError), ([object()], DataError),
    ],
)  # fmt: skip
def test_data_that_is_none(dataset: Any, error: type[AutoRoundError], make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises((error, DataError)) as caught:
        make("llama", dataset=dataset, iters=1).quantize_and_save(tmp_path / "out")
    assert len(str(caught.value)) > 20
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "device, error",
    [("cuda:7", DeviceError), ("tpu", DeviceError), ("gpu!", DeviceError), (5, DeviceError), ("0,1", UnsupportedError)],
)
def test_devices(device: Any, error: type[AutoRoundError], make: Callable[..., Any]) -> None:
    with pytest.raises(error, match="device_map="):
        make("llama", device_map=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without an accelerator takes the CPU")
@pytest.mark.parametrize("device", [0, "0", "auto", "cpu", None, {"": "cpu"}, ["cpu"], torch.device("cpu")])
def test_devices_that_mean_the_cpu_here(device: Any, make: Callable[..., Any]) -> None:
    assert make("llama", device_map=device).settings.device == torch.device("cpu")


def test_a_folder_that_is_not_empty(make: Callable[..., Any], tmp_path: Path, logits: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    ar = make("llama", iters=0, disable_opt_rtn=True)
    with pytest.raises(OutputError, match="not empty"):
        ar.quantize_and_save(out)
    assert (out / "mine.txt").read_text() == "keep me"
    ar.quantize_and_save(out, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep me" and logits(out) is not None


def test_an_output_that_is_a_file(make: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        make("llama", iters=0).quantize_and_save(tmp_path / "out")


def test_too_little_disk(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(OutputError, match="GB free"):
        make("llama", iters=0).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, hint",
    [("nsample", "nsamples"), ("batchsize", "batch_size"), ("group_siz", "group_size"), ("itres", "iters")],
)
def test_unknown_arguments_bring_the_nearest(name: str, hint: str, make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=f"no argument '{name}'; did you mean .*'{hint}'"):
        make("llama", **{name: 3})


@pytest.mark.parametrize(
    "name, value",
    [
        ("enable_alg_ext", True), ("enable_norm_bias_tuning", True), ("nblocks", 2),
        ("rotation_config", "default"), ("processor", object()), ("algorithm", "awq"),
        ("alg_configs", "awq"),
    ],
)  # fmt: skip
def test_what_later_versions_do_is_refused_not_ignored(name: str, value: Any, make: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="not available in this version"):
        make("llama", **{name: value})


def test_their_neutral_values_pass(make: Callable[..., Any]) -> None:
    make("llama", model_free=False, enable_alg_ext=False, nblocks=1, disable_model_free=True)


@pytest.mark.parametrize(
    "given",
    [
        {"iters": -1}, {"iters": 1.5}, {"iters": "5"}, {"nsamples": 0}, {"seqlen": 1}, {"seed": -1}, {"batch_size": 0},
        {"lr": 0}, {"scale_dtype": "int8"}, {"model_dtype": "int8"}, {"bits": 1.5}, {"bits": 9}, {"group_size": -3},
        {"scheme": "W4A17"}, {"scheme": 4}, {"ignore_layers": "k_porj", "strict": True},
        {"layer_config": {"k_porj": {"bits": 8}}, "strict": True},
        {"to_quant_block_names": "model.layers.9"}, {"layer_config": "{k_proj"}, {"ignore_layers": "proj"},
        {"enable_opt_rtn": True, "disable_opt_rtn": True}, {"gradient_accumulate_steps": 0}, {"momentum": 2},
        {"alg_configs": SignRoundConfig(iters=3), "iters": 5}, {"alg_configs": RTNConfig(), "iters": 5},
        {"alg_configs": SignRoundConfig(iters=3), "lr": 0.5}, {"alg_configs": "rtn", "algorithm": "rtn"},
        {"platform": "nowhere"},
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_or_contradictory_values(given: dict[str, Any], make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make("llama", **given).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_scales_that_a_format_does_not_store(dtype: str, make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stores scales as torch.float16"):
        make("llama", iters=0, scale_dtype=dtype).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make("llama", iters=0, scale_dtype=dtype).quantize_and_save(tmp_path / "out", format="fake")


def test_saving_before_quantizing(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="call quantize"):
        make("llama").save_quantized(tmp_path / "out")


def test_a_format_that_cannot_hold_what_is_in_memory(make: Callable[..., Any], tmp_path: Path, logits: Any) -> None:
    ar = make("llama", iters=0, bits=7)
    model, _ = ar.quantize()
    with pytest.raises(UnsupportedError, match="formats that can: .*fake"):
        ar.save_quantized(tmp_path / "out")
    ar.save_quantized(tmp_path / "out", format="fake")
    assert torch.equal(logits(tmp_path / "out"), logits(model))
