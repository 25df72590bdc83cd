"""ggml block types as data (ggml-common.h), the contents of their blocks, and rounding to codes on given steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from auto_round.codecs.quantized_layer import Codes, QuantizedLayer
from auto_round.codecs.registry import FP16_MAX
from auto_round.schemes import QuantizationScheme

# Weights per thread and chunk: a float32 buffer of 1 MB. With fewer, launching PyTorch's operations dominates.
_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24
_CHUNK_WEIGHTS = 1 << 17  # weights rounded at once: stays in cache, without a float32 copy of a whole layer
_HUGE = 1e30


@dataclass(frozen=True)
class GgmlType:
    """One block type, by ggml's name, such as `Q4_K`."""

    name: str
    bits: int  # of a code
    block: int  # weights in a block, which has one d (and one dmin)
    group: int  # weights that share a step: the block, or a sub-block with integers for its scale (and minimum)
    zero: int  # the code whose weight is zero before the minimum is added
    scale_bits: int  # of those integers, 0 where a block has no sub-blocks
    signed_scales: bool  # the integers may be negative
    has_min: bool  # every group has a minimum too
    min_sign: int  # factor on the stored minimum when it is added: -1 in the K types
    nbytes: int  # of a block

    @property
    def codes(self) -> int:
        return 1 << self.bits

    @property
    def is_k(self) -> bool:
        """Whether it is a K type: blocks of 256 weights with double-quantized scales."""
        return self.block == 256

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.block

    def row_bytes(self, columns: int) -> int:
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
    dtype = "int_asym_float_zp" if kind.has_min else "int"
    scales: dict[str, Any] = {}
    if kind.is_k:
        dtype = "int_asym_dq" if kind.has_min else "int_sym_dq"
        scales = {"super_bits": kind.scale_bits, "super_group_size": kind.block // kind.group}
    return QuantizationScheme(kind.bits, kind.group, not kind.has_min, dtype, act_bits=16, **scales)


_SCHEMES = tuple((ggml_scheme(name), kind) for name, kind in GGML_TYPES.items())


def ggml_type_of(scheme: QuantizationScheme) -> GgmlType | None:
    """The type with exactly the bits, groups and symmetry of `scheme` (plain `int` included), or None."""
    plain = scheme.with_overrides({"act_bits": 16})
    return next((kind for own, kind in _SCHEMES if own == plain), None)


@dataclass(frozen=True, eq=False)
class GgmlBlocks(Codes):
    """A matrix in blocks, as stored."""

    kind: GgmlType
    codes: Tensor  # uint8 [out, in], 0 .. 2**bits - 1
    d: Tensor  # float16 [out, in/block], the scale of the sub-blocks' scales (of the codes, without sub-blocks)
    scales: Tensor | None = None  # int8 [out, in/group] with sub-blocks: 0 .. 2**scale_bits - 1, or signed
    dmin: Tensor | None = None  # float16 [out, in/block], the scale of the minima (or the minimum itself)
    mins: Tensor | None = None  # uint8 [out, in/group]

    @classmethod
    def empty(cls, kind: GgmlType, out: int, columns: int, device: torch.device) -> GgmlBlocks:
        make = lambda size, dtype: torch.empty(out, columns // size, dtype=dtype, device=device)  # noqa: E731
        scales = make(kind.group, torch.int8) if kind.is_k else None
        dmin = make(kind.block, torch.float16) if kind.has_min else None
        mins = make(kind.group, torch.uint8) if kind.is_k and kind.has_min else None
        return cls(kind, make(1, torch.uint8), make(kind.block, torch.float16), scales, dmin, mins)

    @property
    def ggml(self) -> str:
        return self.kind.name

    def step(self) -> Tensor:
        """float32 [out, in/group]: the distance between codes, rounded as readers compute it."""
        return self._over_groups(self.d, self.scales)

    def minimum(self) -> Tensor | None:
        """float32 [out, in/group], added to every weight of the group (negative in K types); None without."""
        return None if self.dmin is None else self._over_groups(self.dmin, self.mins) * self.kind.min_sign

    def _over_groups(self, scale: Tensor, integers: Tensor | None) -> Tensor:
        if integers is None:
            return scale.float()
        return scale.float().repeat_interleave(self.kind.block // self.kind.group, dim=1) * integers.float()

    def dequantize(self) -> Tensor:
        """float32 [out, in], bit for bit as ggml computes it: step * (code - zero), then the minimum."""
        values = self.codes.float().sub_(self.kind.zero).view(self.codes.shape[0], -1, self.kind.group)
        values.mul_(self.step().unsqueeze(-1))
        minimum = self.minimum()
        if minimum is not None:
            values.add_(minimum.unsqueeze(-1))
        return values.view(self.codes.shape)

    def digest_parts(self, layer: QuantizedLayer, dtype: torch.dtype) -> tuple[Tensor | str, ...]:
        return self.kind.name, *self.tensors().values()

    def clamped_scales(self, weight: Tensor) -> int:
        """Number of blocks with a weight beyond float16, which their d cannot follow."""
        low, high = torch.aminmax(weight)
        if max(-float(low), float(high)) <= FP16_MAX:
            return 0
        return int((weight.reshape(-1, self.kind.block).abs().amax(1) > FP16_MAX).sum())


def block_slices(part: slice, block: int, device: torch.device, times: int = 1) -> Iterator[slice]:
    """Cut a slice of blocks of `block` weights into chunks; `times` larger ones where the work per weight is small."""
    chunk = _CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK
    step = max(64, chunk * times // block)
    if block > 64 and step > 64:
        # Not a power of two: rows of such a matrix share few cache sets, and transposing it is slow.
        step -= 8
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))


def code_limits(kind: GgmlType) -> tuple[float, float]:
    """Smallest and largest code minus the zero; without -128 for 8 bits, which ggml's quantizers never write."""
    low = -kind.zero + (1 if kind.bits == 8 else 0)
    return float(low), float(kind.codes - 1 - kind.zero)


def divisor_of(step: Tensor) -> Tensor:
    """The step as a divisor: a huge one for a step of zero, so all codes of its group are zero."""
    return torch.where(step == 0, _HUGE, step)


def inverse_of(step: Tensor) -> Tensor:
    """1 / step, and almost zero for a step of zero."""
    return divisor_of(step).reciprocal_()


def round_codes(groups: Tensor, inverse: Tensor, minimum: Tensor | None, v: Tensor | None, kind: GgmlType) -> Tensor:
    """uint8 codes of float32 weights: `clamp(round((w - minimum) * inverse + v)) + zero`, `v` in units of a code."""
    codes = groups * inverse if minimum is None else (groups - minimum).mul_(inverse)
    if v is not None:
        codes += v
    return codes.round_().clamp_(*code_limits(kind)).add_(kind.zero).to(torch.uint8)


@torch.no_grad()
def assign_codes(weight: Tensor, blocks: GgmlBlocks, v: Tensor | None = None) -> GgmlBlocks:
    """Blocks with the codes of a weight [out, in] on their steps and minima; `v`: as in `round_codes`, [out, in]."""
    kind, (out, columns) = blocks.kind, weight.shape
    groups = weight.view(out, columns // kind.group, kind.group)
    inverse, minimum = inverse_of(blocks.step()).unsqueeze(-1), blocks.minimum()
    minima = None if minimum is None else minimum.unsqueeze(-1)
    deltas = None if v is None else v.view_as(groups)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for rows in (slice(start, start + step) for start in range(0, out, step)):
        low, delta = (None if part is None else part[rows] for part in (minima, deltas))
        codes[rows] = round_codes(groups[rows].float(), inverse[rows], low, delta, kind)
    return replace(blocks, codes=codes.view(out, columns))
