"""The ggml types as registered functions: the contract, gradients, and sizes that do not fill blocks."""

from __future__ import annotations

import pytest
import torch

from auto_round import PRESET_SCHEMES
from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, ggml_scheme
from auto_round.data_type import get_quant_func
from auto_round.errors import ConfigError

NAMES = [name for name in sorted(GGML_TYPES) if ggml_scheme(name).data_type != "int"]


def call(name: str, weight: torch.Tensor, **kw: object) -> tuple[torch.Tensor, torch.Tensor, object]:
    scheme = ggml_scheme(name)
    function = get_quant_func(scheme.data_type, scheme.bits, scheme.sym)
    return function(weight, bits=scheme.bits, group_size=scheme.group_size, data_type=scheme.data_type, **kw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gives_what_the_search_stores(name: str, weighted: bool) -> None:
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(512) if weighted else None
    qdq, scale, zero = call(name, weight, imatrix=importance, scale_dtype=torch.float16)
    blocks = search_blocks(weight, name, importance)
    assert torch.equal(qdq, blocks.dequantize()) and torch.equal(scale, blocks.step())
    minimum = blocks.minimum()
    assert zero == blocks.kind.zero if minimum is None else torch.equal(zero, minimum)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_do_not_fill_blocks(name: str) -> None:
    weight = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    qdq, _, _ = call(name, weight)
    assert qdq.shape == weight.shape and qdq.dtype == weight.dtype
    flat = torch.nn.functional.pad(weight.reshape(6, 300), (0, 212)).float()
    share = torch.nn.functional.pad(torch.ones(300), (0, 212))
    expected = search_blocks(flat, name, share).dequantize()[:, :300].to(torch.bfloat16)
    assert torch.equal(qdq.reshape(6, 300), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    kind = GGML_TYPES[name]
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(2))
    weight[0, : kind.group] = 0  # a step of zero
    v = torch.zeros_like(weight, requires_grad=True)
    factors = [torch.ones(4 * 512 // kind.group, 1, requires_grad=True) for _ in range(2)]
    qdq, step, _ = call(name, weight, v=v, min_scale=factors[0], max_scale=factors[1])
    target = torch.randn(4, 512)
    (qdq * target).sum().backward()
    assert v.grad is not None
    spread = step.repeat_interleave(kind.group, 1)
    inside = ((qdq - weight).abs() <= spread.abs() * 0.501) & (spread != 0)
    torch.testing.assert_close(v.grad[inside], target[inside], rtol=1e-3, atol=1e-3)
    for factor, used in zip(factors, (kind.has_min, True), strict=True):
        assert (factor.grad is not None) == used
        if factor.grad is not None:
            assert bool(torch.isfinite(factor.grad).all()) and float(factor.grad.abs().max()) > 0


def test_offsets_and_factors_change_the_result_as_stored() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    plain, step, _ = call("Q4_K", weight)
    moved, _, _ = call("Q4_K", weight, v=step.repeat_interleave(32, 1))
    assert float((moved - plain).mean()) > 0.5 * float(step.mean())
    _, wider, _ = call("Q4_K", weight, max_scale=1.25)
    blocks = search_blocks(weight, "Q4_K")
    factors = (blocks.d.float() * 1.25).half().float().repeat_interleave(8, 1)
    assert blocks.scales is not None and torch.equal(wider, factors * blocks.scales.float())


def test_presets_have_functions_and_others_are_refused() -> None:
    for name, scheme in PRESET_SCHEMES.items():
        if name.startswith("GGUF:"):
            assert callable(get_quant_func(scheme.data_type, scheme.bits, scheme.sym))
    with pytest.raises(ConfigError, match="give bits=2, 4, 5"):
        get_quant_func("int_asym_dq", 3, False)(torch.randn(2, 256), bits=3, group_size=16)
    with pytest.raises(ConfigError, match="give group_size=16"):
        get_quant_func("int_sym_dq", 6, True)(torch.randn(2, 256), bits=6, group_size=32)
