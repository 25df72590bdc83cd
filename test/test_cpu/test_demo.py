"""The demo runs from end to end, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_ends_with_a_table(packable_folder: Callable[..., str], tmp_path: Path) -> None:
    arguments = ["--model", packable_folder("llama"), "--work", str(tmp_path), "--iters", "1", "--nsamples", "4"]
    arguments += ["--seqlen", "32", "--group_size", "32", "--windows", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.index("5/5 Result") :]
    assert all(word in table for word in ("full precision", "RTN", "SignRound", "KL", "2 windows of 256 tokens"))
