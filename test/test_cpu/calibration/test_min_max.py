"""Extremes of layers' inputs."""

from __future__ import annotations

import pytest
import torch

from auto_round.calibration.observers import MinMaxObserver
from auto_round.errors import NumericsError


def test_over_several_runs_and_only_where_the_mask_says() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4) * 3
    second[1, 2] = 1e6
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    with torch.no_grad(), MinMaxObserver().observing(block, ["0"]) as extremes:
        block(first)
        extremes.mask = mask
        block(second)
    block(torch.full((1, 1, 4), 1e9))  # the hooks are removed
    low, high = extremes.of("0")
    counted = torch.cat([first.reshape(-1, 4), second[mask]])
    assert (float(low), float(high)) == (float(counted.min()), float(counted.max()))
    assert set(extremes) == {"0"}


def test_zero_is_always_inside() -> None:
    extremes = MinMaxObserver()
    extremes.add("up", torch.tensor([[2.0, 3.0]]))
    extremes.add("down", torch.tensor([[-2.0, -3.0]]))
    assert [float(v) for v in (*extremes.of("up"), *extremes.of("down"))] == [0.0, 3.0, -3.0, 0.0]


def test_experts_without_tokens_take_their_siblings() -> None:
    extremes = MinMaxObserver()
    extremes.add("mlp.experts.0.up_proj", torch.tensor([[1.0, -2.0]]))
    extremes.add("mlp.experts.1.up_proj", torch.tensor([[4.0]]))
    extremes.add("mlp.experts.1.up_proj", torch.zeros(0, 1))
    extremes.add("mlp.experts.1.down_proj", torch.tensor([[9.0]]))
    assert [float(v) for v in extremes.of("mlp.experts.2.up_proj")] == [-2.0, 4.0]
    assert [float(v) for v in extremes.of("never_ran")] == [-2.0, 9.0]


def test_what_cannot_become_a_scale() -> None:
    with pytest.raises(NumericsError, match="'k_proj': no calibration token reached it"):
        MinMaxObserver().of("k_proj")
    extremes = MinMaxObserver()
    extremes.add("k_proj", torch.tensor([[float("inf")]]))
    with pytest.raises(NumericsError, match="NaN or Inf in the inputs of layer 'k_proj'"):
        extremes.of("k_proj")
