"""A measurement is put into the card and the report of a saved model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from auto_round.errors import OutputError
from auto_round.report.model_card import ModelCard, add_quality, with_quality, write_model_card
from auto_round.report.run_report import RunReport, write_report

ROWS = [("perplexity", "21.3 ± 0.4"), ("mean KL divergence (nats)", "0.0123 ± 0.0005")]


def test_card_and_report_get_the_measurement(tmp_path: Path) -> None:
    write_model_card(tmp_path, ModelCard(base_model="owner/name", scheme="W4A16"))
    write_report(tmp_path, RunReport(model="owner/name", format="auto_round", job={}))
    values = {"model": str(tmp_path), "kl": {"value": 0.0123, "stderr": 0.0005}, "reference": None}
    add_quality(tmp_path, values, ROWS, "measured on something")
    card = (tmp_path / "README.md").read_text()
    assert "| perplexity | 21.3 ± 0.4 |" in card and "measured on something" in card
    assert card.index("## Quality") < card.index("## How to run")
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["quality"]["kl"]["value"] == 0.0123
    assert record["quality"]["model"] == tmp_path.name, "a report tells nothing about the machine's folders"


def test_a_second_measurement_replaces_the_first() -> None:
    once = with_quality("# x\n\n## How to run\n\ncode\n", ROWS, "first")
    twice = with_quality(once, [("perplexity", "9.9")], "second")
    assert twice.count("## Quality") == 1 and "first" not in twice and "| perplexity | 9.9 |" in twice
    assert twice.endswith("## How to run\n\ncode\n")


def test_a_damaged_report_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(OutputError, match="not JSON"):
        add_quality(tmp_path, {}, ROWS, "")
