"""The journal's files: layers come back exactly, damage is found, and a kill leaves the state before or after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.quantized_layer import DenseWeight, FloatCodes, IntCodes, QuantizedLayer
from auto_round.errors import OutputError
from auto_round.modeling.source import open_source
from auto_round.report.run_report import BlockRecord
from auto_round.run.fingerprint import differences, format_differences
from auto_round.run.journal import Journal, journal_folder, read_tensors, write_tensors
from auto_round.run.resume import Background, RunJournal
from auto_round.run.unit_state import Unit, journal_bytes, packed, unit_from_state, unit_state, unpacked
from auto_round.schemes import QuantizationScheme, parse_scheme

RNG = torch.Generator().manual_seed(1)


def codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=RNG, dtype=torch.uint8)


def scales(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG)


INT = QuantizationScheme(bits=4, group_size=32)
LAYERS = {
    "int4": QuantizedLayer("a", INT, IntCodes(codes(4, 8, 64), scales(8, 2).half(), 8, 32)),
    "int3-asym": QuantizedLayer(
        "a", QuantizationScheme(bits=3, group_size=32, sym=False),
        IntCodes(codes(3, 8, 64), scales(8, 2).half(), codes(3, 8, 2), 32), bias=scales(8).bfloat16(), transposed=True,
    ),
    "int8-static": QuantizedLayer(
        "a", QuantizationScheme(bits=8, group_size=-1, act_bits=8, act_dynamic=False, act_sym=False),
        IntCodes(codes(8, 8, 64), scales(8, 1), 128, -1), act_scale=torch.tensor(0.25), act_zero_point=-3,
    ),
    "blocks": QuantizedLayer(
        "a", QuantizationScheme(bits=8, group_size=(4, 32), data_type="fp8"),
        FloatCodes(codes(6, 8, 64), scales(2, 2), "e4m3", (4, 32)),
    ),
    "nvfp4": QuantizedLayer(
        "a", parse_scheme("NVFP4"), FloatCodes(codes(4, 8, 64), scales(8, 4), "e2m1", 16, torch.tensor(7.5)),
        act_global_scale=torch.tensor(3.0),
    ),
    "dense": QuantizedLayer("a", INT, DenseWeight(scales(8, 64))),
    "q4_k": QuantizedLayer("a", INT, plain_blocks(scales(4, 256), "Q4_K")),
    "q6_k": QuantizedLayer("a", INT, plain_blocks(scales(4, 256), "Q6_K")),
}  # fmt: skip


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if hasattr(one, "__dataclass_fields__") and not isinstance(one, QuantizationScheme):
        return type(one) is type(other) and all(
            equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    return bool(one == other) and type(one) is type(other)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_exactly(name: str, tmp_path: Path) -> None:
    layer = LAYERS[name]
    steps = {}
    if layer.scheme.quantizes_activations:
        assert layer.scheme.activations is not None
        steps = {"a": ActivationQuantizer(layer.scheme.activations, layer.act_scale, layer.act_zero_point)}
    unit = Unit(
        [layer], steps, [BlockRecord("a", 1e-3, 1 / 3, 2, 0.1)], {"k_scale": torch.tensor(0.1)},
        {"a": scales(64)}, {"a": 7}, ["b"],
    )  # fmt: skip
    mark = write_tensors(tmp_path / "unit", *unit_state(unit))
    found = unit_from_state(*read_tensors(tmp_path / "unit", mark), "cpu")
    (again,) = found.layers
    assert equal(again, layer)
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert found.records == unit.records and found.tokens == unit.tokens and found.unreached == unit.unreached
    assert {k: vars(v) for k, v in found.activations.items()} == {k: vars(v) for k, v in steps.items()}
    assert equal(found.scales["k_scale"], unit.scales["k_scale"]) and equal(found.sums["a"], unit.sums["a"])
    assert load_file(tmp_path / "unit")  # an ordinary safetensors file


@settings(max_examples=60)
@given(st.integers(1, 8), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 1 << 30))
def test_packing_bytes_of_any_shape(bits: int, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    small, widths = packed({"x": tensor})
    assert equal(unpacked(small, widths)["x"], tensor)
    if tensor.numel():
        width = next(w for w in (1, 2, 4, 8) if int(tensor.max()) < 1 << w)
        assert small["x"].numel() == -(-tensor.numel() * width // 8)


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
    journal = Journal(folder)
    journal.load()
    assert journal.is_empty
    journal.begin({"settings": {"seed": 1}})
    hidden = [scales(2, 3, 4) for _ in range(3)]
    for index in range(3):
        unit = journal.write_unit(f"block {index}", {"x": torch.tensor(index)}, [index], index)
        journal.commit(unit, {"full": journal.write_stream("full", hidden[index])})
    (folder / "unit-0003.safetensors.partial").write_bytes(b"cut short")
    (folder / "full-0002.safetensors").write_bytes(b"should have been removed")
    again = Journal(folder)
    again.load()
    again.remove_uncommitted()
    again.check()
    assert sorted(p.name for p in folder.iterdir()) == [
        "full-0003.safetensors", "manifest.json", "run.json", *(f"unit-000{i}.safetensors" for i in range(3)),
    ]  # fmt: skip
    assert again.run == {"settings": {"seed": 1}} and torch.equal(again.stream("full"), hidden[2])
    assert [again.unit(i)[1] for i in range(3)] == [[0], [1], [2]]
    files = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    assert again.nbytes() == sum(p.stat().st_size for p in files)
    again.complete("fmt", {"file": "digest"})
    again.drop_units()
    last = Journal(folder)
    last.load()
    assert not last.units and last.done == {"fmt": {"file": "digest"}} and not list(folder.glob("*.safetensors"))
    last.remove()
    assert not (tmp_path / "space").exists()


def test_an_unwritable_work_space(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="AR_WORK_SPACE"):
        Journal(tmp_path / "file" / "resume" / "x").begin({})


def test_background_does_tasks_in_order_and_none_after_one_that_failed() -> None:
    done: list[int] = []
    held = threading.Event()
    background = Background("test")
    background.submit(held.wait)
    first, *_ = [background.submit(lambda number=number: done.append(number)) for number in range(5)]
    assert done == []  # nobody waits for the task before
    held.set()
    background.wait(first)
    assert done[0] == 0
    background.wait()
    assert done == [0, 1, 2, 3, 4]

    def fail() -> None:
        raise OutputError("disk full")

    background.submit(fail)
    background.submit(lambda: done.append(9))
    with pytest.raises(OutputError, match="disk full"):
        background.wait()
    background.wait()
    background.close()
    assert 9 not in done


def test_a_stream_may_change_when_it_is_written_and_a_unit_counts_when_all_is(
    tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full-precision stream is written beside the unit that it comes after, the other one after it."""
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    journal = RunJournal(tmp_path / "out", False)
    journal.check_compatible({"seed": 1}, {})
    journal.open({"smoke_sample": None}, open_source(tiny_folder("llama")))
    full, quantized = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    for index in range(3):
        journal.wait_until_written("unit", "full")
        full += 1
        journal.submit_stream("full", full)
        journal.wait_until_written("quantized")
        quantized += 2
        journal.add(f"block {index}", Unit(), index, {"full": full, "quantized": quantized})
    journal.wait()
    again = Journal(journal.journal.folder)
    again.load()
    again.check()
    assert [unit["name"] for unit in again.units] == ["block 0", "block 1", "block 2"]
    assert torch.equal(again.stream("full"), full) and torch.equal(again.stream("quantized"), quantized)
    full += 1
    journal.submit_stream("full", full)  # of a block that is not finished
    journal.close()
    again.load()
    assert torch.equal(again.stream("full"), full - 1)
    again.remove_uncommitted()
    assert len(list(again.folder.iterdir())) == 7


def test_differences_are_named() -> None:
    before = {"seed": 1, "layers": {"a": "int4", "b": "int8"}, "same": [1]}
    now = {"seed": 2, "layers": {"a": "int4", "b": "int4"}, "same": [1], "new": True}
    found = differences(before, now)
    assert found == ['layers.b: "int8" then, "int4" now', "new: null then, true now", "seed: 1 then, 2 now"]
    assert format_differences(found, 2).endswith("; and 1 more")


def test_the_size_that_is_planned(tmp_path: Path, packable_folder: Any, token_ids: Any) -> None:
    """No less than what the journal takes, and not much more."""
    from auto_round import AutoRound

    sizes: list[int] = []
    real = RunJournal.finish

    def finish(self: RunJournal, keep_record: bool) -> None:
        streams = sum(mark[0] for _, mark in self.journal.streams.values())
        sizes.append(self.journal.nbytes() - streams)
        real(self, keep_record)

    ar = AutoRound(packable_folder("llama"), group_size=32, dataset=token_ids, nsamples=8, seqlen=24, iters=1)
    job = ar.plan("auto_round", str(tmp_path / "out"))
    streams = 2 * 2 * 8 * 24 * 64 * 4
    assert job.journal_bytes == journal_bytes(job.layers, ar.settings, 64, 4) > streams
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunJournal, "finish", finish)
        ar.quantize_and_save(tmp_path / "out")
    assert 0.6 < (job.journal_bytes - streams) / sizes[0] < 1.1  # headers of files weigh in so small a model
    assert "journal " in job.render()
