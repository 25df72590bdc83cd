"""Put a measurement into the model card and the report of a model that is saved already."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.errors import OutputError
from auto_round.report import model_card, run_report
from auto_round.report.model_card import shown_name
from auto_round.report.paths import without_paths

_HEADING, _NEXT = "## Quality\n", "## How to run\n"


def add_quality(
    folder: str | os.PathLike[str], values: Mapping[str, Any], rows: Sequence[tuple[str, str]], note: str
) -> None:
    """Write a measurement into README.md and report.json of `folder`, in place of an earlier one.

    Args:
        folder: a model written by this package; files that are not there are passed over.
        values: the measurement as plain values, for report.json. Paths of models are cut to their last part.
        rows: (measure, value) for the card's table.
        note: on what it was measured.

    Raises OutputError when a file cannot be written or is not what this package writes.
    """
    root = Path(folder)
    report = root / run_report.FILE_NAME
    if report.is_file():
        try:
            record = json.loads(report.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{report} is not JSON ({error}); the measurement is not recorded") from error
        quality = {k: shown_name(v) if k in ("model", "reference") and v else v for k, v in values.items()}
        record["quality"] = without_paths(run_report.plain(quality), (str(root),))
        run_report.write_text(report, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    card = root / model_card.FILE_NAME
    if card.is_file():
        run_report.write_text(
            card, with_quality(card.read_text(encoding="utf-8"), rows, without_paths(note, (str(root),)))
        )


def with_quality(card: str, rows: Sequence[tuple[str, str]], note: str) -> str:
    """The text of a model card with this table as its section on quality."""
    table = ["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    section = "\n".join([_HEADING, *table, "", note, "", ""])
    start, end = card.find(_HEADING), card.find(_NEXT)
    if end < 0:
        return card.rstrip("\n") + "\n\n" + section.rstrip("\n") + "\n"
    return card[: start if 0 <= start < end else end] + section + card[end:]
