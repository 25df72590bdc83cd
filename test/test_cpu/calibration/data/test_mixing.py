"""Shares of several datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.calib_dataset import prepare_calibration
from auto_round.calibration.data.spec import samples_per_dataset


@pytest.mark.parametrize(
    ("wanted", "total", "expected"),
    [
        ([None], 128, [128]),
        ([None, None, None], 128, [43, 43, 42]),
        ([64], 128, [64]),
        ([256], 128, [128]),
        ([30, None], 128, [30, 98]),
        ([30, None, None], 128, [30, 49, 49]),
        ([256, 128], 128, [85, 43]),
        ([None, 256, 128], 128, [43, 57, 28]),
        ([1000, 1], 10, [9, 1]),
    ],
)
def test_examples(wanted: list[int | None], total: int, expected: list[int]) -> None:
    assert samples_per_dataset(wanted, total) == expected


@given(st.lists(st.none() | st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 300))
def test_shares_add_up(wanted: list[int | None], total: int) -> None:
    result = samples_per_dataset(wanted, total)
    asked = sum(n or 0 for n in wanted)
    assert sum(result) == (min(asked, total) if None not in wanted else total)
    assert all(n >= 0 for n in result)
    if total >= len(wanted):
        assert all(n >= 1 for n in result)
    assert all(r <= n for r, n in zip(result, wanted, strict=True) if n is not None)


def test_samples_come_in_their_shares(tmp_path: Path, tokenizer: Any) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} line number {i} of the file" for i in range(50)))
    spec = f"{tmp_path}/a.txt:num=3,{tmp_path}/b.txt,{tmp_path}/c.txt:num=5"
    data = prepare_calibration(spec, tokenizer, seqlen=16, nsamples=20, seed=0)
    assert [n for _, n in data.sources] == [3, 12, 5]
    starts = [tokenizer.decode(s["input_ids"], skip_special_tokens=True)[0] for s in data.samples]
    assert sorted(starts) == ["a"] * 3 + ["b"] * 12 + ["c"] * 5
    assert starts != sorted(starts), "datasets should be mixed"


def test_a_dataset_without_num_fills_the_gap_of_another(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    (tmp_path / "few.txt").write_text("\n".join(f"only {i} lines in this file" for i in range(2)))
    (tmp_path / "many.txt").write_text("\n".join(f"line number {i} of the file" for i in range(50)))
    data = prepare_calibration(f"{tmp_path}/many.txt,{tmp_path}/few.txt", tokenizer, seqlen=16, nsamples=20, seed=0)
    assert [n for _, n in data.sources] == [18, 2]
    assert not caplog.records
