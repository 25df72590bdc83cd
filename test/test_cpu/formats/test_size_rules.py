"""Widths that kernels ask for, by hand-worked sizes."""

from __future__ import annotations

import pytest

from auto_round.formats.base import get_format, slow_kernel_notes
from auto_round.schemes import QuantizationScheme


@pytest.mark.parametrize(("fmt", "group", "inputs", "outputs", "problem"), [
    ("auto_awq", 128, 256, 384, None), ("auto_awq", 128, 256, 192, "out_features=192 is not"),
    ("auto_awq", 64, 256, 192, None), ("auto_awq", 128, 192, 128, "in_features=192 is not"),
    ("auto_awq", 32, 64, 48, "out_features=48 is not a multiple of 32"), ("auto_awq", -1, 256, 96, None),
    ("auto_gptq", 128, 256, 192, None), ("auto_gptq", 128, 192, 128, "in_features=192"),
    ("gptqmodel", 32, 64, 48, "out_features=48"), ("mlx", 64, 128, 8, None), ("mlx", 64, 96, 8, "in_features=96"),
    ("mlx", 32, 96, 12, None), ("auto_awq", 48, 96, 96, "group_size 48 is not a multiple of 32"),
    ("mlx", 16, 96, 8, "group_size 16 is not one of"),
    ("llm_compressor", 128, 192, 7, "in_features=192"),
    ("llm_compressor", 64, 192, 7, None),
])  # fmt: skip
def test_sizes(fmt: str, group: int, inputs: int, outputs: int, problem: str | None) -> None:
    scheme = QuantizationScheme(bits=4, group_size=group)
    found = get_format(fmt).check_layer(scheme, inputs, outputs)
    assert (found is None) if problem is None else (problem in str(found))


def test_marlin_is_only_faster() -> None:
    kernel = get_format("auto_gptq").fast_kernel
    assert kernel is not None and kernel == get_format("auto_awq").fast_kernel
    rule = kernel[1]
    assert rule.problem(256, 192, 64) is None and rule.problem(256, 192, -1) is None
    assert "out_features=96" in str(rule.problem(256, 96, 32))
    assert "group_size 16" in str(rule.problem(256, 64, 16))
    assert get_format("auto_gptq").check_layer(QuantizationScheme(bits=4, group_size=32), 256, 96) is None


def test_what_is_slower_is_said_once_a_kernel() -> None:
    layers = [("a", 256, 128, 64), ("b", 256, 96, 32), ("c", 64, 64, 32)]
    gptq, awq, mlx, fake = map(get_format, ("auto_gptq", "auto_awq", "mlx", "fake"))
    (line,) = slow_kernel_notes([gptq, awq, mlx], layers)
    assert line.startswith("2 of 3 quantized layers, such as b (out_features=96") and "Marlin" in line
    assert slow_kernel_notes([gptq], layers[:1]) == slow_kernel_notes([mlx, fake], layers) == []
