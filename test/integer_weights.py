"""Random packed integer weights for tests of kernels, and what a product with them must be."""

from __future__ import annotations

import torch

from auto_round.codecs.quantized_layer import IntCodes
from auto_round.inference.config import PACKINGS, LayerFormat
from auto_round.inference.kernels import IntegerWeight, LayerSpec
from auto_round.inference.linear import PackedLinear
from auto_round.layouts.integers import GptqLayout
from auto_round.schemes import QuantizationScheme


def int_format(bits: int, group_size: int = 128, sym: bool = True, packing: str = "gptq_zp+-1") -> LayerFormat:
    """How integer layers of the packing that the table of backends calls so are stored."""
    found = next(entry for entry in PACKINGS.values() if entry.name == packing)
    return LayerFormat.of(QuantizationScheme(bits, group_size, sym), found)


def pack_codes(fmt: LayerFormat, codes: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`qweight` and `qzeros` of codes uint8 [out, in] and zero points uint8 [out, groups]."""
    assert isinstance(fmt.layout, GptqLayout)
    return fmt.layout.words(codes, zeros, fmt.scheme.bits)


def arrays(module: PackedLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [out, in], scales and zero points [out, groups] of an integer layer."""
    own = module.layer().codes_as(IntCodes)
    zeros = torch.as_tensor(own.zero_point, dtype=torch.uint8, device=own.codes.device)
    return own.codes, own.scale, zeros.expand(own.scale.shape)


def random_weight(
    bits: int, out: int, inputs: int, group_size: int, sym: bool, dtype: torch.dtype = torch.float32, seed: int = 0,
    scale_dtype: torch.dtype = torch.float16, scales: tuple[float, float] = (0.1, 1.0), device: str = "cpu",
) -> IntegerWeight:  # fmt: skip
    """Any codes and, unless `sym`, zero points.

    Args:
        group_size: -1, or one above `inputs`, is one group a row; the last group may be short.
        dtype: of the model.
        scales: the smallest, and how far they go beyond it.
        device: where the tensors are in the end; their values are the same everywhere.
    """
    gen = torch.Generator().manual_seed(seed)
    size = group_size if 0 < group_size < inputs else inputs
    shape = (out, -(-inputs // size))
    codes = torch.randint(0, 1 << bits, (out, inputs), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, shape, generator=gen, dtype=torch.uint8)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    steps = (torch.rand(shape, generator=gen) * scales[1] + scales[0]).to(scale_dtype)
    spec = LayerSpec(bits, size, sym, inputs, out, dtype, device)
    return IntegerWeight(codes.to(device), steps.to(device), zeros.to(device), spec)


def dense(given: IntegerWeight) -> torch.Tensor:
    """What it stands for, float64 [out, in]."""
    owner = torch.arange(given.spec.in_features, device=given.codes.device) // given.spec.group_size
    return given.scales.double()[:, owner] * (given.codes.double() - given.zeros.double()[:, owner])


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the norm of what is exact."""
    return float((got.double() - exact).norm() / exact.norm())
