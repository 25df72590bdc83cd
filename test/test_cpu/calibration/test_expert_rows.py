"""What experts are fed and give, recorded by token and taken out again by expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.calibration.disk_store import DiskStore, empty_beside
from auto_round.calibration.expert_rows import (
    GatheredRows,
    InputRecordingExperts,
    ReplayExperts,
    Routing,
    TokenRows,
    max_tokens_per_expert,
)
from auto_round.errors import UnsupportedError


@given(st.integers(0, 40), st.integers(1, 3), st.integers(1, 6), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_routing_is_what_a_search_finds(
    rows: int, chosen: int, experts: int, most: int, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts + 1, (rows, chosen), generator=generator)  # `experts` is none
    weights = torch.rand(rows, chosen, generator=generator)
    counted = torch.rand(rows, generator=generator) < 0.7 if masked else None
    routing = Routing.of(index, weights, counted, experts)
    for number in range(experts):
        places = [
            (row, slot)
            for row in range(rows)
            for slot in range(chosen)
            if index[row, slot] == number and (counted is None or counted[row])
        ]
        assert routing.count(number) == len(places)
        if len(places) > most:
            places = [places[k * len(places) // most] for k in range(most)]
        tokens, shares = routing.expert(number, most)
        assert tokens.tolist() == [row for row, _ in places]
        assert shares.tolist() == [float(weights[place]) for place in places]


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(("count", "each"), [(7, 3), (6, 3), (1, 1), (2, 5)])
def test_rows_come_in_pieces_filled_up_with_zeros(in_file: bool, count: int, each: int, tmp_path: Path) -> None:
    values = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:count].sort().values
    with DiskStore(tmp_path) as disk_store:
        found = GatheredRows(disk_store.put(values) if in_file else values, rows, each)
        pieces = -(-count // each)
        assert found.shape == (pieces, each, 4)
        whole = torch.zeros(pieces * each, 4)
        whole[:count] = values[rows]
        whole = whole.view(pieces, each, 4)
        assert torch.equal(found[list(range(pieces))], whole)
        assert torch.equal(found[[pieces - 1, 0]], whole[[pieces - 1, 0]])
    present = found.present
    assert (present is None) == (count % each == 0)
    if present is not None:
        assert present.view(-1).tolist() == [place < count for place in range(pieces * each)]


def test_what_was_recorded_comes_back_for_the_samples_that_run(tmp_path: Path) -> None:
    running: list[int] = []
    given = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))  # 3 samples of 2 tokens
    with DiskStore(tmp_path) as disk_store:
        matrix = empty_beside(disk_store.put(torch.zeros(3, 2, 5)), (6, 5), torch.float32)
        record = TokenRows(lambda: matrix, 2, lambda: running)
        fed = InputRecordingExperts(record)
        for samples in ([2, 0], [1]):
            running[:] = samples
            rows = torch.tensor([2 * s + t for s in samples for t in range(2)])
            zeros = fed(given[rows], rows[:, None], rows[:, None] / 10)
            assert zeros.shape == (len(rows), 5) and not zeros.any()
        assert fed.index is not None and fed.weights is not None
        assert fed.index.flatten().tolist() == list(range(6))
        assert torch.equal(fed.weights.flatten(), torch.arange(6) / 10)
        running[:] = [1, 2]
        assert torch.equal(ReplayExperts(record)(torch.zeros(4, 5), rows, rows), given[2:])
        running[:] = [0]
        with pytest.raises(UnsupportedError, match="4 rows for 1 samples of 2 tokens.*iters=0"):
            record.write(given[:4])


@pytest.mark.parametrize(("given", "wanted"), [((1000, 2, 8), 1000), ((1000, 8, 128), 250), ((10, 1, 64), 1)])
def test_room_for_four_times_the_average(given: tuple[int, int, int], wanted: int) -> None:
    assert max_tokens_per_expert(*given) == wanted
