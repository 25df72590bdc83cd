"""Write the table of docs/inference.md from the rows of auto_round/inference/table.py. `--check` only tells
whether it is up to date."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from auto_round.inference.table import BACKENDS, DTYPE_LABELS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "inference.md"
START, END = "<!-- backends: start -->", "<!-- backends: end -->"


def render() -> str:
    lines = [
        "| name | devices | bits | dtypes | priority | packing | requirements |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in BACKENDS:
        names = f"`{b.name}`" + (f", `{b.group}`" if b.group and b.group != b.name else "")
        priority = f"{b.priority}, by name" if b.by_name else str(b.priority)
        needs = ", ".join(b.requirements) or "-"
        if b.instead:
            needs += f"; not with Transformers 5: use {b.instead}"
        cells = ("/".join(b.devices), ",".join(map(str, b.bits)), "/".join(DTYPE_LABELS[d] for d in b.dtypes))
        lines.append("| " + " | ".join((names, *cells, priority, "/".join(b.packings), needs)) + " |")
    return "\n".join(lines)


def main() -> int:
    text = TARGET.read_text(encoding="utf-8")
    new = re.sub(f"(?s){START}.*{END}", lambda _: f"{START}\n{render()}\n{END}", text)
    if "--check" in sys.argv[1:]:
        print("up to date" if new == text else f"{TARGET.name} is stale; run tools/make_backend_docs.py")
        return 0 if new == text else 1
    TARGET.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
