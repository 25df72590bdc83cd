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

PROGRAM = Path(__file__).with_name("kill_program.py")
ROOT = Path(__file__).resolve().parents[2]
G32: dict[str, Any] = {"group_size": 32, "iters": 2}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks runs")


def cells(plain: str, wide: str) -> dict[str, dict[str, Any]]:
    return {
        "tuned": {"model": plain, "formats": "auto_round", "kwargs": {**G32, "quant_lm_head": True}},
        "tuned-two-formats": {"model": plain, "formats": "auto_gptq,fake", "kwargs": G32},
        "opt-rtn": {"model": plain, "formats": "auto_round", "kwargs": {**G32, "iters": 0, "sym": False}},
        "gguf-two-files": {"model": wide, "formats": "gguf:q4_0,gguf:q4_k_m", "kwargs": {"iters": 0}},
        "static-fp8": {
            "model": plain, "formats": "llm_compressor",
            "kwargs": {"iters": 2, "scheme": "FP8_STATIC", "static_kv_dtype": "fp8"},
        },
        "ways to run": {
            "model": plain, "formats": "auto_round", "kwargs": G32,
            "ways": [{}, {"file": True}, {"low_gpu_mem_usage": True}, {"threads": 2}, {"threads": 2, "file": True}],
        },
        "model-free": {"model": plain, "formats": "auto_round", "kwargs": {"group_size": 32, "model_free": True}},
    }  # fmt: skip


@pytest.mark.timeout(7200)
def test_kills(full: bool, record: Callable[..., None], packable_folder: Any, gguf_folder: Any, tmp_path: Path) -> None:
    chosen = cells(packable_folder("llama"), gguf_folder("llama"))
    if not full:
        chosen = {name: chosen[name] for name in ("tuned",)}
    given = {"work": str(tmp_path), "cells": chosen, "kills": 42 if full else 6, "seed": 1}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AR_LOG_LEVEL": "CRITICAL"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(given)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, cell in found.items():
        # A wrong file is silent; a run that does not go on is detected, which is not enough here either.
        silent = sum("files" in p or "shown" in p for p in cell["problems"])
        record(f"kill -9: {name}", cell["kills"], 0, cell["kills"] - len(cell["problems"]), silent)
        assert not cell["problems"], (name, cell["phases"], cell["problems"][:5], done.stderr[-3000:])
    phases = {phase for cell in found.values() for phase in cell["phases"]}
    if full:
        assert sum(cell["kills"] for cell in found.values()) >= 200
        assert {"before the journal", "0 units done", "1 units done", "2 units done", "showing the files"} <= phases
