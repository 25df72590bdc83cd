"""The table of `make faults`: what was injected, and what became of it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Row:
    """Counts of one kind of fault.

    Attributes:
        injected: faults that were planted.
        detected: refused or reported with an error that names the place.
        recovered: the run ended, or went on, with the result that it has without the fault.
        silent: a wrong result without a word. Must be 0.
    """

    injected: int = 0
    detected: int = 0
    recovered: int = 0
    silent: int = 0


ROWS: dict[str, Row] = {}


def record(row: str, injected: int, detected: int, recovered: int, silent: int) -> None:
    """Add counts to the row of that name. Every fault is detected, recovered, both, or silent."""
    entry = ROWS.setdefault(row, Row())
    entry.injected += injected
    entry.detected += detected
    entry.recovered += recovered
    entry.silent += silent


def render() -> list[str]:
    """The table as lines, with a last one for the sums."""
    total = Row()
    for row in ROWS.values():
        for field in vars(total):
            setattr(total, field, getattr(total, field) + getattr(row, field))
    width = max((len(name) for name in ROWS), default=0) + 2
    lines = [f"{'fault':<{width}}{'injected':>9}{'detected':>9}{'recovered':>10}{'silent':>7}"]
    for name, row in [*ROWS.items(), ("all", total)]:
        lines.append(f"{name:<{width}}{row.injected:>9}{row.detected:>9}{row.recovered:>10}{row.silent:>7}")
    return lines


def save(file: Path) -> None:
    """The rows as JSON, beside those of other tests that the file has already: a full run may be done in parts."""
    before = json.loads(file.read_text())["rows"] if file.exists() else {}
    rows = before | {name: list(vars(row).values()) for name, row in ROWS.items()}
    said = {
        "machine": _machine(),
        "columns": list(vars(Row())),
        "all": [sum(c) for c in zip(*rows.values(), strict=True)],
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    file.write_text(json.dumps(said, indent=1)[:-2] + f',\n "rows": {{\n{lines}\n }}\n}}\n')


def _machine() -> str:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"
