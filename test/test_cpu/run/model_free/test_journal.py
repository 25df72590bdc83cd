"""What a journal says after it was damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound
from auto_round.errors import OutputError
from auto_round.files import add_checksum, take_checksum
from auto_round.run.model_free.journal import FOLDER, Journal


def test_checked_text() -> None:
    for text in ("", "{}", "a\nb\n", "é"):
        data = add_checksum(text).encode()
        assert take_checksum(data) == text
        for damaged in (data[:-1], data + b"x", data[1:], b"", data.replace(b"\n", b" ", 1)):
            with pytest.raises(ValueError, match="not those that were written"):
                take_checksum(damaged)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path)
    made.begin({"job": 1})
    for unit in range(3):
        made.add(0, {unit: [("w", unit, 10, 7)]}, {f"layer{unit}": "d"})
    return made


def test_lines(journal: Journal) -> None:
    file = journal.folder / "00001.jsonl"
    whole = file.read_bytes()
    assert journal.done(0) == {unit: [("w", unit, 10, 7)] for unit in range(3)}
    first, second, last = whole.splitlines(keepends=True)
    for cut in (last[:-1], last[:5], last.replace(b"10", b"11"), b"\0" * len(last)):
        file.write_bytes(first + second + cut)
        assert set(journal.done(0)) == {0, 1} and file.read_bytes() == first + second
        assert set(journal.digests(0)) == {"layer0", "layer1"}
    file.write_bytes(first + second.replace(b"10", b"11") + last)
    with pytest.raises(OutputError, match=r"00001.jsonl is damaged: line 2 .*--no_resume"):
        journal.done(0)


def test_digests(journal: Journal) -> None:
    assert not journal.has_digest(0) and journal.digest(0) is None
    journal.record_digest(0, "abc")
    assert journal.has_digest(0) and journal.digest(0) == "abc"
    journal.check_finished(0, "model.safetensors", "abc")
    with pytest.raises(OutputError, match=r"whole.model.safetensors is damaged"):
        journal.check_finished(0, "model.safetensors", "abd")


def test_a_damaged_manifest_is_named_and_can_be_thrown_away(
    packable_folder: Callable[..., str], check_fails: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def quantize(resume: bool = True) -> None:
        job = AutoRound(packable_folder("llama"), "W4A16", model_free=True, device_map="cpu")
        job.quantize_and_save(out, resume=resume)

    with check_fails("the disk was removed"), pytest.raises(OutputError, match="the disk was removed"):
        quantize()
    file = out / FOLDER / "manifest.json"
    file.write_text(file.read_text().replace('"job"', '"jab"'))
    with pytest.raises(OutputError, match=r"manifest.json is damaged.*--no_resume"):
        quantize()
    quantize(resume=False)
    assert (out / "report.json").is_file() and not (out / FOLDER).exists()
