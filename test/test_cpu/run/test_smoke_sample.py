"""The tokens of the check after saving."""

from __future__ import annotations

from typing import Any

from auto_round.run.head import smoke_samples


def test_a_tokenizer_that_cannot_read_text_is_not_needed() -> None:
    def broken(text: str) -> dict[str, Any]:
        raise Exception("Unk token `<unk>` not found in the vocabulary")  # as Reformer's without its files

    (found,) = smoke_samples(broken, 50, 16)
    (expected,) = smoke_samples(None, 50, 16)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
