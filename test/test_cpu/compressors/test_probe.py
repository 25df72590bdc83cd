"""The tokens of the check after saving."""

from __future__ import annotations

from typing import Any

from auto_round.compressors.probe import probe_samples


def test_a_tokenizer_that_cannot_read_text_is_not_needed() -> None:
    def broken(text: str) -> dict[str, Any]:
        raise Exception("Unk token `<unk>` not found in the vocabulary")  # as Reformer's without its files

    (found,) = probe_samples(broken, 50, 16)
    (expected,) = probe_samples(None, 50, 16)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
