"""Every data type gives finite scales and weights, whatever a group of weights holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.ggml.pack import pack_blocks, unpack_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, ggml_type_of
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.registry import ACTIVATION_PREFIX, QUANT_FUNC_WITH_DTYPE
from auto_round.data_type import get_quant_func
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

COLUMNS = 256
HALF, BRAIN = torch.finfo(torch.float16), torch.finfo(torch.bfloat16)
SCHEMES: dict[str, QuantizationScheme] = {
    **{f"int{bits} {'sym' if sym else 'asym'} g{size}": QuantizationScheme(bits, size, sym, "int")
       for bits in (2, 3, 4, 5, 8) for sym in (True, False) for size in (32, -1)},
    "int4 per tensor": QuantizationScheme(4, 0, True, "int"),
    **{name: scheme for name, scheme in PRESET_SCHEMES.items() if scheme.quantizes_weights},
}  # fmt: skip

Row = torch.Tensor
special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 6e-8, 1e-38, 1e-20, 65504.0, -65504.0, 7e4, 1e10, -1e20, float(BRAIN.max),
     float(BRAIN.min), float(HALF.tiny), 3.4e38, -3.4e38]
)  # fmt: skip


def rows() -> dict[str, Row]:
    """A row of groups of each kind."""
    made = {
        "zeros": torch.zeros(COLUMNS), "minus zeros": torch.full((COLUMNS,), -0.0),
        "constant": torch.full((COLUMNS,), 0.37), "negative constant": torch.full((COLUMNS,), -2.5),
        "denormals of float16": torch.linspace(-6e-8, 6e-8, COLUMNS), "denormals": torch.full((COLUMNS,), 1e-42),
        "float16 maximum": torch.full((COLUMNS,), float(HALF.max)), "bfloat16 maximum": torch.full((COLUMNS,), 3.38e38),
        "both ends": torch.tensor([3.38e38, -3.38e38]).repeat(COLUMNS // 2),
        "usual": torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1)),
    }  # fmt: skip
    huge = torch.zeros(COLUMNS)
    huge[5] = 1e30
    return made | {"one huge": huge, "one huge among usual": made["usual"] + huge, "one negative huge": -huge}


def task_of(weight: torch.Tensor, scheme: QuantizationScheme, importance: torch.Tensor | None) -> LayerTask:
    return LayerTask("layer", torch.nn.Identity(), weight, scheme, importance)


def check(weight: torch.Tensor, scheme: QuantizationScheme, importance: torch.Tensor | None = None) -> None:
    for optimized in (False, True):
        for dtype in (torch.float16, torch.float32):
            if dtype != torch.float16 and codec_of(scheme).family != "int":
                continue
            task = task_of(weight, scheme, importance)
            layer = quantize_layer(task, optimized, dtype)
            assert layer.codes.is_finite()
            if isinstance(layer.codes, GgmlBlocks):
                read = unpack_blocks(pack_blocks(layer.codes), layer.codes.kind, weight.shape[1])
                assert torch.equal(read.dequantize(), layer.codes.dequantize())
            assert bool(torch.isfinite(layer.dequantize()).all())
            assert layer.codes.clamped_scales(weight) >= 0


@pytest.mark.parametrize("name", SCHEMES)
def test_groups_of_every_kind(name: str) -> None:
    weight = torch.stack(list(rows().values()))
    check(weight, SCHEMES[name])
    for row in weight:
        check(row.unsqueeze(0).repeat(2, 1), SCHEMES[name], torch.zeros(COLUMNS))
    check(weight.clamp(-65504, 65504).half(), SCHEMES[name])
    check(weight.bfloat16(), SCHEMES[name])


@settings(max_examples=60)
@given(
    values=st.lists(special, min_size=1, max_size=40), name=st.sampled_from(sorted(SCHEMES)),
    importance=st.sampled_from([None, 0.0, 1e30, 1e-30]),
)  # fmt: skip
def test_any_mixture(values: list[float], name: str, importance: float | None) -> None:
    weight = torch.tensor((values * 2 * COLUMNS)[: 2 * COLUMNS], dtype=torch.float32).view(2, COLUMNS)
    check(weight, SCHEMES[name], None if importance is None else torch.full((COLUMNS,), importance))


def test_nothing_that_is_registered_is_left_out() -> None:
    """Every registered function is reached by one of the schemes, or gives finite values by itself."""
    tried = {id(get_quant_func(s.data_type, s.bits, s.sym)) for s in SCHEMES.values() if ggml_type_of(s) is None}
    weight = torch.stack(list(rows().values())).clamp(-1e30, 1e30)
    for key, function in QUANT_FUNC_WITH_DTYPE.items():
        if key.startswith(ACTIVATION_PREFIX) or id(function) in tried or function.__module__.startswith("test"):
            continue
        for bits in (4, 8):
            try:
                qdq, scale, _ = function(weight, bits=bits, group_size=32, scale_dtype=torch.float16)
            except (UnsupportedError, ConfigError):  # the type has another number of bits
                continue
            assert bool(torch.isfinite(qdq).all()), key
            assert not isinstance(scale, torch.Tensor) or bool(torch.isfinite(scale.float()).all()), key
    kinds = {ggml_type_of(scheme).name for scheme in SCHEMES.values() if ggml_type_of(scheme) is not None}  # type: ignore[union-attr]
    assert kinds <= set(GGML_TYPES)
    assert any(codec_of(scheme).element is not None for scheme in SCHEMES.values())


@pytest.mark.parametrize("kind", list(GGML_TYPES))
def test_every_ggml_type(kind: str) -> None:
    for weight in (torch.stack(list(rows().values())), torch.zeros(3, COLUMNS)):
        task = LayerTask("layer", torch.nn.Identity(), weight, QuantizationScheme(4, 32, True, "int"), ggml=kind)
        for optimized in (False, True):
            layer = quantize_layer(task, optimized, torch.float16)
            assert layer.codes.is_finite() and bool(torch.isfinite(layer.dequantize()).all())
