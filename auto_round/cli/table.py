"""Plain aligned text tables, for output that other programs may read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110) -> str:
    """Columns aligned with two spaces between; the last column wraps so that a line stays within `width`."""
    sizes = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head) - 1)]
    left = sum(sizes) + 2 * len(sizes)
    lines: list[str] = []
    for row in (head, *rows):
        start = "".join(f"{str(cell):<{size + 2}}" for cell, size in zip(row[:-1], sizes, strict=True))
        wrapped = textwrap.wrap(str(row[-1]), max(20, width - left)) or [""]
        lines.append((start + wrapped[0]).rstrip())
        lines.extend(" " * left + w for w in wrapped[1:])
    return "\n".join(lines)
