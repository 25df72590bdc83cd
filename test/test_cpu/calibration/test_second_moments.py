from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from auto_round.calibration.observers import SecondMomentObserver
from auto_round.errors import NumericsError


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def test_sums_of_squares_over_runs_and_layers() -> None:
    module, batches = block(), [torch.randn(2, 4, 7), torch.randn(1, 4, 7)]
    with SecondMomentObserver().observing(module, ["0", "2"]) as moments:
        for x in batches:
            module(x)
    rows = torch.cat([x.reshape(-1, 7) for x in batches])
    torch.testing.assert_close(moments["0"], rows.square().sum(0))
    torch.testing.assert_close(moments["2"], torch.relu(module[0](rows)).square().sum(0).detach())
    assert moments["0"].dtype == torch.float32 and moments.tokens == {"0": 12, "2": 12}


def test_masked_positions_do_not_count() -> None:
    module, x = block(), torch.randn(2, 4, 7)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    with SecondMomentObserver().observing(module, ["0"]) as moments:
        moments.mask = mask
        module(x.masked_fill(~mask.unsqueeze(-1), 1e30))
    torch.testing.assert_close(moments["0"], x[mask].square().sum(0))
    assert moments.tokens["0"] == 6


def test_hooks_are_removed_after_an_error() -> None:
    module = block()
    with pytest.raises(RuntimeError, match="on purpose"), SecondMomentObserver().observing(module, ["0", "2"]):
        raise RuntimeError("on purpose")
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_low_precision_inputs_are_summed_in_float32() -> None:
    moments = SecondMomentObserver()
    x = torch.full((5000, 3), 1.0, dtype=torch.bfloat16)
    moments.add("a", x)
    assert moments["a"].tolist() == [5000.0] * 3, "bfloat16 sums stop growing at 256"


@pytest.mark.parametrize("width", [31, 576, 1000, 1536])
def test_the_thread_count_does_not_change_a_bit(width: int) -> None:
    x = torch.randn(3000, width, generator=torch.Generator().manual_seed(1))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moments = SecondMomentObserver()
            moments.add("a", x)
            results.append(moments["a"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_layers_that_never_ran_have_zeros_and_nan_is_named(tiny_model: Callable[..., Any]) -> None:
    from auto_round.modeling.experts import unfuse_experts

    layer = tiny_model("mixtral").model.layers[0]
    unfuse_experts(layer)
    names = [f"mlp.experts.{e}.gate_proj" for e in range(5)]
    with torch.no_grad(), SecondMomentObserver().observing(layer, names) as moments:
        layer.mlp(torch.randn(1, 1, 32))
    assert sorted(moments.tokens.values()) == [0, 0, 0, 1, 1]
    assert all(moments[n].shape == (32,) for n in names)
    moments.check()
    moments.add(names[0], torch.full((1, 32), torch.nan))
    with pytest.raises(NumericsError, match="experts.0.gate_proj"):
        moments.check()
