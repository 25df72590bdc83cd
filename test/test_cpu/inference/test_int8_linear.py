"""The int8 layer: its numbers, its buffers and what it keeps."""

from __future__ import annotations

import pytest
import torch
from integer_weights import arrays

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import read_config
from auto_round.inference.linear import PackedLinear
from auto_round.layouts.integers import PLAIN_INT

CONFIG = {
    "bits": 8, "group_size": -1, "sym": True, "data_type": "int", "act_bits": 8, "act_group_size": -1, "act_sym": True,
    "act_data_type": "int", "act_dynamic": True, "packing_format": "auto_round:llm_compressor",
}  # fmt: skip


def build(**changes: object) -> PackedLinear:
    fmt = read_config(CONFIG | changes).default
    layer = PackedLinear(32, 6, fmt, bias=True)
    generator = torch.Generator().manual_seed(4)
    half = 2 ** (fmt.scheme.bits - 1)
    buffers = dict(layer.named_buffers())
    buffers["weight"].copy_(torch.randint(-half, half, (6, 32), generator=generator))
    buffers["weight_scale"].copy_(torch.rand(buffers["weight_scale"].shape, generator=generator) * 0.02)
    buffers["bias"].copy_(torch.randn(6, generator=generator))
    if "weight_zero_point" in buffers:
        zeros = buffers["weight_zero_point"]
        zeros.copy_(torch.randint(-half, half, zeros.shape, generator=generator))
    if "input_scale" in buffers:
        buffers["input_scale"].fill_(0.03)
    if "input_zero_point" in buffers:
        buffers["input_zero_point"].fill_(-7)
    layer.prepare()
    return layer


@pytest.mark.parametrize("changes", [
    {}, {"sym": False}, {"group_size": 8}, {"bits": 4, "act_bits": 4}, {"act_sym": False}, {"act_group_size": 16},
    {"act_dynamic": False}, {"act_dynamic": False, "act_sym": False},
])  # fmt: skip
def test_numbers(changes: dict[str, object]) -> None:
    layer = build(**changes)
    specs = PLAIN_INT.specs(layer.format.scheme, 32, 6, torch.float32)
    assert {n: (tuple(b.shape), b.dtype) for n, b in layer.named_buffers() if n != "bias"} == specs
    codes, scale, zero = arrays(layer)
    assert codes.dtype == zero.dtype == torch.uint8
    size = 32 // scale.shape[1]
    weight = (codes.float() - zero.float().repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(2, 5, 32)
    assert layer.activation is not None
    assert torch.equal(layer(x), torch.nn.functional.linear(layer.activation(x), weight, layer.bias))
    static = changes.get("act_dynamic") is False
    scheme = layer.format.scheme.activations
    assert scheme is not None and scheme.dynamic is not static
    if static:
        zero_point = None if scheme.sym else -7
        assert torch.equal(layer.activation(x), ActivationQuantizer(scheme, torch.tensor(0.03), zero_point)(x))


def test_scales_keep_their_dtype() -> None:
    layer = build(act_dynamic=False)
    before = {leaf: layer.get_buffer(leaf).clone() for leaf in layer.leaves}
    layer.to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    for leaf, buffer in before.items():
        assert layer.get_buffer(leaf).dtype == buffer.dtype and torch.equal(layer.get_buffer(leaf), buffer)
    assert layer(torch.randn(1, 32).bfloat16()).dtype == torch.bfloat16


def test_a_broken_file() -> None:
    layer = build(act_dynamic=False)
    layer.get_buffer("input_scale").fill_(float("nan"))
    with pytest.raises(ModelError, match="up: input_scale holds NaN"):
        layer.prepare("up")


def test_configs() -> None:
    config = read_config(CONFIG | {"extra_config": {"a": {"act_dynamic": False}, "b": {"bits": 16}, "c": {"bits": 4}}})
    layers = {name: config.layer(name, True) for name in "abcd"}
    assert layers["b"] is None and layers["d"] == config.default
    a, c = layers["a"], layers["c"]
    assert a and (acts := a.scheme.activations) and not acts.dynamic and acts.bits == 8
    assert c and c.scheme.bits == 4 and c.scheme.activations == config.default.scheme.activations
    with pytest.raises(UnsupportedError, match="activations of data type 'mx_fq'"):
        read_config(CONFIG | {"act_data_type": "mx_fq"})
