"""Programs that the benchmarks start: their variables, what they take, what they say, and the end when one fails."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

Cost = dict[str, float]
_RESULT = "RESULT "


class Failed(SystemExit):
    """A program did not do its work. Where nothing catches it, this one ends with its text."""


def failed(what: str, code: int, out: str, err: str) -> Failed:
    """With the last words of the program."""
    return Failed(f"{what} failed ({code}):\n{out[-2000:]}\n{err[-4000:]}")


def variables(own: bool = True, **more: str) -> dict[str, str]:
    """This process's variables and `more`. Programs that are not our `own` must not find this repository: the peer's
    package is called auto_round too."""
    return {k: v for k, v in os.environ.items() if own or k != "PYTHONPATH"} | more


def run(
    command: list[str], what: str, env: dict[str, str] | None = None, cwd: str | Path | None = None
) -> tuple[str, Cost]:
    """Output of a program, and its seconds: wall, and processor of all its threads. Raises Failed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise failed(what, done.returncode, done.stdout, done.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout + done.stderr, {"wall": wall, "cpu": cpu}


def run_script(
    command: list[str], what: str, env: dict[str, str] | None = None, cwd: str | Path | None = None
) -> dict[str, Any]:
    """The figures that a program prints in a line, as `result_in` reads it. Raises Failed when there is none."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    found = result_in(done.stdout)
    if found is None:
        raise failed(what, done.returncode, done.stdout, done.stderr)
    return found


def result_in(output: str) -> dict[str, Any] | None:
    """The JSON object after "RESULT " in a line of the output, None where the program did not get so far."""
    line = next((x for x in output.splitlines() if x.startswith(_RESULT)), None)
    return None if line is None else json.loads(line.removeprefix(_RESULT))
