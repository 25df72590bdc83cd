"""The quantized tensor types of ggml, as data (ggml-common.h, `block_q4_0` to `block_q6_K`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from auto_round.schemes import QuantizationScheme


@dataclass(frozen=True)
class GgmlType:
    """One block type.

    Attributes:
        name: as ggml calls it, `Q4_K`.
        bits: of a code.
        block: weights in a block, which has one d (and one dmin).
        group: weights that share a step: the block, or a sub-block with integers for its scale (and min).
        zero: the code whose weight is zero before the minimum is taken off.
        scale_bits: of those integers, 0 where a block has no sub-blocks.
        signed_scales: the integers may be negative.
        has_min: every group has a minimum too.
        min_sign: what the stored minimum is multiplied by when it is added: -1 where it is taken off (K types).
        nbytes: of a block.
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
        """Whether it is a K type: 256 weights with double-quantized scales."""
        return self.block == 256

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights, which must fill blocks."""
        assert columns % self.block == 0
        return columns // self.block * self.nbytes


_ROWS = (
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

GGML_TYPES: Mapping[str, GgmlType] = MappingProxyType({row[0]: GgmlType(*row) for row in _ROWS})


def ggml_scheme(name: str) -> QuantizationScheme:
    """The scheme of one tensor of type `name`, such as `Q4_K`."""
    kind = GGML_TYPES[name]
    if kind.is_k:
        dtype, size = ("int_asym_dq" if kind.has_min else "int_sym_dq"), kind.block // kind.group
        return QuantizationScheme(
            kind.bits, kind.group, not kind.has_min, dtype, 16, super_bits=kind.scale_bits, super_group_size=size
        )
    dtype = "int_asym_float_zp" if kind.has_min else "int"
    return QuantizationScheme(kind.bits, kind.group, not kind.has_min, dtype, 16)


_SCHEMES = tuple((ggml_scheme(name), kind) for name, kind in GGML_TYPES.items())


def ggml_type_of(scheme: QuantizationScheme) -> GgmlType | None:
    """The type that stores exactly what `scheme` says, or None. Plain `int` of the right shape counts."""
    plain = scheme.with_overrides({"act_bits": 16})
    return next((kind for own, kind in _SCHEMES if own == plain), None)
