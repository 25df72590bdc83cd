"""Integer activations: values against formulas worked by hand, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.codecs.activation import ActivationQuantizer, activation_function, quantized_inputs, static_quantizer
from auto_round.codecs.registry import QUANT_FUNC_WITH_DTYPE, register_dtype
from auto_round.errors import UnsupportedError
from auto_round.schemes import ActivationScheme, QuantizationScheme


def by_hand(row: list[float], bits: int, sym: bool) -> list[float]:
    """One scale for the row, in plain Python floats."""
    low, high = min(0.0, *row), max(0.0, *row)
    bottom, steps = -(2 ** (bits - 1)), 2**bits - 1
    scale = max(-low, high) / (steps / 2) if sym else (high - low) / steps
    if scale == 0:
        return [0.0] * len(row)
    zero = 0 if sym else round(min(max(bottom - low / scale, bottom), bottom + steps))
    codes = [round(min(max(x / scale + zero, bottom), bottom + steps)) for x in row]
    return [(code - zero) * scale for code in codes]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_for_each_token(bits: int, sym: bool) -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3
    found = ActivationQuantizer(ActivationScheme(bits, -1, sym, "int", True))(x)
    wanted = torch.tensor([by_hand(row.tolist(), bits, sym) for row in x.view(-1, 16)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted.view_as(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("group_size", "shape"), [(4, (-1, 4)), (0, (1, -1)), (-1, (-1, 16))])
def test_where_scales_are_shared(group_size: int, shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = ActivationQuantizer(ActivationScheme(8, group_size, True, "int", True))(x)
    wanted = torch.tensor([by_hand(row.tolist(), 8, True) for row in x.reshape(shape)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted.view_as(x), rtol=1e-12, atol=1e-12)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(2, 8), st.booleans(),
    st.integers(0, 2**31), st.floats(1e-3, 1e3),
)  # fmt: skip
def test_nothing_moves_far_and_dtypes_stay(dtype: torch.dtype, bits: int, sym: bool, seed: int, size: float) -> None:
    x = (torch.randn(4, 24, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    x[1] = 0
    found = ActivationQuantizer(ActivationScheme(bits, -1, sym, "int", True))(x)
    assert found.dtype == dtype and bool(torch.isfinite(found).all()) and not bool(found[1].any())
    step = (x.float().abs().amax(-1, keepdim=True) * 2) / (2**bits - 1)
    assert bool(((found.float() - x.float()).abs() <= step * 1.01 + x.float().abs() * 0.02).all())


def test_gradients_pass_straight_through_inside_the_range() -> None:
    quantizer = ActivationQuantizer(ActivationScheme(8, 0, True, "int", False), torch.tensor(0.01))
    x = torch.tensor([[0.5, -0.3, 5.0, -4.0, 1.27]], requires_grad=True)
    y = quantizer(x)
    assert torch.equal(y.detach(), quantizer(x.detach()))
    y.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 0.0, 0.0, 5.0]]
    dynamic = torch.randn(2, 8, requires_grad=True)
    ActivationQuantizer(ActivationScheme(8, -1, False, "int", True))(dynamic).sum().backward()
    assert dynamic.grad is not None and bool((dynamic.grad == 1).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_static_scales_are_values_that_the_file_can_hold(stored: torch.dtype, sym: bool) -> None:
    scheme = ActivationScheme(8, -1, sym, "int", False)
    quantizer = static_quantizer(scheme, torch.tensor(-1.7), torch.tensor(2.9), stored)
    assert quantizer.scale is not None and torch.equal(quantizer.scale, quantizer.scale.to(stored).float())
    expected = 2.9 / 127.5 if sym else 4.6 / 255
    assert float(quantizer.scale) == pytest.approx(expected, rel=1e-2)
    assert quantizer.zero_point == (None if sym else round(-128 + 1.7 / (4.6 / 255)))
    x = torch.tensor([[-1.7, 0.0, 2.9, 100.0]])
    y = quantizer(x)
    assert y[0, 1] == 0 and y[0, 2] == y[0, 3]  # one scale, whatever the input
    torch.testing.assert_close(y[0, :3], x[0, :3], rtol=2e-2, atol=float(quantizer.scale))


def test_a_layer_that_is_fed_nothing_but_zeros() -> None:
    quantizer = static_quantizer(ActivationScheme(8, 0, True, "int", False), *torch.zeros(2), stored=torch.float16)
    assert quantizer.scale is not None and float(quantizer.scale) > 0
    assert not bool(quantizer(torch.zeros(2, 3)).any())


def test_the_hook_and_its_removal() -> None:
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(3, 8)
    plain = linear(x)
    quantizer = ActivationQuantizer(ActivationScheme(3, -1, True, "int", True))
    with quantized_inputs({linear: quantizer}):
        assert torch.equal(linear(x), linear.forward(quantizer(x)))
    assert torch.equal(linear(x), plain)
    assert quantizer(torch.zeros(0, 8)).shape == (0, 8)


def test_a_data_type_of_ones_own() -> None:
    @register_dtype("halves")
    def halves(tensor: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None, None]:
        return (tensor * 2).round() / 2, None, None

    try:
        scheme = ActivationScheme(4, -1, True, "halves", True)
        assert ActivationQuantizer(scheme)(torch.tensor([[0.3, 1.2]])).tolist() == [[0.5, 1.0]]
        with pytest.raises(UnsupportedError, match="no static activations: its function takes no 'scale'"):
            activation_function(ActivationScheme(4, -1, True, "halves", False))
    finally:
        del QUANT_FUNC_WITH_DTYPE["halves"]
    with pytest.raises(UnsupportedError, match="activations of data type 'halves'"):
        activation_function(scheme)


def test_defaults_come_from_the_weights() -> None:
    scheme = QuantizationScheme(bits=8, group_size=64, sym=False, act_bits=8)
    assert scheme.activations == ActivationScheme(8, 64, False, "int", True)
    assert QuantizationScheme().activations is None and QuantizationScheme(act_bits=16).activations is None
    assert "int8 static activations" in QuantizationScheme(act_bits=8, act_dynamic=False).describe()
