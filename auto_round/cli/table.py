"""Plain aligned text tables, for output that other programs may read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110) -> str:
    """Columns aligned with two spaces between. A cell may have several lines; the last column wraps so that a line
    stays within `width`."""
    cells = [[str(cell).split("\n") for cell in row] for row in (head, *rows)]
    sizes = [max(len(line) for row in cells for line in row[i]) for i in range(len(head) - 1)]
    room = max(20, width - sum(sizes) - 2 * len(sizes))
    lines: list[str] = []
    for *left, last in cells:
        wrapped = textwrap.wrap(" ".join(last), room)
        for parts in zip_longest(*left, wrapped, fillvalue=""):
            start = "".join(f"{cell:<{size + 2}}" for cell, size in zip(parts[:-1], sizes, strict=True))
            lines.append((start + parts[-1]).rstrip())
    return "\n".join(lines)
