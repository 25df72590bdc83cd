"""A run within a limit: refused beforehand, or kept with the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import ConfigError, OutputError
from auto_round.output.writer import parse_size
from auto_round.run.driver import Run
from auto_round.run.settings import MemoryBudget, parse_budget

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
IDS = [torch.randint(3, 250, (48,), generator=torch.Generator().manual_seed(i)) for i in range(32)]
# Steps small enough that the tuned state beats the start and is kept; samples that outweigh the tiny block.
TUNED: dict[str, Any] = {"iters": 4, "bits": 2, "lr": 0.02, "dataset": IDS, "nsamples": 32, "seqlen": 48}


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What other tests have left in this process's memory does not count."""
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 100_000_000)
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))


@pytest.mark.parametrize(
    ("given", "device", "wanted"),
    [
        (None, CPU, None),
        (5_000_000, CPU, MemoryBudget(5_000_000)),
        ("4GB", CPU, MemoryBudget(4_000_000_000)),
        ("cpu=2GiB", GPU, MemoryBudget(2 << 30)),
        ("cpu=4GB, 1=10GB", GPU, MemoryBudget(4_000_000_000, 10_000_000_000)),
        ({"cuda:1": "10GB"}, GPU, MemoryBudget(None, 10_000_000_000)),
        ({1: 10, "ram": 20}, GPU, MemoryBudget(20, 10)),
    ],
)
def test_limits_are_read(given: Any, device: torch.device, wanted: MemoryBudget | None) -> None:
    assert parse_budget(given, device) == wanted


@pytest.mark.parametrize("given", ["much", 0, True, 1.5, "cpu=", "0=4GB", "cuda:3=1GB", "cpu=1GB,ram=2GB"])
def test_what_is_no_limit_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="max_memory"):
        parse_budget(given, CPU)


@pytest.mark.parametrize(
    "changes",
    [{}, {"enable_quanted_input": False}, {"iters": 0, "sym": False}, {"quant_lm_head": True}],
    ids=["tuned", "one stream", "opt-RTN", "head too"],
)
def test_activations_in_a_file_change_no_byte(
    changes: dict[str, Any], make: Callable[..., Any], weights_hash: Any, tmp_path: Path
) -> None:
    kwargs = TUNED | changes
    plain = make("llama", **kwargs)
    planned = plain.plan()
    assert planned.memory_plan.streams == "ram" and planned.memory_plan.spilled == 0
    plain.quantize_and_save(tmp_path / "plain")
    threads = torch.get_num_threads()
    bounded = make("llama", **kwargs, max_memory=planned.peak_ram - 1)
    job = bounded.plan()
    assert job.memory_plan.streams == "file" and job.peak_ram < planned.peak_ram
    size = 32 * 48 * 64 * 4  # samples, tokens, width, float32
    assert job.memory_plan.spilled == size * (1 if kwargs["iters"] == 0 else 2)
    assert "activations in AR_WORK_SPACE" in job.render()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        bounded.quantize_and_save(tmp_path / "bounded")
    finally:
        torch.set_num_threads(threads)
    assert weights_hash(tmp_path / "plain") == weights_hash(tmp_path / "bounded")
    # Kernels that the first run of a process compiles stay there for the next.
    assert {path.name for path in (tmp_path / "space").glob("*")} <= {"kernels"}


@pytest.mark.parametrize("kwargs", [TUNED, TUNED | {"iters": 0}, {"iters": 0, "disable_opt_rtn": True}], ids=repr)
def test_too_little_is_refused_before_anything_is_written(
    kwargs: dict[str, Any], make: Callable[..., Any], tmp_path: Path
) -> None:
    tuner = make("llama", **kwargs, max_memory="80MB")
    with pytest.raises(ConfigError, match=r"80.0 MB of RAM was given and .* is needed") as refused:
        tuner.quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "space").exists()
    found = re.search(r"and ([\d.]+GB) is needed", str(refused.value))
    assert found is not None
    assert make("llama", **kwargs, max_memory=found[1]).plan().peak_ram <= parse_size(found[1])
    ways = ("seqlen", "gradient_accumulate_steps=4") if kwargs["iters"] else ("model_free",)
    assert all(way in str(refused.value) for way in ways)


def test_a_full_work_space_is_refused_before_work(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = make("llama", **TUNED, max_memory=make("llama", **TUNED).plan().peak_ram - 1)
    monkeypatch.setattr("auto_round.output.folders.free_bytes", lambda _path: 1000)
    with pytest.raises(OutputError, match="AR_WORK_SPACE.*1.00 kB free"):
        tuner.quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_of(job: Any) -> Run:
    """The run of an AutoRound, for its plans."""
    return Run(job._runs.source, job.settings, job.tokenizer)


def test_what_is_kept_in_memory_counts(make: Callable[..., Any]) -> None:
    run = run_of(make("llama", **TUNED))
    kept, written = run.memory_plan(), run.plan([])
    codes = sum(p.out_features * p.in_features for p in kept.quantized().values())
    assert kept.peak_ram - written.peak_ram == codes


def test_the_plan_says_where_the_most_is_held(make: Callable[..., Any]) -> None:
    shown = make("llama", **TUNED).plan().render()
    assert re.search(r"memory +about \d+ MB, libraries included; most of it in: block, quantized", shown)


def test_long_samples_are_counted_where_they_are_held(make: Callable[..., Any]) -> None:
    """Twice the samples are twice the streams in RAM, and nothing in a file."""
    many = dict(TUNED, dataset=IDS * 2, nsamples=64)
    few = make("llama", **TUNED).plan().memory_plan
    more = make("llama", **many).plan().memory_plan
    spilled = make("llama", **many, max_memory=more.ram - 1).plan().memory_plan
    assert more.ram - few.ram == few.ram - spilled.ram == spilled.spilled // 2 > 0
