"""ggml block types as data (ggml-common.h), the contents of their blocks, and rounding to codes on given steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from auto_round.codecs.quantized_layer import Codes, QuantizedLayer
from auto_round.codecs.registry import FP16_MAX
from auto_round.schemes import QuantizationScheme


@dataclass(frozen=True)
class GgmlType:
    """One block type.

    Attributes:
        name: as ggml calls it, `Q4_K`.
        bits: of a code.
        block: weights in a block, which has one d (and one dmin).
        group: weights that share a step: the block, or a sub-block with integers for its scale (and minimum).
        zero: the code whose weight is zero before the minimum is added.
        scale_bits: of those integers, 0 where a block has no sub-blocks.
        signed_scales: the integers may be negative.
        has_min: every group has a minimum too.
        min_sign: factor on the stored minimum when it is added: -1 in the K types.
        nbytes: bytes of a block.
    """

    name: str
    bits: int
    block: int
    group: int
    zero: int
    scale_bits: int
    signed_scales: bool
    has_min: bool
    min_sign: int
    nbytes: int

    @property
    def codes(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def is_k(self) -> bool:
        """Whether it is a K type: blocks of 256 weights with double-quantized scales."""
        return self.block == 256

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights, which must fill blocks."""
        assert columns % self.block == 0
        return columns // self.block * self.nbytes


_TYPE_ROWS = (
    # name   bits block group zero scale_bits signed min  sign bytes
    ("Q4_0", 4, 32, 32, 8, 0, False, False, 0, 18),
    ("Q4_1", 4, 32, 32, 0, 0, False, True, 1, 20),
    ("Q5_0", 5, 32, 32, 16, 0, False, False, 0, 22),
    ("Q5_1", 5, 32, 32, 0, 0, False, True, 1, 24),
    ("Q8_0", 8, 32, 32, 128, 0, False, False, 0, 34),
    ("Q2_K", 2, 256, 16, 0, 4, False, True, -1, 84),
    ("Q3_K", 3, 256, 16, 4, 6, True, False, 0, 110),
    ("Q4_K", 4, 256, 32, 0, 6, False, True, -1, 144),
    ("Q5_K", 5, 256, 32, 0, 6, False, True, -1, 176),
    ("Q6_K", 6, 256, 16, 32, 8, True, False, 0, 210),
)

GGML_TYPES: Mapping[str, GgmlType] = MappingProxyType({row[0]: GgmlType(*row) for row in _TYPE_ROWS})


def ggml_scheme(name: str) -> QuantizationScheme:
    """The scheme of one tensor of type `name`, such as `Q4_K`."""
    kind = GGML_TYPES[name]
    if kind.is_k:
        dtype, size = ("int_asym_dq" if kind.has_min else "int_sym_dq"), kind.block // kind.group
        return QuantizationScheme(
            kind.bits,
            kind.group,
            not kind.has_min,
            dtype,
            act_bits=16,
            super_bits=kind.scale_bits,
            super_group_size=size,
        )
    dtype = "int_asym_float_zp" if kind.has_min else "int"
    return QuantizationScheme(kind.bits, kind.group, not kind.has_min, dtype, act_bits=16)


_SCHEMES = tuple((ggml_scheme(name), kind) for name, kind in GGML_TYPES.items())


def ggml_type_of(scheme: QuantizationScheme) -> GgmlType | None:
    """The type with exactly the bits, groups and symmetry of `scheme` (plain `int` included), or None."""
    plain = scheme.with_overrides({"act_bits": 16})
    return next((kind for own, kind in _SCHEMES if own == plain), None)


@dataclass(frozen=True, eq=False)
class GgmlBlocks(Codes):
    """A matrix in blocks, as stored.

    Attributes:
        kind: the type.
        codes: uint8 [out, in], 0 .. 2**bits - 1.
        d: float16 [out, in/block], the scale of the sub-blocks' scales (of the codes, without sub-blocks).
        scales: int8 [out, in/group] for types with sub-blocks: 0 .. 2**scale_bits - 1, or signed; None otherwise.
        dmin: float16 [out, in/block], the scale of the minima (the minimum itself, without sub-blocks), or None.
        mins: uint8 [out, in/group], or None.
    """

    kind: GgmlType
    codes: torch.Tensor
    d: torch.Tensor
    scales: torch.Tensor | None = None
    dmin: torch.Tensor | None = None
    mins: torch.Tensor | None = None

    @classmethod
    def empty(cls, kind: GgmlType, out: int, columns: int, device: torch.device) -> GgmlBlocks:
        """Uninitialized blocks of a matrix."""
        make = lambda size, dtype: torch.empty(out, columns // size, dtype=dtype, device=device)  # noqa: E731
        scales = make(kind.group, torch.int8) if kind.is_k else None
        dmin = make(kind.block, torch.float16) if kind.has_min else None
        mins = make(kind.group, torch.uint8) if kind.is_k and kind.has_min else None
        return cls(kind, make(1, torch.uint8), make(kind.block, torch.float16), scales, dmin, mins)

    @property
    def ggml(self) -> str:
        return self.kind.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def step(self) -> torch.Tensor:
        """float32 [out, in/group]: the distance between codes, rounded as readers compute it."""
        d = self.d.float()
        if self.scales is None:
            return d
        return _over_groups(d, self.kind) * self.scales.float()

    def minimum(self) -> torch.Tensor | None:
        """float32 [out, in/group], added to every weight of the group (negative in K types); None without."""
        if self.dmin is None:
            return None
        dmin = self.dmin.float()
        if self.mins is not None:
            dmin = _over_groups(dmin, self.kind) * self.mins.float()
        return dmin * self.kind.min_sign

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in], bit for bit as ggml computes it: step * (code - zero), then the minimum."""
        out, columns = self.codes.shape
        values = self.codes.float().sub_(self.kind.zero).view(out, -1, self.kind.group)
        values.mul_(self.step().unsqueeze(-1))
        minimum = self.minimum()
        if minimum is not None:
            values.add_(minimum.unsqueeze(-1))
        return values.view(out, columns)

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(part).all()) for part in (self.d, self.dmin) if part is not None)

    def digest_parts(self, layer: QuantizedLayer, dtype: torch.dtype) -> tuple[torch.Tensor | str, ...]:
        return self.kind.name, *self.tensors().values()

    def clamped_scales(self, weight: torch.Tensor) -> int:
        """Number of blocks with a weight beyond float16, which their d cannot follow."""
        low, high = torch.aminmax(weight)
        if max(-float(low), float(high)) <= FP16_MAX:
            return 0
        return int((weight.reshape(-1, self.kind.block).abs().amax(1) > FP16_MAX).sum())

    def with_codes(self, codes: torch.Tensor) -> GgmlBlocks:
        """The same scales with other codes."""
        return replace(self, codes=codes)


def _over_groups(factor: torch.Tensor, kind: GgmlType) -> torch.Tensor:
    return factor.repeat_interleave(kind.block // kind.group, dim=1)


_CHUNK_WEIGHTS = 1 << 17  # weights rounded at once: stays in cache, without a float32 copy of a whole layer
_HUGE = 1e30


def code_limits(kind: GgmlType) -> tuple[float, float]:
    """Smallest and largest code minus the zero; without -128 for 8 bits, which ggml's quantizers never write."""
    low = -kind.zero + (1 if kind.bits == 8 else 0)
    return float(low), float(kind.codes - 1 - kind.zero)


def divisor_of(step: torch.Tensor) -> torch.Tensor:
    """The step as a divisor: a huge one for a step of zero, so all codes of its group are zero."""
    return torch.where(step == 0, _HUGE, step)


def inverse_of(step: torch.Tensor) -> torch.Tensor:
    """1 / step, and almost zero for a step of zero."""
    return divisor_of(step).reciprocal_()


def round_codes(
    groups: torch.Tensor, inverse: torch.Tensor, minimum: torch.Tensor | None, v: torch.Tensor | None,
    limits: tuple[float, float],
) -> torch.Tensor:  # fmt: skip
    """Codes minus the zero, float32 like `groups`: `clamp(round((w - minimum) / step + v))`.

    Args:
        groups: weights, float32.
        inverse: 1 / step of the groups; broadcasts, like `minimum`.
        v: rounding deltas in units of one code.
    """
    codes = groups * inverse if minimum is None else (groups - minimum).mul_(inverse)
    if v is not None:
        codes += v
    return codes.round_().clamp_(*limits)


@torch.no_grad()
def assign_codes(weight: torch.Tensor, blocks: GgmlBlocks, v: torch.Tensor | None = None) -> GgmlBlocks:
    """Blocks with the codes of a weight on their steps and minima.

    Args:
        weight: [out, in], any float dtype.
        blocks: steps and minima; the codes are ignored.
        v: rounding deltas in units of one code, [out, in] or in groups, or None for the nearest codes.
    """
    kind, (out, columns) = blocks.kind, weight.shape
    groups = weight.view(out, columns // kind.group, kind.group)
    deltas = None if v is None else v.view_as(groups)
    inverse, minimum = inverse_of(blocks.step()).unsqueeze(-1), blocks.minimum()
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        found = round_codes(
            groups[rows].float(), inverse[rows], None if minimum is None else minimum[rows].unsqueeze(-1),
            None if deltas is None else deltas[rows], code_limits(kind),
        )  # fmt: skip
        codes[rows] = found.add_(kind.zero).to(torch.uint8)
    return replace(blocks, codes=codes.view(out, columns))
