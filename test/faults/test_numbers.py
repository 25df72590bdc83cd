"""NaN and Inf at every place where they can arise, under every policy: named, or gone on from as the report says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.errors import NumericsError

NAN, INF = float("nan"), float("inf")
Q = "model.layers.1.self_attn.q_proj"
WEIGHTS = (
    f"{Q}.weight", f"{Q}.bias", "model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight",
    "model.embed_tokens.weight",
)  # fmt: skip
# What makes finite weights give what is not finite, and where it is seen first.
OVERFLOWS: dict[str, tuple[str, float]] = {
    "a block's output": ("model.layers.0.mlp.down_proj.weight", 3e38),
    "the inputs of a layer": ("model.layers.0.input_layernorm.weight", 3e38),
    "the loss": ("model.layers.0.mlp.down_proj.weight", 1e25),
    "the head's inputs": ("model.norm.weight", 3e38),
}

# Numbers that are finite and hard to divide by. Where one is beyond a scale's dtype it is cut, and counted.
PLANTED: dict[str, Callable[[torch.Tensor], Any]] = {
    "zeros": lambda w: w.zero_(),
    "one value": lambda w: w.fill_(0.37),
    "smallest": lambda w: w.fill_(1e-45),
    "largest": lambda w: w.fill_(3e38),
    "one large": lambda w: w.view(-1)[:32].fill_(1e7),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {}, "W2A16 asymmetric": {"bits": 2, "sym": False}, "MXFP4": {"scheme": "MXFP4", "group_size": None},
    "NVFP4": {"scheme": "NVFP4", "group_size": None}, "FP8": {"scheme": "FP8_STATIC", "group_size": None},
    "MXFP8": {"scheme": "MXFP8", "group_size": None},
}  # fmt: skip
# Where else what is not finite is met: settings, and what the error, or the report, must name.
SITES: dict[str, tuple[dict[str, Any], str]] = {
    "scales of activations": ({"scheme": "FP8_STATIC", "group_size": None, "iters": 0}, "model.layers"),
    "scales of activations, tuned": ({"scheme": "FP8_STATIC", "group_size": None}, "model.layers"),
    "scales of the cache": ({"static_kv_dtype": "fp8", "iters": 0}, "model.layers"),
    "opt-RTN's importance": ({"iters": 0}, "model.layers"),
}


@pytest.fixture
def quantize(
    packable_folder: Callable[..., str], token_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """`quantize(name, value, **options)`: the report of a run on a model one of whose tensors was changed."""
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    number = [0]

    def run(name: str, value: Any, **options: Any) -> dict[str, Any]:
        number[0] += 1
        model, out = tmp_path / f"model-{number[0]}", tmp_path / f"out-{number[0]}"
        shutil.copytree(packable_folder("qwen2", tie_word_embeddings=False), model)
        tensors = {key: tensor.clone() for key, tensor in load_file(model / "model.safetensors").items()}
        if value in (NAN, INF) or value != value:
            tensors[name].view(-1)[1] = value
        elif value in PLANTED:
            PLANTED[value](tensors[name])
        elif value == 1e25:
            tensors[name] *= value
        else:
            tensors[name].view(-1)[::2] = value
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        data = {"dataset": token_ids, "iters": 1, "seqlen": 24, "nsamples": 8, "batch_size": 4}
        given = {"group_size": 32} | ({} if options.get("model_free") else data) | options
        try:
            AutoRound(str(model), **given).quantize_and_save(out)
        except NumericsError:
            assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
            raise
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        assert report["verify"]["passed"]
        return report

    return run


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["fail", "rtn", "keep"])
def test_weights(policy: str, quantize: Callable[..., Any], record: Callable[..., None], full: bool) -> None:
    modes: list[dict[str, Any]] = [{}, {"iters": 0}, {"iters": 0, "disable_opt_rtn": True, "verify": True}]
    silent: list[str] = []
    for name in WEIGHTS if full else (*WEIGHTS[:2], WEIGHTS[-1]):
        for value in (NAN, INF) if full else (NAN,):
            for options in modes if full else modes[:1]:
                kept = 0
                try:
                    numerics = quantize(name, value, on_nan=policy, **options)["numerics"]
                    if policy != "keep" or not any(name in line for line in numerics["incidents"]):
                        silent.append(f"{name} {value} {options}")
                    kept = 1
                except NumericsError as error:
                    if name.removesuffix(".weight").removesuffix(".bias") not in str(error) or policy == "keep":
                        silent.append(f"{name} {value} {options}: {error}")
                record(f"NaN and Inf in weights, {policy}", 1, 1, kept, 0)
    record(f"NaN and Inf in weights, {policy}", 0, 0, 0, len(silent))
    assert not silent


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["fail", "rtn", "keep"])
def test_calibration(policy: str, quantize: Callable[..., Any], record: Callable[..., None]) -> None:
    silent: list[str] = []
    for place, (name, value) in OVERFLOWS.items():
        options = {"quant_lm_head": True} if "head" in place else {}
        recovered = 0
        try:
            numerics = quantize(name, value, on_nan=policy, **options)["numerics"]
            said = numerics["incidents"] and (numerics["kept"] or numerics["rounded_plainly"])
            if policy == "fail" or not said:
                silent.append(f"{place}: {numerics}")
            recovered = 1
        except NumericsError as error:
            if policy != "fail" or not any(word in str(error) for word in ("model.layers.0", "lm_head")):
                silent.append(f"{place}: {error}")
        record(f"overflow in calibration and tuning, {policy}", 1, 1, recovered, 0)
    record(f"overflow in calibration and tuning, {policy}", 0, 0, 0, len(silent))
    assert not silent


@pytest.mark.timeout(3600)
def test_hard_groups(quantize: Callable[..., Any], record: Callable[..., None], full: bool) -> None:
    """Finite weights give finite scales, whatever they are: verify reads them back, and the model's loss is finite."""
    silent: list[str] = []
    for what in PLANTED if full else ("zeros", "one large"):
        for scheme, options in SCHEMES.items() if full else [*SCHEMES.items()][:2]:
            detected = recovered = 0
            try:
                report = quantize(f"{Q}.weight", what, **{"iters": 0, "disable_opt_rtn": True} | options)
                recovered, clamped = 1, report["numerics"]["clamped_scales"]
                detected = Q in clamped
                if what == "one large" and scheme == "W4A16" and clamped != {Q: 1}:
                    silent.append(f"{what} {scheme}: {clamped}")
            except NumericsError as error:  # the model itself overflows
                detected = 1
                if what != "largest" or not str(error).strip():
                    silent.append(f"{what} {scheme}: {error}")
            record("groups of zeros, of one value, tiny and huge", 1, detected, recovered, 0)
    record("groups of zeros, of one value, tiny and huge", 0, 0, 0, len(silent))
    assert not silent, "\n".join(silent)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["fail", "rtn", "keep"])
def test_other_sites(policy: str, quantize: Callable[..., Any], record: Callable[..., None], full: bool) -> None:
    silent: list[str] = []
    for site, (options, word) in SITES.items() if full else [*SITES.items()][:1]:
        recovered = 0
        try:
            numerics = quantize("model.layers.0.mlp.down_proj.weight", 3e38, on_nan=policy, **options)["numerics"]
            if policy == "fail" or not any(word in line for line in numerics["incidents"]):
                silent.append(f"{site}: {numerics}")
            recovered = 1
        except NumericsError as error:
            if word not in str(error):
                silent.append(f"{site}: {error}")
        record(f"overflow in other sites, {policy}", 1, 1, recovered, 0)
    record(f"overflow in other sites, {policy}", 0, 0, 0, len(silent))
    assert not silent, "\n".join(silent)


def test_model_free(quantize: Callable[..., Any], record: Callable[..., None]) -> None:
    detected = 0
    for name in WEIGHTS[:5]:
        for value in (NAN, INF):
            with pytest.raises(NumericsError, match=name):
                quantize(name, value, model_free=True)
            detected += 1
    record("NaN and Inf in weights, model-free", detected, detected, 0, 0)
