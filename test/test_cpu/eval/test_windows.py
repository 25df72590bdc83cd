from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from auto_round.errors import ConfigError, DataError
from auto_round.eval.measures import _chunks, make_windows, read_text


def test_consecutive_windows_drop_the_remainder(tokenizer: Any, text: str) -> None:
    windows, bos = make_windows([text], tokenizer, seqlen=50)
    assert not bos and [w.numel() for w in windows] == [50] * 4
    assert sum((w.tolist() for w in windows), []) == tokenizer(text)["input_ids"][:200]


def test_bos_opens_every_window_and_no_token_is_lost(bos_tokenizer: Any, text: str) -> None:
    windows, bos = make_windows([text], bos_tokenizer, seqlen=50)
    assert bos and all(int(w[0]) == bos_tokenizer.bos_token_id and w.numel() == 50 for w in windows)
    body = sum((w[1:].tolist() for w in windows), [])
    assert body == bos_tokenizer(text, add_special_tokens=False)["input_ids"][: 49 * 4]


def test_bos_can_be_forced_on_and_off(tokenizer: Any, bos_tokenizer: Any, text: str) -> None:
    assert make_windows([text], tokenizer, seqlen=50, add_bos=True)[1]
    assert not make_windows([text], bos_tokenizer, seqlen=50, add_bos=False)[1]


def test_short_text_is_one_window(tokenizer: Any) -> None:
    windows, _ = make_windows(["the cat the"], tokenizer, seqlen=50)
    assert [w.numel() for w in windows] == [3]


def test_max_windows(tokenizer: Any, text: str) -> None:
    assert len(make_windows([text] * 3, tokenizer, seqlen=20, max_windows=7)[0]) == 7


@pytest.mark.parametrize(("seqlen", "max_windows"), [(1, None), (10, 0)])
def test_settings_that_measure_nothing(tokenizer: Any, text: str, seqlen: int, max_windows: int | None) -> None:
    with pytest.raises(ConfigError):
        make_windows([text], tokenizer, seqlen=seqlen, max_windows=max_windows)


@pytest.mark.parametrize("texts", [[], [""], ["the"]])
def test_too_little_text(tokenizer: Any, texts: list[str]) -> None:
    with pytest.raises(DataError, match="at least 2"):
        make_windows(texts, tokenizer, seqlen=10)


def test_read_text_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, why in (("missing.txt", "not a file"), ("empty.txt", "is empty"), ("binary.txt", "not UTF-8")):
        with pytest.raises(DataError, match=why):
            read_text(tmp_path / name)


@pytest.mark.parametrize("text", ["", "x" * 300, "line\n" * 100, "a\n" + "b" * 250 + "\n" + "c\n" * 90])
def test_pieces_lose_nothing(text: str) -> None:
    pieces = _chunks([text], size=64)
    assert "".join(pieces) == (text + "\n\n" if text else "")
    assert all(len(p) <= 66 for p in pieces)
