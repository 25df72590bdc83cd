"""What a journal says after it was damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound
from auto_round.errors import OutputError
from auto_round.files import add_checksum, take_checksum
from auto_round.output.folders import PARTIAL
from auto_round.run.model_free.driver import JOURNAL


def test_checked_text() -> None:
    for text in ("", "{}", "a\nb\n", "é"):
        data = add_checksum(text).encode()
        assert take_checksum(data) == text
        for damaged in (data[:-1], data + b"x", data[1:], b"", data.replace(b"\n", b" ", 1)):
            with pytest.raises(ValueError, match="not those that were written"):
                take_checksum(damaged)


def test_a_damaged_manifest_is_named_and_can_be_thrown_away(
    packable_folder: Callable[..., str], check_fails: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def quantize(resume: bool = True) -> None:
        job = AutoRound(packable_folder("llama"), "W4A16", model_free=True, device_map="cpu")
        job.quantize_and_save(out, resume=resume)

    with check_fails("the disk was removed"), pytest.raises(OutputError, match="the disk was removed"):
        quantize()
    file = out / PARTIAL / JOURNAL / "run.json"
    file.write_text(file.read_text().replace('"weights"', '"weighty"'))
    with pytest.raises(OutputError, match=r"is damaged: .*run.json.*--no_resume"):
        quantize()
    quantize(resume=False)
    assert (out / "report.json").is_file() and not (out / PARTIAL).exists()
