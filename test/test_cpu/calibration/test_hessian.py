"""Products of input channels against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auto_round.calibration.observers import InputHessian, band_width, hessian_bytes


class Shared(nn.Module):
    """Two layers of one input, one of another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, apart: bool = False, skip: bool = False) -> torch.Tensor:
        y = self.a(x)
        return self.c(torch.relu(y if skip else y + self.b(x.clone() if apart else x)))


@pytest.mark.parametrize("width", [32, 256, 300, 600])
def test_sums_over_runs(width: int) -> None:
    module, batches = Shared(width), [torch.randn(2, 5, width), torch.randn(1, 5, width)]
    with torch.no_grad(), InputHessian().observing(module, ["a", "b", "c"]) as products:
        for x in batches:
            module(x)
    rows = torch.cat([x.reshape(-1, width) for x in batches]).double()
    hidden = torch.relu(rows.float() @ (module.a.weight + module.b.weight).t()).double()
    for name, seen in (("a", rows), ("c", hidden)):
        found = products.of(name)
        assert found is not None and len(found) == 1
        torch.testing.assert_close(found[0].double(), seen.t() @ seen, rtol=1e-4, atol=1e-3)
        assert torch.equal(found[0], found[0].t())
    assert products.of("a") is products.of("b")
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_bands_are_the_blocks_of_the_whole() -> None:
    x = torch.randn(40, 600)
    products = InputHessian(band=256)
    products.add("a", x)
    products.close()
    found = products.of("a")
    assert found is not None and [len(band) for band in found] == [256, 256, 88]
    for start, band in zip((0, 256, 512), found, strict=True):
        part = x[:, start : start + 256]
        torch.testing.assert_close(band, part.t() @ part, rtol=1e-4, atol=1e-3)


def test_masked_positions_do_not_count() -> None:
    x, mask = torch.randn(2, 4, 7), torch.tensor([[True, True, False, True], [False, True, True, True]])
    products = InputHessian()
    products.mask = mask
    products.add("a", x.masked_fill(~mask.unsqueeze(-1), 1e30))
    products.add("expert", x[0])  # of another shape: all of it
    products.close()
    for name, rows in (("a", x[mask]), ("expert", x[0])):
        found = products.of(name)
        assert found is not None
        torch.testing.assert_close(found[0], rows.t() @ rows)


def test_of_many_tokens_every_fourth_counts() -> None:
    x = torch.randn(64, 8)
    products = InputHessian()
    products.add("a", x.bfloat16())
    products.close()
    found = products.of("a")
    assert found is not None
    rows = x.bfloat16().float()[::4]
    torch.testing.assert_close(found[0], rows.t() @ rows)


@pytest.mark.parametrize("second", [{"apart": True}, {"skip": True}])
@pytest.mark.parametrize("turned", [False, True])
def test_inputs_shared_in_some_runs_only(second: dict[str, bool], turned: bool) -> None:
    """A sum that is not a layer's own is not given out as such."""
    module, runs = Shared(8), [{}, second]
    with torch.no_grad(), InputHessian().observing(module, ["a", "b"]) as products:
        for options in runs[::-1] if turned else runs:
            module(torch.randn(1, 5, 8), **options)
    assert products.of("b") is None and products.of("a") is not None


def test_layers_that_never_ran_have_none() -> None:
    module = Shared(8)
    with torch.no_grad(), InputHessian().observing(module, ["a", "b"]) as products:
        module(torch.randn(1, 5, 8), skip=True)
    assert products.of("b") is None and products.of("a") is not None


def test_memory_is_bounded() -> None:
    assert band_width([4096] * 6 + [11008]) == 4096
    assert band_width([768]) == 4096 and hessian_bytes([768]) == 4 * 768 * 768
    experts = [2048, 2048, 768] * 128
    assert band_width(experts) == 256 and hessian_bytes(experts) == 4 * sum(experts) * 256
    assert hessian_bytes([8192] * 6 + [28672]) <= 1 << 30


@pytest.mark.parametrize("width", [31, 576, 768, 1536])
def test_the_thread_count_does_not_change_a_bit(width: int) -> None:
    x = torch.randn(3000, width, generator=torch.Generator().manual_seed(1))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            products = InputHessian()
            products.add("a", x)
            products.close()
            results.append(products.of("a"))
    finally:
        torch.set_num_threads(threads)
    assert all(r is not None and torch.equal(r[0], results[0][0]) for r in results)
