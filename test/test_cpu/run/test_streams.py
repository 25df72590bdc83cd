"""Hidden states that travel through blocks: in place, in a file, and on a device that is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import known_families

from auto_round.calibration.capture import capture_inputs
from auto_round.calibration.disk_store import DiskStore
from auto_round.calibration.observers import SecondMomentObserver
from auto_round.errors import DeviceError
from auto_round.modeling.source import ModelSource, open_source
from auto_round.run.journal import Journal
from auto_round.run.streams import Stream

CPU = torch.device("cpu")


@pytest.fixture
def source(tiny_folder: Callable[..., Path]) -> ModelSource:
    return open_source(tiny_folder("llama"))


def stream(source: ModelSource, disk_store: DiskStore | None = None, batch: int = 4) -> Stream:
    ids = torch.randint(3, 90, (6, 10), generator=torch.Generator().manual_seed(2))
    captured = capture_inputs(source, [{"input_ids": row} for row in ids], dtype=torch.float32, disk_store=disk_store)
    return Stream.of(captured, batch, CPU, torch.float32)


def test_in_place_and_in_a_file_the_numbers_are_the_same(source: ModelSource, tmp_path: Path) -> None:
    with DiskStore(tmp_path) as file:
        plain, fresh, spilled = stream(source), stream(source), stream(source, file)
        second = spilled.clone()
        for index, name in enumerate(source.blocks):
            block = source.load(name)
            plain.after(index, block, CPU, torch.float32, in_place=True)
            fresh.advance_to(fresh.after(index, block, CPU, torch.float32))
            spilled.after(index, block, CPU, torch.float32, in_place=True)
            second.advance_to(second.after(index, block, CPU, torch.float32))
            source.release(name)
            for other in (fresh.hidden, spilled.hidden[0:6], second.hidden[0:6]):
                assert torch.equal(plain.hidden[0:6], other)  # type: ignore[arg-type]
        # Two buffers are used alternately, for any number of blocks.
        assert file.size == 3 * 6 * 10 * 32 * 4


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("name", ["gemma4_text:shared-kv", "gemma3n_text"])
def test_a_stream_continues_with_what_blocks_share(
    name: str, in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(known_families()[name].build())
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    journal = Journal(tmp_path / "out")
    journal.begin({})
    with DiskStore(tmp_path) as file:
        whole = stream(source, file if in_file else None)
        blocks = [source.load(block) for block in source.blocks]
        for index, block in enumerate(blocks):
            if index == len(blocks) - 1:
                saved = whole.saved("full", index)
                journal.streams = {kind: journal.write_stream(kind, hidden) for kind, hidden in saved.items()}
            whole.advance_to(whole.after(index, block, CPU, torch.float32))
        second = stream(source, file if in_file else None)
        second.restore_from("full", index, journal)
        assert torch.equal(second.after(index, block, CPU, torch.float32)[:], whole.hidden[:])
    assert len(saved) > 1 or name == "gemma3n_text"


@pytest.fixture
def tight() -> Iterator[Callable[..., list[int]]]:
    """`tight(block, most)`: a block that refuses more samples at once; returns the sizes it was called with."""
    handles: list[Any] = []

    def make(block: torch.nn.Module, most: int) -> list[int]:
        seen: list[int] = []

        def before(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].shape[0])
            if args[0].shape[0] > most:
                raise torch.OutOfMemoryError("out of memory")

        # In the MLP, after the attention's observers have added what they saw.
        handles.append(block.mlp.register_forward_pre_hook(before))  # type: ignore[operator, union-attr]
        return seen

    yield make
    for handle in handles:
        handle.remove()


def test_a_full_device_gets_smaller_batches_and_nothing_counts_twice(
    source: ModelSource, tight: Callable[..., list[int]]
) -> None:
    names = ["self_attn.q_proj", "mlp.down_proj"]
    small, large = stream(source, batch=1), stream(source, batch=4)
    block = source.load(source.blocks[0])
    with SecondMomentObserver().observing(block, names) as wanted:
        small.after(0, block, CPU, torch.float32, (wanted,), in_place=True)
    seen = tight(block, 1)
    with SecondMomentObserver().observing(block, names) as found:
        large.after(0, block, CPU, torch.float32, (found,), in_place=True)
    assert seen == [4, 2] + [1] * 6 and large.batch == 1
    assert torch.equal(small.hidden, large.hidden)  # type: ignore[arg-type]
    assert found.tokens == wanted.tokens
    assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_one_sample_that_does_not_fit_is_a_device_error(source: ModelSource, tight: Callable[..., list[int]]) -> None:
    given = stream(source)
    block = source.load(source.blocks[0])
    tight(block, 0)
    with pytest.raises(DeviceError, match="too little memory"):
        given.after(0, block, CPU, torch.float32, in_place=True)
