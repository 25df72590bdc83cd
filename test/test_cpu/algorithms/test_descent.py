"""Codes of ggml blocks by coordinate descent, against the error of outputs written out."""

from __future__ import annotations

import pytest
import torch
from ggml_codes import descend_blocks

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.descent import damp
from auto_round.algorithms.gptq import GPTQQuantizer, gptq_layer
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer, quantize_layer
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, ggml_scheme
from auto_round.schemes import QuantizationScheme

WIDTH, OUT = 256, 24


def tokens(count: int, seed: int) -> torch.Tensor:
    """Channels that go together, around a mean, as behind a norm."""
    mixing = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(count, 40, generator=generator) @ mixing + 2 * mixing[0]
    return together + torch.randn(count, WIDTH, generator=generator)


def weight() -> torch.Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(2)) * 0.05


def output_error(blocks: GgmlBlocks, w: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (blocks.dequantize() - w).double().t()).square().sum())


def layer(name: str, input_hessians: list[torch.Tensor] | None) -> LayerTask:
    module, x = torch.nn.Linear(WIDTH, OUT, bias=False), tokens(600, 0)
    return LayerTask(
        "a", module, weight(), ggml_scheme(name), x.square().sum(0), input_hessians=input_hessians, ggml=name
    )


@pytest.mark.parametrize("name", sorted(GGML_TYPES))
def test_outputs_on_other_tokens_are_closer(name: str) -> None:
    x, other = tokens(600, 0), tokens(200, 1)
    start = quantize_layer(layer(name, None), True, torch.float16).codes
    found = gptq_layer(layer(name, [x.t() @ x]), True, torch.float16).codes
    assert start is not None and found is not None
    assert output_error(found, weight(), other) < 0.7 * output_error(start, weight(), other)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_no_single_code_can_be_improved(name: str) -> None:
    """Every other value of every code, by the quadratic form itself, after passes enough to settle."""
    x, w, kind = tokens(300, 0).double(), weight()[:3], GGML_TYPES[name]
    square = (x.t() @ x).float()
    found = descend_blocks(w, search_blocks(w, name), [square], 0.1, passes=60)
    matrix = damp(square.clone(), 0.1).double()
    codes, change = found.codes.double(), (found.dequantize() - w).double()
    steps = found.step().repeat_interleave(kind.group, dim=1).double()
    gradient, best = change @ matrix, ((change @ matrix) * change).sum(1, keepdim=True)
    for code in range(kind.codes):
        moved = (code - codes) * steps
        error = best + 2 * gradient * moved + matrix.diagonal() * moved.square()
        assert bool((error >= best * (1 - 1e-4)).all()), code


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_damped_error_only_falls(passes: int) -> None:
    x, w = tokens(60, 0), weight()
    matrix = damp(x.t() @ x, 0.3).double()
    form = lambda b: float((((b.dequantize() - w).double() @ matrix) * (b.dequantize() - w)).sum())  # noqa: E731
    start = search_blocks(w, "Q3_K", x.square().sum(0))
    assert form(descend_blocks(w, start, [x.t() @ x], 0.3, passes)) < form(start)


def test_bands_are_separate() -> None:
    x = torch.cat([tokens(600, 0), tokens(600, 3)], dim=1)
    w = torch.cat([weight(), weight().flip(0)], dim=1)
    squares = [part.t() @ part for part in x.split(WIDTH, dim=1)]
    start = search_blocks(w, "Q4_K")
    whole = descend_blocks(w, start, squares, 0.3, 2).dequantize()
    for index, part in enumerate(w.split(WIDTH, dim=1)):
        own = search_blocks(part.contiguous(), "Q4_K")
        expected = descend_blocks(part, own, [squares[index]], 0.3, 2).dequantize()
        assert torch.equal(whole[:, index * WIDTH : (index + 1) * WIDTH], expected)


def test_who_wants_products() -> None:
    feedback, plain = GPTQQuantizer(), RTNQuantizer(RTNConfig())
    one = layer("Q4_K", None)
    assert feedback.needs_hessian(one) and not plain.needs_hessian(one)
    one.scheme, one.ggml = QuantizationScheme(4, 32), None
    assert not feedback.needs_hessian(one)


def test_a_group_of_zeros_stays() -> None:
    x, w = tokens(300, 0), weight()
    w[:, :64] = 0
    w[3] = 0
    found = descend_blocks(w, search_blocks(w, "Q4_K"), [x.t() @ x], 0.3, 2).dequantize()
    assert bool((found[3] == 0).all()) and bool(torch.isfinite(found).all())
