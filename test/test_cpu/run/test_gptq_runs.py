"""Whole runs with error feedback: every kind of codes, alone and before tuning, and what it is combined with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import GPTQConfig, SignRoundConfig
from auto_round.errors import ConfigError

ALONE: dict[str, Any] = {"iters": 0, "alg_configs": "gptq"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("auto_round", {}),
    "int2 asymmetric": ("auto_gptq", {"bits": 2, "sym": False}),
    "plain scales": ("auto_round", {"disable_opt_rtn": True}),
    "awq": ("auto_awq", {"sym": False}),
    "MXFP4": ("llm_compressor", {"scheme": "MXFP4", "group_size": None}),
    "NVFP4": ("llm_compressor", {"scheme": "NVFP4", "group_size": None}),
    "static inputs": ("llm_compressor", {"scheme": "FP8_STATIC", "group_size": None}),
    "INT8": ("llm_compressor", {"scheme": "INT8", "group_size": None}),
    "mixed": ("auto_round", {"layer_config": {"k_proj": {"bits": 8}, "down_proj": {"bits": 16}}}),
}


def first_layer_error(model: Any, quantized: Any, ids: list[torch.Tensor]) -> float:
    """Squared error of the outputs of a layer whose inputs are those of the full-precision model."""
    name = "model.layers.0.self_attn.q_proj"
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        for one in ids:
            model(one.view(1, -1))
    handle.remove()
    change = quantized.get_submodule(name).weight - model.get_submodule(name).weight
    return float((torch.cat(seen, 1) @ change.detach().t()).double().square().sum())


@pytest.mark.parametrize("name", RUNS)
def test_it_quantizes_and_verifies(name: str, make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    fmt, kwargs = RUNS[name]
    given = {**ALONE, **kwargs}
    make("llama", **given).quantize_and_save(tmp_path / "out", fmt)
    report = read_json(tmp_path / "out", "report.json")
    assert report["job"]["settings"]["algorithm"] == "GPTQ" and report["job"]["settings"]["iters"] == 0
    assert report["verify"]["layers"] > 0
    assert {one["reason"] for one in report["layers"] if one["bits"]} == {None}


@pytest.mark.parametrize("name", ["int4", "int2 asymmetric", "plain scales", "MXFP4", "NVFP4", "FP8"])
def test_outputs_are_closer_than_rounding_leaves_them(
    name: str, make: Callable[..., Any], packable_model: Any, token_ids: list[torch.Tensor]
) -> None:
    kwargs = {"scheme": "FPW8A16", "group_size": None} if name == "FP8" else RUNS[name][1]
    errors = []
    for more in ({"iters": 0}, ALONE):
        ar = make(packable_model("llama"), **kwargs, **more)
        quantized, _ = ar.quantize()
        errors.append(first_layer_error(packable_model("llama"), quantized, token_ids))
    assert errors[1] < 0.98 * errors[0]  # little, as random embeddings are hardly correlated


def test_the_same_bytes_every_time(make: Callable[..., Any], tmp_path: Path, weights_hash: Any) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            make("llama", **ALONE).quantize_and_save(tmp_path / str(count))
    finally:
        torch.set_num_threads(threads)
    assert weights_hash(tmp_path / "1") == weights_hash(tmp_path / "2")


def test_before_tuning(make: Callable[..., Any], tmp_path: Path, read_json: Any, weights_hash: Any) -> None:
    tuned = {"bits": 2, "iters": 2, "lr": 1e-4}
    make("llama", **tuned).quantize_and_save(tmp_path / "plain")
    ar = make("llama", **tuned, alg_configs=GPTQConfig())
    assert isinstance(ar.alg_configs, SignRoundConfig) and ar.iters == 2
    ar.quantize_and_save(tmp_path / "gptq")
    plain, found = (read_json(tmp_path / name, "report.json") for name in ("plain", "gptq"))
    assert found["job"]["settings"]["algorithm"] == "GPTQ, then SignRound"
    before = [[block["loss_before"] for block in report["blocks"]] for report in (plain, found)]
    assert before[1][0] < 0.9 * before[0][0]  # of the first block, whose inputs are the same
    assert all(block["loss_after"] <= block["loss_before"] for block in found["blocks"])
    assert weights_hash(tmp_path / "plain") != weights_hash(tmp_path / "gptq")


@pytest.mark.parametrize("iters", [0, 1])
def test_the_head(iters: int, make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    given = {"alg_configs": "gptq", "iters": iters, "quant_lm_head": True, "bits": 3}
    make("llama", **given).quantize_and_save(tmp_path / "out")
    report = read_json(tmp_path / "out", "report.json")
    head = next(one for one in report["layers"] if one["name"] == "lm_head")
    assert head["bits"] and head["reason"] is None
    if iters:
        record = report["blocks"][-1]
        assert record["name"] == "lm_head" and record["loss_after"] <= record["loss_before"]


def test_gguf_layers_have_it_already(make: Callable[..., Any], gguf_folder: Any, tmp_path: Path) -> None:
    """Naming it changes nothing in a file whose layers all get it by default."""
    for name, more in (("default", {}), ("named", {"alg_configs": "gptq"})):
        ar = make(gguf_folder("llama"), iters=0, group_size=None, **more)
        ar.quantize_and_save(tmp_path / name, "gguf:q4_k_m")
    one, two = (next((tmp_path / name).glob("*.gguf")).read_bytes() for name in ("default", "named"))
    assert one == two


def test_an_importance_file_leaves_the_hessians_to_the_data(
    make: Callable[..., Any], gguf_folder: Any, tmp_path: Path
) -> None:
    folder, given = gguf_folder("llama"), {"iters": 0, "group_size": None}
    make(folder, **given, save_imatrix=tmp_path / "imatrix.gguf").quantize_and_save(tmp_path / "data", "gguf:q3_k_s")
    files = {"data": next((tmp_path / "data").glob("*.gguf")).read_bytes()}
    for name, more in (("file", {}), ("both", {"alg_configs": "gptq"})):
        ar = make(folder, **given, **more, imatrix=tmp_path / "imatrix.gguf")
        ar.quantize_and_save(tmp_path / name, "gguf:q3_k_s")
        files[name] = next((tmp_path / name).glob("*.gguf")).read_bytes()
    codes = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}
    share = lambda one, two: float((codes[one] != codes[two]).float().mean())  # noqa: E731
    assert len(files["file"]) == len(files["both"]) == len(files["data"])
    assert share("both", "data") < 0.01 < share("both", "file")


def test_experts_with_few_tokens_get_the_nearest_codes(
    make: Callable[..., Any], packable_model: Any, tmp_path: Path, read_json: Any
) -> None:
    model = packable_model("qwen3-moe")
    ids = [torch.randint(3, 250, (6,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    make(model, **ALONE, dataset=ids, seqlen=6).quantize_and_save(tmp_path / "few")
    make(packable_model("qwen3-moe"), **ALONE).quantize_and_save(tmp_path / "many")
    few, many = (read_json(tmp_path / name, "report.json")["layers"] for name in ("few", "many"))
    said = {one["name"]: one["reason"] for one in few if one["reason"] and one["bits"]}
    assert said and all(".experts." in name for name in said)
    assert any("nearest codes instead of GPTQ" in reason and "tokens reached it" in reason for reason in said.values())
    assert {one["reason"] for one in many if one["bits"]} == {None}


def test_layers_without_codes_are_named(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    ar = make("llama", **ALONE, layer_config={"k_proj": {"data_type": "w4fp8"}})
    assert "stores no codes" in ar.plan("fake").render()
    ar.quantize_and_save(tmp_path / "out", "fake")
    reasons = {one["name"]: one["reason"] for one in read_json(tmp_path / "out", "report.json")["layers"]}
    assert all((reason is not None) == name.endswith("k_proj") for name, reason in reasons.items() if "layers" in name)
    with pytest.raises(ConfigError, match=r"GPTQ chooses codes, .* stores none"):
        make("llama", **ALONE, data_type="w4fp8").plan("fake")


def test_refusals(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="rounds to nearest without calibration data"):
        make("llama", **ALONE, model_free=True)
    with pytest.raises(ConfigError, match="nsamples"):
        make("llama", **ALONE, nsamples=0, disable_opt_rtn=True)
    with pytest.raises(ConfigError, match="bits=8 contradicts"):
        make("llama", alg_configs=GPTQConfig(bits=4), bits=8)
    with pytest.raises(ConfigError, match="give one algorithm"):
        make("llama", alg_configs="gptq,rtn")


def test_settings(make: Callable[..., Any]) -> None:
    ar = make("llama", iters=0, alg_configs=GPTQConfig(damping=0.1, bits=3))
    assert ar.alg_configs == GPTQConfig(damping=0.1) and ar.bits == 3 and ar.iters == 0
    assert make("llama", alg_configs="gptq").iters == 200
    plain, found = (make("llama", iters=0, **more).plan() for more in ({}, {"alg_configs": "gptq"}))
    assert (
        "GPTQ" in found.render()
        and found.memory_plan.phases["block, quantized"] > (plain.memory_plan.phases["block, quantized"])
    )
