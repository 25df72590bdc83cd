"""The journal's files: layers come back exactly, damage is found, and a kill leaves the state before or after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from auto_round.edits import ChannelScale
from auto_round.errors import OutputError
from auto_round.modeling.source import open_source
from auto_round.report.run_report import BlockRecord
from auto_round.run.fingerprint import differences
from auto_round.run.folders import journal_bytes
from auto_round.run.journal import Journal, journal_folder
from auto_round.run.journal_files import Unit, read_tensors, write_tensors

RNG = torch.Generator().manual_seed(1)


def scales(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return equal(vars(one), vars(other)) if hasattr(one, "__dataclass_fields__") else bool(one == other)


def test_a_unit_comes_back_exactly(tmp_path: Path) -> None:
    mark = {"records": [["a", 0, 3, 17], ["b", 1, None]], "expected": {"a": "digest"}, "missing": {"c": 2}}
    unit = Unit(
        {"auto_round": (mark, {"late.b": scales(3)}), "gguf:q4_0": ({}, {})}, [BlockRecord("a", 1e-3, 1 / 3, 2, 0.1)],
        {"k_scale": torch.tensor(0.1)}, {"a": scales(64)}, {"a": 7}, ["b"], {"a": "few"}, {"policy": "fail"},
        {"a.weight": ChannelScale(scales(8), 1)}, 0.5,
    )  # fmt: skip
    size = write_tensors(tmp_path / "unit", *unit.state())
    found = Unit.from_state(*read_tensors(tmp_path / "unit", size))
    assert equal(found, unit)
    assert load_file(tmp_path / "unit")  # an ordinary safetensors file


@settings(max_examples=40)
@given(st.data())
def test_any_flipped_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "file"
    mark = write_tensors(path, {"x": torch.arange(40.0), "y": torch.tensor(3, dtype=torch.int8)}, {"a": 1})
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with pytest.raises(OutputError, match="damaged"):
        read_tensors(path, mark)


def test_a_journal_is_read_back_and_tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    folder = journal_folder(Path("out"))
    assert folder != journal_folder(Path("other")) and folder == journal_folder(Path.cwd() / "out")
    journal = Journal(Path("out"))
    journal.load()
    assert journal.is_empty
    journal.begin({"settings": {"seed": 1}})
    hidden = [scales(2, 3, 4) for _ in range(3)]
    for index in range(3):
        journal._written = {"full": journal.write_stream("full", hidden[index])}
        journal.write_unit(f"block {index}", {"x": torch.tensor(index)}, [index], index)
    (folder / "unit-0003.safetensors.partial").write_bytes(b"cut short")
    (folder / "full-0002.safetensors").write_bytes(b"should have been removed")
    again = Journal(Path("out"))
    again.load()
    again.remove_uncommitted()
    again.check()
    assert sorted(p.name for p in folder.iterdir()) == [
        "full-0003.safetensors", "manifest.json", "run.json", *(f"unit-000{i}.safetensors" for i in range(3)),
    ]  # fmt: skip
    assert again.run == {"settings": {"seed": 1}} and torch.equal(again.stream("full").read("hidden"), hidden[2])
    assert [read_tensors(folder / unit["file"], unit["mark"])[1] for unit in again.units] == [[0], [1], [2]]
    files = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    assert again.nbytes() == sum(p.stat().st_size for p in files)
    again.complete("fmt", {"file": "digest"})
    again.finish(keep_record=True)
    last = Journal(Path("out"))
    last.load()
    assert not last.units and last.done == {"fmt": {"file": "digest"}} and not list(folder.glob("*.safetensors"))
    last.remove()
    assert not (tmp_path / "space").exists()


def test_an_unwritable_work_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="AR_WORK_SPACE"):
        Journal(Path("x")).begin({})


def test_nothing_is_recorded_after_a_write_that_failed(
    tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    journal = Journal(tmp_path / "out")
    journal.check_compatible({}, {})
    journal.open(lambda: {"smoke_sample": None}, open_source(tiny_folder("llama")), [])
    done: list[int] = []
    held = threading.Event()
    journal._submit(lambda: bool(held.wait()) or None)
    first, *_ = [journal._submit(lambda number=number: done.append(number)) for number in range(5)]
    assert done == []  # nobody waits for the task before
    held.set()
    first.result()
    assert done[0] == 0
    journal.wait_until_written()
    assert done == [0, 1, 2, 3, 4]

    def write_stream(*_: Any) -> None:
        raise OutputError("disk full")

    monkeypatch.setattr(journal, "write_stream", write_stream)
    journal.submit_streams({"full": torch.zeros(1)})
    with pytest.raises(OutputError, match="disk full"):
        journal.add("block 0", Unit(), 0)
        journal.wait_until_written()
    assert journal.finished_units() == 0
    journal.close()
    assert not journal.folder.exists()


def test_a_stream_may_change_when_it_is_written_and_a_unit_counts_when_all_is(
    tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full-precision stream is written beside the unit that it comes after, the other one after it."""
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    journal = Journal(tmp_path / "out")
    journal.check_compatible({"seed": 1}, {})
    journal.open(lambda: {"smoke_sample": None}, open_source(tiny_folder("llama")), [])
    full, quantized = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    for index in range(3):
        journal.wait_until_written("full")
        full += 1
        journal.submit_streams({"full": full})
        journal.wait_until_written("quantized")
        quantized += 2
        journal.submit_streams({"full": full, "quantized": quantized})
        journal.add(f"block {index}", Unit(), index)
    journal.wait_until_written()
    again = Journal(tmp_path / "out")
    again.load()
    again.check()
    assert [unit["name"] for unit in again.units] == ["block 0", "block 1", "block 2"]
    assert torch.equal(again.stream("full").read("hidden"), full) and torch.equal(
        again.stream("quantized").read("hidden"), quantized
    )
    full += 1
    journal.submit_streams({"full": full})  # of a block that is not finished
    journal.close()
    again.load()
    assert torch.equal(again.stream("full").read("hidden"), full - 1)
    again.remove_uncommitted()
    assert len(list(again.folder.iterdir())) == 7


def test_differences_are_named() -> None:
    before = {"seed": 1, "layers": {"a": "int4", "b": "int8"}, "same": [1]}
    now = {"seed": 2, "layers": {"a": "int4", "b": "int4"}, "same": [1], "new": True}
    found = differences(before, now)
    assert found == ['layers.b: "int8" then, "int4" now', "new: null then, true now", "seed: 1 then, 2 now"]


def test_the_size_that_is_planned(tmp_path: Path, packable_folder: Any, token_ids: Any) -> None:
    """The activations, twice; the rest is small."""
    from auto_round import AutoRound

    sizes: list[int] = []
    real = Journal.finish

    def finish(self: Journal, keep_record: bool) -> None:
        sizes.append(self.nbytes())
        real(self, keep_record)

    ar = AutoRound(packable_folder("llama"), group_size=32, dataset=token_ids, nsamples=8, seqlen=24, iters=1)
    job = ar.plan("auto_round", str(tmp_path / "out"))
    assert job.journal_bytes == journal_bytes(ar.settings, 64, 4) == 2 * 2 * 8 * 24 * 64 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", finish)
        ar.quantize_and_save(tmp_path / "out")
    assert 0.5 < sizes[0] / (job.journal_bytes / 2) < 1.5  # headers of files weigh in so small a model
    assert "journal " in job.render()
