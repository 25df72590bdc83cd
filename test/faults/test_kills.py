"""Tuning runs that are killed at any moment, and gone on with, end with the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from extent import FULL

PROGRAM = Path(__file__).with_name("kill_program.py")
ROOT = Path(__file__).resolve().parents[2]
G32: dict[str, Any] = {"group_size": 32, "iters": 2}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks runs")


# Name: model, formats, settings, and other ways to run that give the same bytes.
CELLS: dict[str, dict[str, Any]] = {
    "tuned": {"formats": "auto_round", "kwargs": {**G32, "quant_lm_head": True}},
    "tuned-two-formats": {"formats": "auto_gptq,fake", "kwargs": G32},
    "opt-rtn": {"formats": "auto_round", "kwargs": {**G32, "iters": 0, "sym": False}},
    "gguf-two-files": {"formats": "gguf:q4_0,gguf:q4_k_m", "kwargs": {"iters": 0}},
    "static-fp8": {
        "formats": "llm_compressor", "kwargs": {"iters": 2, "scheme": "FP8_STATIC", "static_kv_dtype": "fp8"},
    },
    "ways to run": {
        "formats": "auto_round", "kwargs": G32,
        "ways": [{}, {"file": True}, {"low_gpu_mem_usage": True}, {"threads": 2}, {"threads": 2, "file": True}],
    },
    "experts by GPTQ": {
        "family": "qwen3-moe", "size": {"num_experts": 12, "moe_intermediate_size": 96},
        "formats": "auto_round,fake", "kwargs": G32, "alone": True, "ways": [{}, {"threads": 2}],
    },
    "model-free": {"formats": "auto_round", "kwargs": {"group_size": 32, "model_free": True}},
}  # fmt: skip
KILLS = 42  # of each
PHASES = {"before the journal", "0 units done", "1 units done", "2 units done", "showing the files"}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", CELLS if FULL else ["tuned"])
def test_kills(name: str, record: Callable[..., None], packable_folder: Any, gguf_folder: Any, tmp_path: Path) -> None:
    folder = gguf_folder if "gguf" in name else packable_folder
    cell = CELLS[name] | {"model": folder(CELLS[name].get("family", "llama"), **CELLS[name].get("size", {}))}
    given = {"work": str(tmp_path), "cells": {name: cell}, "kills": KILLS if FULL else 6, "seed": 1}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AR_LOG_LEVEL": "CRITICAL"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(given)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])[name]
    # A wrong file is silent; a run that does not go on is detected, which is not enough here either.
    silent = sum("files" in p or "shown" in p for p in found["problems"])
    record(f"kill -9: {name}", found["kills"], 0, found["kills"] - len(found["problems"]), silent)
    assert not found["problems"], (found["phases"], found["problems"][:5], done.stderr[-3000:])
    if FULL:
        assert found["kills"] >= KILLS and (name == "model-free" or len(PHASES & set(found["phases"])) >= 3)


def test_there_are_enough() -> None:
    assert KILLS * len(CELLS) >= 200
