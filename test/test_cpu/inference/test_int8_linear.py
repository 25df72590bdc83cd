"""The int8 layer: its numbers, its buffers and what it keeps."""

from __future__ import annotations

import pytest
import torch

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import read_config
from auto_round.inference.linear import Int8Linear, int8_shapes

CONFIG = {
    "bits": 8, "group_size": -1, "sym": True, "data_type": "int", "act_bits": 8, "act_group_size": -1, "act_sym": True,
    "act_data_type": "int", "act_dynamic": True, "packing_format": "auto_round:llm_compressor",
}  # fmt: skip


def build(**changes: object) -> Int8Linear:
    fmt = read_config(CONFIG | changes).default
    layer = Int8Linear(32, 6, fmt, bias=True)
    generator = torch.Generator().manual_seed(4)
    half = 2 ** (fmt.bits - 1)
    layer.weight.copy_(torch.randint(-half, half, (6, 32), generator=generator))
    layer.weight_scale.copy_(torch.rand(layer.weight_scale.shape, generator=generator) * 0.02)
    layer.bias.copy_(torch.randn(6, generator=generator))  # type: ignore[union-attr]
    if layer.weight_zero_point is not None:
        layer.weight_zero_point.copy_(torch.randint(-half, half, layer.weight_zero_point.shape, generator=generator))
    if layer.input_scale is not None:
        layer.input_scale.fill_(0.03)
    if layer.input_zero_point is not None:
        layer.input_zero_point.fill_(-7)
    layer.prepare()
    return layer


@pytest.mark.parametrize("changes", [
    {}, {"sym": False}, {"group_size": 8}, {"bits": 4, "act_bits": 4}, {"act_sym": False}, {"act_group_size": 16},
    {"act_dynamic": False}, {"act_dynamic": False, "act_sym": False},
])  # fmt: skip
def test_numbers(changes: dict[str, object]) -> None:
    layer = build(**changes)
    assert {n: tuple(b.shape) for n, b in layer.named_buffers() if n != "bias"} == int8_shapes(32, 6, layer.format)
    codes, scale, zero = layer.unpack()
    assert codes.dtype == zero.dtype == torch.uint8
    size = 32 // scale.shape[1]
    weight = (codes.float() - zero.float().repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(2, 5, 32)
    assert layer.activation is not None
    assert torch.equal(layer(x), torch.nn.functional.linear(layer.activation(x), weight, layer.bias))
    static = changes.get("act_dynamic") is False
    scheme = layer.format.activation
    assert scheme is not None and scheme.dynamic is not static
    if static:
        zero_point = None if scheme.sym else -7
        assert torch.equal(layer.activation(x), ActivationQuantizer(scheme, torch.tensor(0.03), zero_point)(x))


def test_scales_keep_their_dtype() -> None:
    layer = build(act_dynamic=False)
    before = layer.weight_scale.clone(), layer.input_scale.clone()  # type: ignore[union-attr]
    layer.to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight_scale, before[0]) and torch.equal(layer.input_scale, before[1])  # type: ignore[arg-type]
    assert layer(torch.randn(1, 32).bfloat16()).dtype == torch.bfloat16


def test_a_broken_file() -> None:
    layer = build(act_dynamic=False)
    layer.input_scale.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="up: input_scale holds NaN"):
        layer.prepare("up")


def test_configs() -> None:
    config = read_config(CONFIG | {"extra_config": {"a": {"act_dynamic": False}, "b": {"bits": 16}, "c": {"bits": 4}}})
    layers = {name: config.layer(name, True) for name in "abcd"}
    assert layers["b"] is None and layers["d"] == config.default
    a, c = layers["a"], layers["c"]
    assert a and a.activation and not a.activation.dynamic and a.activation.bits == 8
    assert c and c.bits == 4 and c.activation == config.default.activation
    with pytest.raises(UnsupportedError, match="activations of data type 'mx_fq'"):
        read_config(CONFIG | {"act_data_type": "mx_fq"})
