"""Layers come back exactly from a temporary file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.calibration.disk_store import DiskStore
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.quantized_layer import DenseWeight, FloatCodes, IntCodes, QuantizedLayer
from auto_round.run.expert_layers import read_layers, store_layer, stored_bytes
from auto_round.run.plan import LayerPlan
from auto_round.schemes import QuantizationScheme, parse_scheme

RNG = torch.Generator().manual_seed(1)


def codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=RNG, dtype=torch.uint8)


def scales(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG)


INT = QuantizationScheme(bits=4, group_size=32)
LAYERS = {
    "int4": QuantizedLayer("a", INT, IntCodes(codes(4, 8, 64), scales(8, 2).half(), 8, 32)),
    "int3-asym": QuantizedLayer(
        "a", QuantizationScheme(bits=3, group_size=32, sym=False),
        IntCodes(codes(3, 8, 64), scales(8, 2).half(), codes(3, 8, 2), 32), bias=scales(8).bfloat16(), transposed=True,
    ),
    "int8-static": QuantizedLayer(
        "a", QuantizationScheme(bits=8, group_size=-1, act_bits=8, act_dynamic=False, act_sym=False),
        IntCodes(codes(8, 8, 64), scales(8, 1), 128, -1), act_scale=torch.tensor(0.25), act_zero_point=-3,
    ),
    "blocks": QuantizedLayer(
        "a", QuantizationScheme(bits=8, group_size=(4, 32), data_type="fp8"),
        FloatCodes(codes(6, 8, 64), scales(2, 2), "e4m3", (4, 32)),
    ),
    "nvfp4": QuantizedLayer(
        "a", parse_scheme("NVFP4"), FloatCodes(codes(4, 8, 64), scales(8, 4), "e2m1", 16, torch.tensor(7.5)),
        act_global_scale=torch.tensor(3.0),
    ),
    "dense": QuantizedLayer("a", INT, DenseWeight(scales(8, 64))),
    "q4_k": QuantizedLayer("a", INT, plain_blocks(scales(4, 256), "Q4_K")),
    "q6_k": QuantizedLayer("a", INT, plain_blocks(scales(4, 256), "Q6_K")),
}  # fmt: skip


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if hasattr(one, "__dataclass_fields__") and not isinstance(one, QuantizationScheme):
        return type(one) is type(other) and all(
            equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    return bool(one == other) and type(one) is type(other)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_exactly(name: str, tmp_path: Path) -> None:
    layer = LAYERS[name]
    with DiskStore(tmp_path) as store:
        again = read_layers({"a": store_layer(layer, store)}, "a")["a"]
    assert equal(again, layer) and torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.parametrize("name", ["int4", "int3-asym", "q4_k", "q6_k"])
def test_the_size_that_is_planned(name: str, tmp_path: Path) -> None:
    layer = LAYERS[name]
    plan = LayerPlan("a", layer.scheme, layer.out_features, layer.in_features, None, False, ggml=layer.codes.ggml)
    with DiskStore(tmp_path) as store:
        store_layer(layer, store)
        assert store.size <= stored_bytes(plan) * 1.1 + 16
