"""Fake quantization of small floats: equal to its codes bit for bit, gradients, names, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, encode, spec_for_bits
from auto_round.codecs.minifloat import MINIFLOATS, as_blocks, dequantize_minifloat, from_blocks
from auto_round.data_type import QUANT_FUNC_WITH_DTYPE, get_quant_func
from auto_round.errors import UnsupportedError
from auto_round.schemes import PRESET_SCHEMES

# data type, bits, usual group size
TYPES: list[tuple[str, int, Any]] = [
    ("mx_fp", 4, 32), ("mx_fp", 8, 32), ("mx_fp8e5m2", 8, 32), ("mx_fp_rceil", 4, 32), ("mx_fp_rceil", 8, 32),
    ("mx_int", 4, 32), ("nv_fp", 4, 16), ("fp", 8, 0), ("fp", 8, -1), ("fp", 8, 128), ("fp", 8, (128, 128)),
    ("fp8_e5m2", 8, -1),
]  # fmt: skip
SOME_TYPES = st.sampled_from(TYPES)
GROUPS = st.sampled_from([0, -1, 1, 3, 16, 32, (2, 3), (16, 16)])


@given(
    SOME_TYPES, GROUPS, st.integers(1, 40), st.integers(1, 70), st.integers(-60, 60), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=200)
def test_the_function_gives_its_codes_dequantized(
    kind: tuple[str, int, Any], size: Any, rows: int, columns: int, power: int, seed: int, dtype: torch.dtype
) -> None:
    name, bits, _ = kind
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(rows, columns, generator=generator) * 2.0 ** (power if dtype != torch.float16 else power / 8)
    ).to(dtype)
    weight[::3, ::2] = 0
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    found = encode(weight, family, size)
    codes, scale, given_scale = found.codes, found.scale, found.global_scale
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape and scale.dtype == torch.float32
    values = dequantize_minifloat(codes, family.element, scale, size, given_scale)
    qdq, reported, _ = get_quant_func(name, bits)(weight, bits=bits, group_size=size)
    assert qdq.dtype == dtype and qdq.shape == weight.shape and bool(qdq.isfinite().all())
    assert torch.equal(qdq, values.to(dtype)) and torch.equal(reported, scale)
    assert not bool(qdq[weight == 0].any())


@pytest.mark.parametrize(("element", "md"), [
    ("e2m1", ml_dtypes.float4_e2m1fn), ("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2),
])  # fmt: skip
def test_microscaling_against_numpy(element: str, md: Any) -> None:
    """OCP MX v1.0, 6.3, written anew with ml_dtypes' own e8m0 and elements."""
    weight = np.random.default_rng(5).standard_normal((64, 96)).astype(np.float32) * 0.02
    groups = weight.reshape(64, 3, 32)
    emax = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[element]
    mantissa_exponent = np.frexp(np.abs(groups).max(-1))[1] - 1  # exact floor(log2)
    scale = np.ldexp(np.float32(1), mantissa_exponent - emax).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    top = float(ml_dtypes.finfo(md).max)
    values = np.clip(groups / scale[..., None], -top, top).astype(md)
    name, bits = {"e2m1": ("mx_fp", 4), "e4m3": ("mx_fp", 8), "e5m2": ("mx_fp8e5m2", 8)}[element]
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    found = encode(torch.from_numpy(weight), family, 32)
    assert np.array_equal(found.scale.numpy(), scale)
    assert np.array_equal(found.codes.numpy(), values.view(np.uint8).reshape(64, 96))


def test_nvfp4_against_numpy() -> None:
    weight = np.random.default_rng(6).standard_normal((32, 64)).astype(np.float32) * 0.05
    groups = weight.reshape(32, 4, 16)
    g = np.float32(2688.0) / np.abs(weight).max()
    scale = (np.abs(groups).max(-1) * np.float32(1 / 6) * g).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    factor = scale / g
    values = np.clip(groups / factor[..., None], -6, 6).astype(ml_dtypes.float4_e2m1fn)
    family = spec_for_bits(BLOCK_FLOAT_SPECS["nv_fp"], "nv_fp", 4)
    assert family is not None
    found = encode(torch.from_numpy(weight), family, 16)
    assert found.global_scale is not None and float(found.global_scale) == g
    assert np.array_equal(found.scale.numpy(), scale)
    assert np.array_equal(found.codes.numpy(), values.view(np.uint8).reshape(32, 64))
    qdq, _, _ = get_quant_func("nv_fp", 4)(torch.from_numpy(weight))
    assert np.array_equal(qdq.numpy(), (values.astype(np.float32) * factor[..., None]).reshape(32, 64))


def test_a_group_worked_by_hand() -> None:
    """Largest 5.2: exponent 2, so scale 1 by the floor rule (6 is not passed); and 7.5: cut by one rule alone."""
    row = torch.zeros(1, 32)
    row[0, :8] = torch.tensor([5.2, -0.3, 0.25, 0.76, -1.7, 2.6, -3.4, 0.2])
    assert get_quant_func("mx_fp", 4)(row, bits=4)[0][0, :8].tolist() == [6.0, -0.5, 0.0, 1.0, -1.5, 3.0, -3.0, 0.0]
    row[0, 0] = 7.5
    assert float(get_quant_func("mx_fp", 4)(row, bits=4)[0][0, 0]) == 6.0
    up = get_quant_func("mx_fp_rceil", 4)(row, bits=4)[0][0, :8].tolist()
    assert up == [8.0, -0.0, 0.0, 1.0, -2.0, 3.0, -3.0, 0.0]  # steps of 1 below 4 now; -0.3 and 0.25 are below half
    by_quarters = torch.tensor([[1.75, -1.1, 0.12, 0.13, 0.875, -0.4]])
    assert get_quant_func("mx_int", 4)(by_quarters, group_size=32)[0].tolist() == [[1.75, -1.0, 0.0, 0.25, 1.0, -0.5]]


@pytest.mark.parametrize(("name", "bits", "size"), TYPES)
def test_given_scales_and_offsets_decide_the_codes(name: str, bits: int, size: Any) -> None:
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(2))
    start = encode(weight, family, size)
    again = encode(weight, family, size, scale=start.scale, global_scale=start.global_scale)
    assert torch.equal(again.codes, start.codes)
    tiles = as_blocks(weight, size)
    moved = encode(
        weight, family, size, scale=start.scale, global_scale=start.global_scale, v=torch.full_like(tiles, 0.999)
    )
    decode = lambda found: found.codes.int() & (2 ** (bits - 1) - 1)
    # almost a whole step up: nothing goes down by value; a step down in size crosses at most two of the finer ones
    up = dequantize_minifloat(moved.codes, family.element, start.scale, size, start.global_scale)
    flat = dequantize_minifloat(start.codes, family.element, start.scale, size, start.global_scale)
    assert bool((up >= flat).all()) and bool((up > flat).float().mean() > 0.85)
    assert int((decode(moved) - decode(start)).abs().max()) <= 2


@pytest.mark.parametrize(("name", "bits", "size"), TYPES)
def test_gradients(name: str, bits: int, size: Any) -> None:
    """Against the straight-through formula, written down with autograd: W = f (q + (r - q).detach()...)."""
    torch.manual_seed(3)
    weight = torch.randn(24, 40)
    tiles = as_blocks(weight, size)
    count = tiles.shape[0] * tiles.shape[2]
    v = (torch.randn_like(weight) * 0.01).requires_grad_()
    low = torch.full((count, 1), 0.9, requires_grad=True)
    high = torch.full((count, 1), 0.8, requires_grad=True)
    seen = weight.clone().requires_grad_()
    out = torch.randn(24, 40)
    qdq, scale, _ = get_quant_func(name, bits)(seen, bits=bits, group_size=size, v=v, min_scale=low, max_scale=high)
    (qdq * out).sum().backward()
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None
    element = family.element
    given_scale = family.global_scale(weight, None)
    factor = scale.view(tiles.shape[0], 1, tiles.shape[2], 1)
    factor = factor if given_scale is None else factor / given_scale
    ratio = as_blocks(weight + v.detach(), size) / factor
    inside = (ratio.abs() < element.saturation).float()
    grad = as_blocks(out, size)
    wanted = from_blocks(grad * inside, (24, 40))
    assert torch.equal(v.grad, wanted) and torch.equal(seen.grad, wanted)
    slope = ((element.nearest(ratio) - ratio * inside) * grad).sum((1, 3), keepdim=True)
    top, bottom = (
        tiles.amax((1, 3), keepdim=True).clamp(min=0) * 0.8,
        -tiles.amin((1, 3), keepdim=True).clamp(max=0) * 0.9,
    )
    of_high, of_low = slope * factor / 0.8 * (top > bottom), slope * factor / 0.9 * (top <= bottom)
    torch.testing.assert_close(high.grad, of_high.view(-1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low.grad, of_low.view(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "bits", "size"), TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(name: str, bits: int, size: Any, bad: float) -> None:
    weight = torch.randn(130, 140)
    weight[5, 7] = bad
    qdq, scale, _ = get_quant_func(name, bits)(weight, bits=bits, group_size=size)
    assert bool(qdq[5, 7].isnan()) and bool(scale.isnan().any())
    if name != "nv_fp" and size != 0 and not isinstance(size, tuple):
        assert bool(qdq[6:].isfinite().all())


def test_every_name_is_found() -> None:
    """Those of the presets, of the guides, and of checkpoints made elsewhere."""
    names = """mx_fp:4 mx_fp:8 mxfp:4 mxfp:8 mx_fp4:4 mx_fp8:8 mxfp4:4 mxfp8:8 mx_fp4e2m1:4 mx_fp8e4m3:8 mx_fp8e5m2:8
    mx_fp_rceil:4 mx_fp_rceil:8 mxfp_rceil:8 mx_fp4_rceil:4 mx_fp8_rceil:8 mx_fp8e5m2_rceil:8 mx_int:4 mxint:4 mx_int4:4
    nv_fp:4 nvfp:4 nv_fp4:4 nvfp4:4 nv_fp4_with_static_gs:4 fp:8 fp8:8 fp8_sym:8 fp8_e4m3:8 fp8_e4m3fn:8 fp8_e5m2:8
    fp8_dynamic:8 fp8_block:8 w4fp8:4 fp8_to_int:4""".split()
    weight = torch.randn(4, 64)
    for text in names:
        name, bits = text.split(":")
        qdq, _, _ = get_quant_func(name, int(bits))(weight, bits=int(bits), group_size=32, data_type=name)
        assert 0 < float((qdq - weight).norm() / weight.norm()) < 0.2, text
    for scheme in PRESET_SCHEMES.values():
        if scheme.super_bits is None and scheme.data_type != "int_asym_float_zp" and scheme.bits < 16:
            get_quant_func(scheme.data_type, scheme.bits, scheme.sym)
    assert set(BLOCK_FLOAT_SPECS) <= set(QUANT_FUNC_WITH_DTYPE)


def test_widths_that_are_not_there() -> None:
    for name, bits in (("mx_fp", 6), ("fp", 4), ("nv_fp", 8), ("mx_int", 8)):
        with pytest.raises(UnsupportedError, match=f"'{name}' with {bits} bits is not available.*available bits: "):
            spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
        with pytest.raises(UnsupportedError, match="is not available"):
            get_quant_func(name, bits)(torch.randn(2, 32), bits=bits)


def test_eight_bits_are_finer_than_four() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(4)) * 0.02
    error = {
        (name, bits): float((get_quant_func(name, bits)(weight, bits=bits, group_size=size)[0] - weight).norm())
        for name, bits, size in (("mx_fp", 4, 32), ("mx_fp", 8, 32), ("nv_fp", 4, 16), ("fp", 8, -1), ("mx_int", 4, 32))
    }
    assert error["mx_fp", 8] < error["nv_fp", 4] / 2 < error["mx_fp", 4] / 2 and error["fp", 8] < error["mx_int", 4] / 2
    assert MINIFLOATS["e2m1"].maximum == 6
