"""Inputs in small floats: where scales are shared, fixed scales, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.codecs.activation import ActivationQuantizer, activation_function, static_quantizer
from auto_round.codecs.block_float import global_scale_of
from auto_round.codecs.minifloat import MINIFLOATS
from auto_round.errors import UnsupportedError
from auto_round.schemes import PRESET_SCHEMES, ActivationScheme

MX4 = ActivationScheme(4, 32, True, "mx_fp", True)


def inputs(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed)) * 2
    x[0, 1] = 0
    x[2, 3, 7] = 50
    return x.to(dtype)


def test_microscaling_inputs_in_groups_of_32() -> None:
    x = inputs()
    found = ActivationQuantizer(MX4)(x)
    for row, got in zip(x.view(-1, 32), found.view(-1, 32), strict=True):
        top = float(row.abs().max())
        scale = 2.0 ** (torch.tensor(top).frexp()[1].item() - 1 - 2) if top else 1.0
        assert torch.equal(got, MINIFLOATS["e2m1"].nearest(row / scale) * scale)
    up = ActivationQuantizer(ActivationScheme(8, 32, True, "mx_fp_rceil", True))(x)
    assert float((up - x).abs().max()) <= 50 * 2.0**-4 and not bool(up[0, 1].any())


@pytest.mark.parametrize(("size", "shape"), [(-1, (15, 64)), (32, (30, 32)), (0, (1, 960))])
def test_fp8_scales_of_tokens_groups_and_whole_inputs(size: int, shape: tuple[int, int]) -> None:
    x = inputs()
    found = ActivationQuantizer(ActivationScheme(8, size, True, "fp", True))(x).view(shape)
    rows = x.view(shape)
    scale = (rows.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-100)  # not rounded: it is stored nowhere
    assert torch.equal(found, MINIFLOATS["e4m3"].nearest(rows / scale) * scale)


def test_nvfp4_inputs_under_a_fixed_global_scale() -> None:
    scheme = PRESET_SCHEMES["NVFP4"].activations
    assert scheme is not None and scheme.has_global_scale and scheme.calibrated and scheme.dynamic
    x = inputs()
    g = global_scale_of(torch.tensor(60.0))
    assert float(g) == pytest.approx(448 * 6 / 60)
    found = ActivationQuantizer(scheme, global_scale=g)(x).view(-1, 16)
    groups = x.view(-1, 16)
    scale = MINIFLOATS["e4m3"].nearest(groups.abs().amax(-1, keepdim=True) * (1 / 6) * g).clamp(min=2.0**-9)
    assert torch.equal(found, MINIFLOATS["e2m1"].nearest(groups / (scale / g)) * (scale / g))
    beyond = x * 10  # block scales end at 448: what lies beyond the calibrated largest is cut
    assert float(ActivationQuantizer(scheme, global_scale=g)(beyond).abs().max()) == pytest.approx(60.0)
    own = ActivationQuantizer(ActivationScheme(4, 16, True, "nv_fp", True))(beyond)
    assert float(own.abs().max()) == pytest.approx(500.0)


def test_static_fp8() -> None:
    scheme = PRESET_SCHEMES["FP8_STATIC"].activations
    assert scheme is not None and not scheme.dynamic and scheme.calibrated
    quantizer = static_quantizer(scheme, torch.tensor(-3.0), torch.tensor(2.0), torch.bfloat16)
    assert quantizer.scale is not None and quantizer.zero_point is None
    assert torch.equal(quantizer.scale, torch.tensor(3 / 448).bfloat16().float())
    x = inputs()
    found = quantizer(x)
    assert torch.equal(found, MINIFLOATS["e4m3"].nearest(x / quantizer.scale) * quantizer.scale)
    assert float(found.max()) == 448 * float(quantizer.scale)  # 50 is cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FP8_BLOCK"])
def test_dtypes_and_gradients(preset: str, dtype: torch.dtype) -> None:
    scheme = PRESET_SCHEMES[preset].activations
    assert scheme is not None
    g = global_scale_of(torch.tensor(50.0)) if scheme.has_global_scale else None
    x = inputs(dtype=dtype).requires_grad_()
    y = ActivationQuantizer(scheme, global_scale=g)(x)
    assert y.dtype == dtype and y.shape == x.shape and not bool(y[0, 1].any())
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None and float((x.grad == 2).float().mean()) > 0.9
    assert bool(((x.grad == 2) | (x.grad == 0)).all())
    assert ActivationQuantizer(scheme, global_scale=g)(x.detach()[:0]).shape == (0, 5, 64)


@pytest.mark.parametrize(("options", "message"), [
    (("mx_fp", 4, 32), "no static activations"), (("nv_fp4_with_static_gs", 4, 16), "no static activations"),
])  # fmt: skip
def test_no_static_microscaling(options: tuple[Any, ...], message: str) -> None:
    name, bits, size = options
    with pytest.raises(UnsupportedError, match=message):
        activation_function(ActivationScheme(bits, size, True, name, False))
