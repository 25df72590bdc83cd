"""The packed linear layer by itself: numbers, dtypes, pieces, order of groups, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_weights import arrays, int_format, pack_codes

from auto_round.codecs.quantized_layer import IntCodes
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference import linear as compute
from auto_round.inference.config import LayerFormat
from auto_round.inference.linear import QuantLinear
from auto_round.layouts import integers


def build(
    out: int, width: int, fmt: LayerFormat, seed: int = 0, bias: bool = False, **kwargs: Any
) -> tuple[QuantLinear, torch.Tensor]:
    """A filled layer and its weight, float32 [out, in]."""
    gen = torch.Generator().manual_seed(seed)
    module = QuantLinear(width, out, fmt, bias=bias, **kwargs)
    codes = torch.randint(0, 1 << fmt.scheme.bits, (out, width), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << fmt.scheme.bits, (out, module.groups), generator=gen, dtype=torch.uint8)
    scale = torch.randn(out, module.groups, generator=gen).half() * 0.1
    pack = pack_codes(fmt, codes, zeros)
    assert module.qweight.shape == pack[0].shape and module.qzeros.shape == pack[1].shape
    module.qweight, module.qzeros, module.scales = *pack, scale.T.contiguous()
    if bias:
        assert module.bias is not None
        module.bias.copy_(torch.randn(out, generator=gen))
    assert isinstance(fmt.scheme.group_size, int)
    return module, IntCodes(codes, scale, zeros, fmt.scheme.group_size).dequantize()


@settings(max_examples=40, deadline=None)
@given(
    packing=st.sampled_from(["gptq", "gptq_zp+-1", "awq"]), bits=st.sampled_from([2, 3, 4, 8]),
    out=st.integers(1, 3), width=st.integers(1, 5), group=st.sampled_from([-1, 8, 24, 32, 64, 100, 1000]),
    chunk=st.sampled_from([1, 700, 1 << 22]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_weight_is_exact_in_pieces_of_any_size(
    packing: str, bits: int, out: int, width: int, group: int, chunk: int, seed: int
) -> None:
    fmt = int_format(4 if packing == "awq" else bits, group, False, packing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "CHUNK", chunk)
        module, weight = build(out * 32, width * 32, fmt, seed)
        assert torch.equal(module.dequantize(), weight)
        assert torch.equal(module.weight, weight)
        assert torch.equal(module.dequantize(torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize(("out", "width", "fmt"), [
    (8, 24, int_format(4, 8, True, "gptq_zp+-1")),
    (16, 48, int_format(2, -1, True, "gptq")),
    (4, 12, int_format(8, 5, True, "gptq_zp+-1")),
    (8, 7, int_format(4, 3, False, "awq")),
])  # fmt: skip
def test_sizes_that_are_no_multiple_of_32(out: int, width: int, fmt: LayerFormat) -> None:
    module, weight = build(out, width, fmt)
    x = torch.randn(3, width)
    assert torch.allclose(module(x), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_any_input(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, weight = build(32, 64, int_format(4, 32, True, "gptq_zp+-1"), bias=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = module(x)
    assert module.bias is not None
    exact = x.double() @ weight.double().T + module.bias.double()
    assert y.dtype == dtype and y.shape == (*shape[:-1], 32)
    assert (y.double() - exact).norm() / exact.norm() < {torch.float32: 1e-6}.get(dtype, 8e-3)


def test_half_precision_without_units_for_it_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    module, weight = build(32, 64, int_format(4, 32, True, "gptq_zp+-1"))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    monkeypatch.setattr(compute, "cpu_multiplies", lambda dtype: False)
    assert torch.equal(module(x), (x.float() @ weight.T).bfloat16())
    monkeypatch.setattr(compute, "cpu_multiplies", lambda dtype: True)
    assert torch.equal(module(x), x @ weight.bfloat16().T)


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_in_another_order(bits: int) -> None:
    """GPTQ's act-order: input column i belongs to group g_idx[i]."""
    module, _ = build(32, 96, int_format(bits, 32, False, "gptq_zp+-1"), g_idx=True)
    assert module.g_idx is not None
    module.prepare()
    plain = module.dequantize()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    module.g_idx = module.default_g_idx()[order]
    module.prepare()
    codes, scale, zero = arrays(module)
    where = module.g_idx.long()
    expected = scale.float()[:, where] * (codes.float() - zero.float()[:, where])
    assert torch.equal(module.dequantize(), expected) and not torch.equal(expected, plain)
    module.g_idx = module.g_idx + 3
    with pytest.raises(ModelError, match="layer.x: g_idx points outside"):
        module.prepare("layer.x")


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_casting_keeps_the_scales(cast: Any) -> None:
    module, weight = build(32, 64, int_format(4, 32, True, "gptq_zp+-1"), bias=True)
    scales = module.scales.clone()
    assert cast(module) is module
    assert module.scales.dtype == torch.float16 and torch.equal(module.scales, scales)
    assert torch.equal(module.dequantize(), weight)
    assert module.bias is not None and module.bias.dtype == module.weight.dtype == module.dtype
    assert module.qweight.dtype == torch.int32


def test_moving_off_meta_keeps_dtypes() -> None:
    module = QuantLinear(64, 32, int_format(4, 32, True, "gptq_zp+-1"), bias=True, device="meta", dtype=torch.bfloat16)
    assert module(torch.ones(2, 64, device="meta")).shape == (2, 32)
    module.to_empty(device="cpu")
    assert (module.scales.dtype, module.bias.dtype, module.dtype) == (torch.float16, torch.bfloat16, torch.bfloat16)  # type: ignore[union-attr]


def test_shapes_that_do_not_fill_words_are_refused() -> None:
    for out, width, fmt in [
        (32, 48, int_format(3, 32, True, "gptq_zp+-1")),
        (12, 64, int_format(4, 32, True, "gptq_zp+-1")),
        (12, 64, int_format(4, 32, True, "awq")),
        (32, 64, int_format(8, 32, True, "awq")),
    ]:
        with pytest.raises(UnsupportedError, match=f"{out} x {width}"):
            QuantLinear(width, out, fmt)


def test_description_and_state_names() -> None:
    module = QuantLinear(64, 32, int_format(4, 32, True, "gptq_zp+-1"), bias=True, g_idx=True)
    assert set(module.state_dict()) == {"qweight", "qzeros", "scales", "bias", "g_idx"}
    assert "bits=4, group_size=32, sym=True, packing=gptq_zp+-1" in repr(module)


def test_gradients_reach_the_input() -> None:
    module, weight = build(32, 64, int_format(4, 32, True, "gptq_zp+-1"))
    x = torch.randn(2, 64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).expand(2, -1), atol=1e-5)
