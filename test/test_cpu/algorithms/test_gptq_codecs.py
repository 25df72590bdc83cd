"""GPTQ on every type with codes: against the paper's algorithm written out, and lower output errors than RTN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auto_round.algorithms.base import BlockTask, LayerTask
from auto_round.algorithms.gptq import DAMPING, GPTQConfig, GPTQQuantizer, gptq_layer
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.ggml.types import GGML_TYPES, ggml_scheme
from auto_round.codecs.quantized_layer import DenseWeight
from auto_round.errors import ConfigError
from auto_round.schemes import QuantizationScheme, preset_name_to_scheme

WIDTH, OUT = 256, 24

INTEGERS = {
    f"int{bits} {size} {'sym' if sym else 'asym'}": QuantizationScheme(bits, size, sym, "int")
    for bits, size in ((2, 32), (3, 96), (4, 128), (4, -1), (4, 0), (5, 60), (8, 32))
    for sym in (True, False)
}
FLOATS = {
    name: preset_name_to_scheme(name) for name in ("MXFP4", "MXFP8", "MXINT4", "NVFP4", "FPW8A16", "FP8_BLOCK")
} | {
    "FP8 tensor": QuantizationScheme(8, 0, True, "fp"),
    "FP8 rows e5m2": QuantizationScheme(8, -1, True, "fp8_e5m2"),
    "FP8 blocks": QuantizationScheme(8, (16, 64), True, "fp"),
}
GGML = {name: ggml_scheme(name) for name in GGML_TYPES}


def inputs(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Correlated channels around a mean, some larger than others."""
    mixing = torch.randn(40, width, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(count, 40, generator=generator) @ mixing + 2 * mixing[0]
    return (together + torch.randn(count, width, generator=generator)) * torch.linspace(0.5, 2, width)


def layer(scheme: QuantizationScheme, ggml: str | None = None, width: int = WIDTH, count: int = 500) -> LayerTask:
    weight = torch.randn(OUT, width, generator=torch.Generator().manual_seed(2)) * 0.05
    x = inputs(count, width)
    module = torch.nn.Linear(width, OUT, bias=False)
    return LayerTask("a", module, weight, scheme, x.square().sum(0), input_hessians=[x.t() @ x], ggml=ggml)


def output_error(task: LayerTask, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    change = (weight - task.weight).double()
    return float(((change @ hessian.double()) * change).sum())


def papers_codes(task: LayerTask, scale: torch.Tensor, zero: torch.Tensor, bits: int, damping: float) -> torch.Tensor:
    """Algorithm 1 of the paper in float64, a column at a time: the upper Cholesky factor of the inverse Hessian, and
    every later column updated at once. `scale`, `zero`: [out, in]."""
    assert task.input_hessians is not None
    hessian = task.input_hessians[0].double()
    order = task.input_hessians[0].diagonal().argsort(descending=True, stable=True)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(hessian.shape[0], dtype=torch.float64)
    inverse = torch.linalg.inv(damped[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    weight, scale, zero = (t.double()[:, order].clone() for t in (task.weight, scale, zero))
    codes = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        codes[:, i] = (weight[:, i] / scale[:, i] + zero[:, i]).round().clamp(0, 2**bits - 1)
        error = (weight[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / factor[i, i]
        weight[:, i:] -= error.unsqueeze(1) * factor[i, i:]
    return codes[:, order.argsort()].to(torch.uint8)


@pytest.mark.parametrize("optimized", [True, False], ids=["searched", "plain"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_are_the_papers(name: str, optimized: bool) -> None:
    scheme = INTEGERS[name]
    task = layer(scheme)
    found = gptq_layer(task, optimized, torch.float16)
    qparams = task.start(optimized, torch.float16)
    size = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else WIDTH
    expand = lambda t: t.squeeze(-1).expand(OUT, -1).repeat_interleave(size, 1)[:, :WIDTH]  # noqa: E731
    zero = qparams.zero if isinstance(qparams.zero, torch.Tensor) else torch.full_like(qparams.scale, qparams.zero)
    expected = papers_codes(task, expand(qparams.scale), expand(zero), scheme.bits, DAMPING)
    assert torch.equal(found.codes.codes, expected)


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS, *GGML])
def test_the_output_error_is_lower_than_of_the_nearest_codes(name: str) -> None:
    scheme = {**INTEGERS, **FLOATS, **GGML}[name]
    task = layer(scheme, name if name in GGML else None)
    assert task.input_hessians is not None
    found = gptq_layer(task, True, torch.float16)
    nearest = quantize_layer(task, True, torch.float16)
    other = inputs(500, seed=7)  # of the same kind, not those that the codes were chosen with
    for hessian in (task.input_hessians[0], other.t() @ other):
        assert output_error(task, found.dequantize(), hessian) < 0.9 * output_error(task, nearest.dequantize(), hessian)
    for part in ("scale", "global_scale", "zero_point"):
        one, two = getattr(found.codes, part, None), getattr(nearest.codes, part, None)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, part


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_of_uncorrelated_inputs_are_the_nearest_ones(name: str) -> None:
    """With a diagonal Hessian columns do not act on each other."""
    task = layer(FLOATS[name])
    task.input_hessians = [torch.linspace(3, 1, WIDTH).diag()]
    found, nearest = gptq_layer(task, True, torch.float16), quantize_layer(task, True, torch.float16)
    assert torch.equal(found.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("scheme", [INTEGERS["int5 60 asym"], FLOATS["MXFP4"]], ids=["int", "float"])
def test_bands_need_not_end_with_a_group(scheme: QuantizationScheme) -> None:
    task = layer(scheme, width=230)
    x = inputs(500, 230)
    task.input_hessians = [part.t() @ part for part in x.split(100, dim=1)]
    found = gptq_layer(task, True, torch.float16).dequantize()
    blocks = torch.block_diag(*task.input_hessians)
    nearest = quantize_layer(task, True, torch.float16).dequantize()
    assert output_error(task, found, blocks) < 0.9 * output_error(task, nearest, blocks)


def test_without_hessian_or_codes_the_nearest_are_taken() -> None:
    scheme = INTEGERS["int4 128 sym"]
    task = replace(layer(scheme), input_hessians=None)
    codes = gptq_layer(task, True, torch.float16).codes.codes
    expected = quantize_layer(task, True, torch.float16).codes.codes
    assert codes is not None and expected is not None and torch.equal(codes, expected)
    by_function = layer(QuantizationScheme(4, (8, 8), True, "int"))
    found = gptq_layer(by_function, True, torch.float16)
    assert isinstance(found.codes, DenseWeight)


def test_who_wants_a_hessian() -> None:
    integer, float4, k = layer(INTEGERS["int4 128 sym"]), layer(FLOATS["MXFP4"]), layer(GGML["Q4_K"], "Q4_K")
    by_function = layer(QuantizationScheme(4, (8, 8), True, "int"))
    wants = lambda config: [GPTQQuantizer(config).needs_hessian(t) for t in (integer, float4, k, by_function)]  # noqa: E731
    assert wants(None) == [False, False, True, False]
    assert wants(GPTQConfig()) == [True, True, True, False]


def test_damping_is_used_and_checked() -> None:
    task = layer(INTEGERS["int4 128 sym"])
    module = torch.nn.Sequential(task.module)
    block = BlockTask("block", module, [task], lambda hidden, _: module(hidden), torch.float32, 0)
    found = [GPTQQuantizer(GPTQConfig(damping=d)).quantize_block(block).layers[0].codes.codes for d in (0.3, 0.01)]
    plain = gptq_layer(task, True, torch.float16).codes.codes
    assert found[0] is not None and found[1] is not None and plain is not None
    assert torch.equal(found[0], plain) and not torch.equal(found[0], found[1])
    for bad in (0, -1.0, 11, "much", True):
        with pytest.raises(ConfigError, match="damping"):
            GPTQConfig(damping=bad)  # type: ignore[arg-type]
