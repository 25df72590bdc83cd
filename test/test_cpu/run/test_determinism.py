"""The same inputs and seed give the same bytes, whatever else the process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Steps small enough that the tuned state beats the start and is kept.
TUNED: dict[str, Any] = {"iters": 4, "bits": 2, "lr": 0.02}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "kwargs",
    [TUNED, {"iters": 0, "sym": False}, {**TUNED, "enable_adam": True}, {**TUNED, "quant_lm_head": True}],
    ids=repr,
)
def test_threads_do_not_change_a_byte(
    kwargs: dict[str, Any], make: Callable[..., Any], weights_hash: Any, tmp_path: Path
) -> None:
    hashes = set()
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(count)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        make("llama", **kwargs).quantize_and_save(out)
        hashes.add(weights_hash(out))
    assert len(hashes) == 1


def test_another_process_gives_the_same_bytes(
    make: Callable[..., Any], packable_folder: Any, token_ids: Any, weights_hash: Any, tmp_path: Path
) -> None:
    make("llama", **TUNED).quantize_and_save(tmp_path / "here")
    torch.save(token_ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch\nfrom auto_round import AutoRound\n"
        "ids = torch.load(sys.argv[2], weights_only=True)\n"
        "AutoRound(sys.argv[1], group_size=32, dataset=ids, nsamples=8, seqlen=24, batch_size=4, iters=4, bits=2, "
        "lr=0.02)"
        ".quantize_and_save(sys.argv[3])\n"
    )
    arguments = [packable_folder("llama"), str(tmp_path / "ids.pt"), str(tmp_path / "there")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, timeout=300)
    assert weights_hash(tmp_path / "here") == weights_hash(tmp_path / "there")


def test_the_seed_matters_and_a_model_is_quantized_afresh_each_time(
    make: Callable[..., Any], weights_hash: Any, tmp_path: Path, read_json: Any
) -> None:
    ar = make("llama", **TUNED)
    for name in ("first", "second"):
        ar.quantize_and_save(tmp_path / name)
    make("llama", **TUNED, seed=7).quantize_and_save(tmp_path / "other")
    hashes = [weights_hash(tmp_path / name) for name in ("first", "second", "other")]
    assert hashes[0] == hashes[1] != hashes[2]
    blocks = read_json(tmp_path / "first", "report.json")["blocks"]
    assert all(block["loss_after"] < block["loss_before"] for block in blocks)  # or this test would test nothing


def test_global_state_is_left_alone(make: Callable[..., Any], tmp_path: Path) -> None:
    import numpy as np

    torch.manual_seed(11)
    np.random.seed(11)
    before = (
        torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), dict(os.environ),
    )  # fmt: skip
    make("llama", iters=2, enable_deterministic_algorithms=True).quantize_and_save(tmp_path / "out")
    after = (
        torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), dict(os.environ),
    )  # fmt: skip
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_it_works_under_no_grad_and_inference_settings_of_the_caller(
    make: Callable[..., Any], weights_hash: Any, tmp_path: Path
) -> None:
    make("llama", **TUNED).quantize_and_save(tmp_path / "plain")
    with torch.no_grad():
        make("llama", **TUNED).quantize_and_save(tmp_path / "no_grad")
    assert weights_hash(tmp_path / "plain") == weights_hash(tmp_path / "no_grad")


@pytest.mark.parametrize("kwargs", [{"low_cpu_mem_usage": False}, {"low_gpu_mem_usage": True}], ids=repr)
def test_ways_to_save_memory_do_not_change_the_result(
    kwargs: dict[str, Any], make: Callable[..., Any], weights_hash: Any, tmp_path: Path
) -> None:
    make("llama", **TUNED).quantize_and_save(tmp_path / "plain")
    make("llama", **TUNED, **kwargs).quantize_and_save(tmp_path / "other")
    assert weights_hash(tmp_path / "plain") == weights_hash(tmp_path / "other")
