"""Widths that kernels ask for, by hand-worked sizes."""

from __future__ import annotations

import pytest

from auto_round.export.formats import get_format
from auto_round.export.size_rules import FASTER
from auto_round.schemes import QuantizationScheme


@pytest.mark.parametrize(("fmt", "group", "inputs", "outputs", "problem"), [
    ("auto_awq", 128, 256, 384, None), ("auto_awq", 128, 256, 192, "out_features=192 is not"),
    ("auto_awq", 64, 256, 192, None), ("auto_awq", 128, 192, 128, "in_features=192 is not"),
    ("auto_awq", 32, 64, 48, "out_features=48 is not a multiple of 32"), ("auto_awq", -1, 256, 96, None),
    ("auto_gptq", 128, 256, 192, None), ("auto_gptq", 128, 192, 128, "in_features=192"),
    ("gptqmodel", 32, 64, 48, "out_features=48"), ("mlx", 64, 128, 8, None), ("mlx", 64, 96, 8, "in_features=96"),
    ("mlx", 32, 96, 12, "out_features=12"), ("llm_compressor", 128, 192, 7, "in_features=192"),
    ("llm_compressor", 64, 192, 7, None),
])  # fmt: skip
def test_sizes(fmt: str, group: int, inputs: int, outputs: int, problem: str | None) -> None:
    scheme = QuantizationScheme(bits=4, group_size=group)
    found = get_format(fmt).check_layer(scheme, inputs, outputs)
    assert (found is None) if problem is None else (problem in str(found))


def test_marlin_is_only_faster() -> None:
    assert FASTER["Marlin"].problem(256, 192, 64) is None
    assert "out_features=96" in str(FASTER["Marlin"].problem(256, 96, 32))
    assert get_format("auto_gptq").check_layer(QuantizationScheme(bits=4, group_size=32), 256, 96) is None
