"""The scale search of small floats: never worse than the rule, and the best of its candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, encode, search_scales, spec_for_bits
from auto_round.codecs.minifloat import as_blocks, block_sum, dequantize_minifloat
from auto_round.errors import NumericsError
from auto_round.schemes import QuantizationScheme

TYPES: list[tuple[str, int, Any]] = [
    ("mx_fp", 4, 32), ("mx_fp", 8, 32), ("mx_fp_rceil", 4, 32), ("mx_int", 4, 32), ("nv_fp", 4, 16), ("fp", 8, -1),
    ("fp", 8, 0), ("fp", 8, (16, 24)), ("fp", 8, 32),
]  # fmt: skip


def errors(
    weight: torch.Tensor, kind: tuple[str, int, Any], scale: torch.Tensor | None, h: torch.Tensor
) -> torch.Tensor:
    """Weighted squared error by tile, in float64."""
    name, bits, size = kind
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    found = encode(weight, family, size, scale=scale)
    values = dequantize_minifloat(found.codes, family.element, found.scale, size, found.global_scale)
    return block_sum(as_blocks((values - weight).double().square() * h.double(), size)).flatten()


@given(
    st.sampled_from(TYPES), st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0])
)
@settings(max_examples=60)
def test_never_worse_than_the_rule(kind: tuple[str, int, Any], rows: int, columns: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).pow(3) * size
    weight[::4] = 0
    h = torch.rand(columns, generator=generator).pow(4)
    name, bits, group_size = kind
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    scale = search_scales(weight, family, group_size, h, family.global_scale(weight, None))
    plain, searched = errors(weight, kind, None, h), errors(weight, kind, scale, h)
    # float32 sums decide; the last bits of a tie between two scales may fall the other way
    assert bool((searched <= plain * (1 + 1e-3) + 1e-12 * size**2).all())
    assert torch.equal(scale, family.rule.store(scale))


@pytest.mark.parametrize("kind", TYPES)
def test_it_finds_the_best_candidate_and_gains(kind: tuple[str, int, Any]) -> None:
    name, bits, group_size = kind
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    h = torch.rand(96, generator=torch.Generator().manual_seed(4)) + 0.01
    h = h / h.mean()
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    g = family.global_scale(weight, None)
    plain = encode(weight, family, group_size).scale
    found = search_scales(weight, family, group_size, h, g)
    tried = torch.stack([errors(weight, kind, c.view_as(plain), h) for c in [plain, *family.rule.candidates(plain)]])
    torch.testing.assert_close(errors(weight, kind, found, h), tried.amin(0), rtol=1e-3, atol=1e-9)
    gain = 1 - float(errors(weight, kind, found, h).sum() / tried[0].sum())
    assert gain > (0.05 if bits == 4 else 0)


def test_channels_that_matter_are_kept() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    h = torch.ones(64)
    h[::8] = 1000.0
    family = spec_for_bits(BLOCK_FLOAT_SPECS["nv_fp"], "nv_fp", 4)
    assert family is not None
    g = family.global_scale(weight, None)
    error = {}
    for key, importance in (("weighted", h), ("alike", None)):
        scale = search_scales(weight, family, 16, importance, g)
        codes = encode(weight, family, 16, scale=scale, global_scale=g)
        values = dequantize_minifloat(codes.codes, family.element, codes.scale, 16, g)
        error[key] = float((values - weight)[:, ::8].square().sum())
    assert error["weighted"] < 0.8 * error["alike"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("optimized", [True, False])
def test_a_layer_holds_its_codes(kind: tuple[str, int, Any], optimized: bool) -> None:
    name, bits, size = kind
    weight = torch.randn(40, 72, generator=torch.Generator().manual_seed(6)).bfloat16()
    scheme = QuantizationScheme(bits, size, True, name)
    task = LayerTask("layer", torch.nn.Linear(72, 40), weight, scheme, importance=torch.rand(72), bias=torch.randn(40))
    layer = quantize_layer(task, optimized, torch.float16)
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    assert layer.codes.element == family.element.name and layer.codes.codes.dtype == torch.uint8
    assert (layer.codes.global_scale is not None) is family.has_global_scale
    m, n = size if isinstance(size, tuple) else (1 if size else 40, size if size > 0 else 72)
    assert layer.codes.scale.dtype == torch.float32 and tuple(layer.codes.scale.shape) == (-(-40 // m), -(-72 // n))
    assert torch.equal(layer.bias, task.bias)  # type: ignore[arg-type]
    again = dequantize_minifloat(layer.codes.codes, family.element, layer.codes.scale, size, layer.codes.global_scale)
    assert torch.equal(layer.dequantize(), again)
    assert float((again - weight.float()).norm() / weight.float().norm()) < (0.14 if bits == 4 else 0.04)


def test_a_shared_global_scale_is_used() -> None:
    weight = torch.randn(16, 32)
    task = LayerTask("layer", torch.nn.Linear(32, 16), weight, QuantizationScheme(4, 16, True, "nv_fp"))
    task.global_scale = torch.tensor(100.0)
    for optimized in (True, False):
        layer = quantize_layer(task, optimized, torch.float16)
        assert layer.codes.global_scale is not None and float(layer.codes.global_scale) == 100.0
        assert float((layer.dequantize() - weight).norm() / weight.norm()) < 0.12


def test_nan_names_the_layer() -> None:
    weight = torch.randn(8, 32)
    weight[3, 3] = float("nan")
    task = LayerTask("the.layer", torch.nn.Linear(32, 8), weight, QuantizationScheme(4, 32, True, "mx_fp"))
    for optimized in (True, False):
        with pytest.raises(NumericsError, match="the.layer"):
            quantize_layer(task, optimized, torch.float16)
