"""Tuning a mixture whose block does not fit into max_memory: GPTQ, with one expert in memory at a time, instead."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.errors import ConfigError, Stopped
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.partial_loading import expert_of
from auto_round.output.writer import parse_size
from auto_round.run import blocks

IDS = [torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(i)) for i in range(32)]
TUNED: dict[str, Any] = {"iters": 2, "bits": 3, "lr": 0.02, "dataset": IDS, "nsamples": 32, "seqlen": 24}
QUICK = {**TUNED, "verify": False}
EXPERTS, WIDTH, INNER = 12, 64, 96
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 100_000_000)
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))


@pytest.fixture
def folder(packable_folder: Callable[..., str]) -> str:
    return packable_folder("qwen3-moe", num_experts=EXPERTS, moe_intermediate_size=INNER)


@pytest.fixture
def limited(make: Make) -> Callable[..., Any]:
    """`limited(folder, **kwargs)`: with a limit that experts only keep one at a time."""

    def build(folder: str, **kwargs: Any) -> Any:
        given = {**TUNED, **kwargs}
        fmt = given.pop("format", None)
        made = make(folder, **given)
        while not made.plan(fmt).memory_plan.streams_experts:
            made = make(folder, **given, max_memory=made.plan(fmt).peak_ram - 1)
        return made

    return build


def left_in(space: Path) -> list[str]:
    """All but compiled kernels, which later processes use again."""
    return sorted(path.name for path in space.glob("*") if path.name != "kernels")


@pytest.mark.parametrize("kwargs", [{}, {"alg_configs": "gptq"}, {"on_nan": "rtn"}, {"disable_opt_rtn": True}], ids=str)
def test_the_run_is_that_of_gptq(
    kwargs: dict[str, Any], folder: str, make: Make, limited: Callable[..., Any], weights_hash: Any, read_json: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ar = limited(folder, **kwargs)
    job = ar.plan()
    assert job.memory_plan.streams_experts and job.steps == 0
    shown = job.render()
    assert "SignRound is replaced by GPTQ without tuning" in shown and "read one at a time" in shown
    needed = re.search(r"tuning needs max_memory=([\d.]+GB)", shown)
    assert needed is not None
    assert not make(folder, **TUNED | kwargs, max_memory=needed[1]).plan().fallback
    most: list[int] = []
    load = CheckpointSource.load

    def watched(self: CheckpointSource, name: str, device: Any = None) -> Any:
        module = load(self, name, device)
        held = (p.nbytes for n, p in self.model.named_parameters() if expert_of(n) and not p.is_meta)
        most.append(sum(held))
        return module

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSource, "load", watched)
        ar.quantize_and_save(tmp_path / "limited")
    assert 0 < max(most) <= 3 * WIDTH * INNER * 4
    assert "is replaced by GPTQ" in caplog.text
    report = read_json(tmp_path / "limited", "report.json")
    assert report["verify"]["passed"] and "is replaced by GPTQ" in report["job"]["fallback"]
    assert report["job"]["settings"]["algorithm"] == "GPTQ"
    asked = {**TUNED, **kwargs, "iters": 0, "alg_configs": "gptq"}
    make(folder, **asked).quantize_and_save(tmp_path / "asked")
    assert weights_hash(tmp_path / "limited") == weights_hash(tmp_path / "asked")
    with caplog.at_level(logging.INFO, "auto_round"):
        limited(folder, **kwargs).quantize_and_save(tmp_path / "limited")
    assert "holds the result of this command already" in caplog.text
    assert left_in(tmp_path / "space") == []
    memory = limited(folder, **kwargs)
    memory.quantize()
    memory.save_quantized(tmp_path / "saved")
    assert weights_hash(tmp_path / "saved") == weights_hash(tmp_path / "asked")


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("gpt-oss", {"sym": False}),
        ("qwen3-moe", {"scheme": "FP8_STATIC", "group_size": None, "format": "llm_compressor"}),
        ("gguf", {"scheme": "gguf:q4_k_m", "group_size": None, "format": "gguf:q4_k_m"}),
    ],
    ids=str,
)
def test_kinds(
    family: str, kwargs: dict[str, Any], limited: Callable[..., Any], packable_folder: Any, gguf_folder: Any,
    read_json: Any, tmp_path: Path,
) -> None:  # fmt: skip
    if family == "gguf":
        model = gguf_folder("qwen3-moe", norm_topk_prob=True, num_experts=6, moe_intermediate_size=256)
    else:
        model = packable_folder(family, **{"num_local_experts" if family == "gpt-oss" else "num_experts": 8})
    given = {"bits": None, "format": "auto_round", **kwargs}
    limited(model, **given).quantize_and_save(tmp_path / "out", given["format"])
    assert read_json(tmp_path / "out", "report.json")["verify"]["passed"]


def test_an_interrupted_run_goes_the_same_way(
    folder: str, make: Make, limited: Callable[..., Any], stop_at: Any, weights_hash: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    limited(folder, **QUICK).quantize_and_save(tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Stopped, match="block 2 of 2; run the same command again to resume"):
        with stop_at(blocks, "_quantize_block", 2):
            limited(folder, **QUICK).quantize_and_save(out)
    assert not make(folder, **QUICK).plan().fallback  # without a limit, or with less in memory, the block would fit
    assert "as in the interrupted run" in make(folder, **QUICK).plan(output_dir=str(out)).fallback
    other = make(folder, **QUICK | {"seed": 7})  # another run
    assert not other.plan(output_dir=str(out)).fallback
    with pytest.raises(ConfigError, match="asked_algorithm: .*SignRound.* then, .* now"):
        other.quantize_and_save(out)
    begun: list[int] = []
    real = blocks._quantize_block
    monkeypatch.setattr(blocks, "_quantize_block", lambda index, *rest: begun.append(index) or real(index, *rest))
    make(folder, **QUICK).quantize_and_save(out)
    assert begun == [1]
    assert weights_hash(tmp_path / "whole") == weights_hash(out)
    assert left_in(tmp_path / "space") == []


def test_a_tuned_run_is_resumed_with_a_little_less_memory(
    folder: str, make: Make, stop_at: Any, tmp_path: Path
) -> None:  # fmt: skip
    """A start with a little less memory resumes; one with much less is refused, with the reason."""
    needed = make(folder, **QUICK).plan().peak_ram
    given = {**QUICK, "max_memory": needed}
    out = tmp_path / "out"
    with pytest.raises(Stopped), stop_at(SignRoundQuantizer, "quantize_block", 2):
        make(folder, **given).quantize_and_save(out)
    while not make(folder, **given).plan().fallback:
        given["max_memory"] -= 10_000
    assert not make(folder, **given).plan(output_dir=str(out)).fallback
    with pytest.raises(ConfigError, match="asked_algorithm: .* then, .*SignRound.* now"):
        make(folder, **{**QUICK, "max_memory": int(given["max_memory"] / 1.021)}).quantize_and_save(out)
    make(folder, **given).quantize_and_save(out)


def test_what_does_not_fit_either_is_refused(
    folder: str, make: Make, packable_model: Any, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match="experts are read one at a time already, without tuning") as refused:
        make(folder, **TUNED, max_memory=110_000_000).quantize_and_save(tmp_path / "out")
    needed = re.search(r"and ([\d.]+GB) is needed", str(refused.value))
    assert needed is not None and make(folder, **TUNED, max_memory=needed[1]).plan().peak_ram <= parse_size(needed[1])
    assert not (tmp_path / "out").exists() and not (tmp_path / "space").exists()
    with pytest.raises(ConfigError, match="one at a time: the model is in memory already"):
        make(packable_model("qwen3-moe"), **TUNED, max_memory=110_000_000).plan()
