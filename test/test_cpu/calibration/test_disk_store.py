"""Activations in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.calibration.capture import capture_inputs
from auto_round.calibration.disk_store import DiskStore, DiskTensor
from auto_round.errors import OutputError
from auto_round.modeling.source import open_source


@given(
    rows=st.lists(st.integers(0, 6), max_size=9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]),
)
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[int], dtype: torch.dtype) -> None:
    values = (torch.arange(7 * 6).reshape(7, 2, 3) % 5).to(dtype)
    with DiskStore(tmp_path_factory.mktemp("disk_store")) as file:
        file.put(torch.ones(3))  # another tensor before it
        kept = file.put(values)
        assert kept.shape == values.shape and kept.dtype == dtype and kept.nbytes == values.nbytes
        assert torch.equal(kept[rows], values[rows]) and torch.equal(kept[2], values[2])
        assert torch.equal(kept[1:4], values[1:4]) and torch.equal(kept.read(), values)


def test_writing_some_rows_leaves_the_others(tmp_path: Path) -> None:
    values = torch.randn(5, 4)
    with DiskStore(tmp_path) as file:
        kept, target = file.put(values), file.empty((5, 4), torch.bfloat16)
        second = kept.clone()
        kept[[3, 0]] = torch.tensor([[1.0] * 4, [2.0] * 4])
        target[0:5] = values  # cast as it is written
        assert kept[3].tolist() == [1.0] * 4 and kept[0].tolist() == [2.0] * 4
        assert torch.equal(kept[[1, 2, 4]], values[[1, 2, 4]]) and torch.equal(second.read(), values)
        assert torch.equal(target.read(), values.bfloat16())


def test_no_file_is_left_even_while_it_is_open(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "work") as file:
        file.put(torch.ones(100))
        assert list((tmp_path / "work").iterdir()) == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="AR_WORK_SPACE"):
        DiskStore(tmp_path / "taken")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as file:
        target = file.empty((4,), torch.float32)
        with open("/dev/full", "wb", buffering=0) as full:
            file._file.close()
            file._file = full
            with pytest.raises(OutputError, match="AR_WORK_SPACE"):
                target[0:4] = torch.ones(4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe"])
def test_captured_inputs_in_a_file_are_the_same(
    family: str, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_round.calibration.block_calls._MIN_DISK_BYTES", 1)  # every argument, however small
    source = open_source(tiny_folder(family))
    mask = torch.ones(12, dtype=torch.int64)
    mask[:3] = 0
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
    samples = [
        {"input_ids": row, "attention_mask": mask if i % 2 else torch.ones_like(mask)} for i, row in enumerate(ids)
    ]
    held = capture_inputs(source, samples)
    with DiskStore(tmp_path) as file:
        kept = capture_inputs(source, samples, dtype=torch.float64, disk_store=file)
        assert isinstance(kept.hidden, DiskTensor) and kept.dtype == held.dtype
        assert torch.equal(kept.hidden.read(), held.hidden.double())  # type: ignore[union-attr]
        assert any(isinstance(leaf, DiskTensor) for calls in kept._calls for call in calls for leaf in call.leaves)
        block = source.load(source.blocks[0])
        with torch.no_grad():
            for samples_run in ([0, 1, 2, 3], [1, 3], [2]):
                hidden = held.hidden[samples_run]
                assert torch.equal(kept.run(0, block, hidden, samples_run), held.run(0, block, hidden, samples_run))


def test_the_journal_takes_and_gives_it_row_by_row(tmp_path: Path) -> None:
    from auto_round.run.fingerprint import tensors_checksum
    from auto_round.run.journal_files import open_tensors, read_tensors, write_tensors

    values = torch.randn(5, 3, 4)
    with DiskStore(tmp_path / "work") as file:
        kept, target = file.put(values), file.empty(values.shape, values.dtype)
        path = tmp_path / "stream.safetensors"
        mark = write_tensors(path, {"hidden": kept})
        assert mark == write_tensors(tmp_path / "other.safetensors", {"hidden": values})
        stored = open_tensors(path, mark)
        for row in range(5):
            target[row] = stored.read("hidden", row)
        assert torch.equal(target.read(), values) and torch.equal(read_tensors(path, mark)[0]["hidden"], values)
        assert tensors_checksum([kept]) == tensors_checksum([values])
