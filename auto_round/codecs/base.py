"""`Codec`: what a data type is to the rest of the package. `codecs.kinds.codec_of` gives the one of a scheme.

Nobody asks which kind of codes a scheme has; the codec answers what follows from it. `family` is the key of the tables
of formats and loaders: `int`, the small floats `mx_fp`, `mx_int`, `nv_fp`, `fp` and `float` (a plugin's), `ggml`,
`function` (a data type that is a function without codes), `none` (not quantized).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from auto_round.codecs.ggml.types import GgmlType, ggml_type_of
from auto_round.codecs.quantized_layer import Codes
from auto_round.codecs.tunable import TunableGrid
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.schemes import ActivationScheme, QuantizationScheme

Scheme = QuantizationScheme | ActivationScheme


@dataclass(frozen=True, eq=False)
class StartOptions:
    """How the scales of a weight are found."""

    searched: bool = False  # by an importance-weighted search, instead of from the extremes of each group
    importance: Tensor | None = None  # float32 [in], the second moment of each input channel
    scale_dtype: torch.dtype = torch.float16  # in which integers' scales are stored
    global_scale: Tensor | None = None  # float32 scalar shared with other layers (NVFP4); None: the weight's own
    quick: bool = False  # a short search, enough where error feedback follows; the codes may be left out


@dataclass(frozen=True, eq=False)
class Grid:
    """The values of the codes of a matrix, `minimum + scale * (number - zero)`, of whole numbers or minifloats."""

    scale: Tensor  # float32 [out, groups], none of them zero
    group: int  # input channels in a group; the last one may be short
    low: float  # limits of the stored numbers before `zero` is subtracted
    high: float
    zero: Tensor | float = 0  # the whole number that stands for zero, [out, groups] or one for all
    minimum: Tensor | None = None  # float32 [out, groups]; None for zero
    mantissa: int = -1  # bits of the mantissa of minifloats; -1 for whole numbers
    smallest: float = 0.0  # normal value of minifloats
    encode: Callable[[Tensor], Tensor] | None = None  # uint8 codes of minifloats

    def per_weight(self, values: Tensor, rows: slice, band: slice) -> Tensor:
        """What each group has, [out, groups], for each weight of some rows and of a band of input channels."""
        first = band.start // self.group
        wide = values[rows, first : -(-band.stop // self.group)].repeat_interleave(self.group, dim=1)
        return wide[:, band.start - first * self.group :][:, : band.stop - band.start]

    def codes(self, values: Tensor) -> Tensor:
        """uint8 codes of float32 numbers on the grid less `zero`, a single one; the numbers may be overwritten."""
        return values.add_(self.zero).to(torch.uint8) if self.encode is None else self.encode(values)


class TunedParameters(NamedTuple):
    """What SignRound learns of a layer besides a rounding delta for each weight."""

    group: int  # weights that share a scale
    numbers: int  # float32 numbers held for each group: start and current scale, scale factor, zero point
    snapshot: int  # bytes of a weight in a copy of the state


class Codec(ABC):
    """One number type with its parameters, for weights, and for inputs what formats need to know of them."""

    family: str  # see the module's docstring
    symmetric_only: bool = False  # it has no zero points
    element: str | None = None  # name of the minifloat (`codecs.minifloat.MINIFLOATS`)
    has_global_scale: bool = False  # scales are relative to one of the whole tensor, which fused layers share (NVFP4)
    rows_independent: bool = False  # every row, or block of rows, is rounded by itself
    input_scale_dtype: torch.dtype | None = None  # of stored static scales of inputs; None: the model's dtype
    head_searches: ClassVar[tuple[str, ...]] = ()  # how else the head is quantized, to keep the best
    # Scales are tuned without being asked for by a rate of their own. Where few can be stored, or one scales a
    # super-block of 256 weights, a step of a scale undoes what rounding deltas have learned (docs/tuning.md).
    tunes_scales: ClassVar[bool] = False

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    @property
    def label(self) -> str:
        """The scheme in reports and messages."""
        assert isinstance(self.scheme, QuantizationScheme)
        return self.scheme.describe()

    @property
    def ggml_type(self) -> GgmlType | None:
        """The ggml type that stores codes of exactly these bits, groups and symmetry, or None."""
        return ggml_type_of(self.scheme) if isinstance(self.scheme, QuantizationScheme) else None

    def problem(self) -> str | None:
        """What is wrong with bits or group size, as `bits=9; ...`, or None."""
        return None

    def uses_feedback(self, asked: bool) -> bool:
        """Whether error feedback chooses the codes, if it was `asked` for or not."""
        return asked

    def limited(self, weight: Tensor) -> Tensor:
        """The weight cut to the largest value that scales can follow; the same tensor where nothing exceeds it."""
        return weight

    @abstractmethod
    def start(self, weight: Tensor, options: StartOptions) -> Any:
        """Scales and zero points of a weight [out, in] before any tuning; every kind has a type of its own for them."""

    @abstractmethod
    def encode(self, weight: Tensor, start: Any, delta: Tensor | None = None) -> Codes:
        """The codes of a weight on given scales. `delta`: rounding deltas, shaped as the groups of the kind."""

    def quantize(self, weight: Tensor, options: StartOptions) -> Codes:
        """Round to nearest: `start` and `encode`."""
        return self.encode(weight, self.start(weight, options))

    def grid(self, start: Any, shape: tuple[int, int]) -> Grid:
        """What the codes of a matrix [out, in] on these scales stand for. Only where `uses_feedback` may be true."""
        raise self._no_codes()

    def with_codes(self, start: Any, codes: Tensor) -> Codes:
        """Scales and codes uint8 [out, in], chosen on `grid`, as stored."""
        raise self._no_codes()

    def codes(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, global_scale: Tensor | None = None
    ) -> Codes:
        """What a layout read: codes uint8 [out, in], scales and the like as `Codes` of this kind describe them."""
        raise self._no_codes()

    def _no_codes(self) -> UnsupportedError:
        return UnsupportedError(f"data type {self.scheme.data_type!r} stores no codes")

    def for_width(self, in_features: int | None) -> Codec:
        """The codec of a layer of that width; another one where this needs whole blocks."""
        return self

    @abstractmethod
    def tuned(self, in_features: int) -> TunedParameters | None:
        """What is learned of a layer of that width in closed form; None: by autograd through a function."""

    def tunable(self, starts: Sequence[Any]) -> TunableGrid:
        """The learned scales of layers of this codec, stacked, from their `start`. Only where `tuned` is not None."""
        raise self._no_codes()


CodecFactory = Callable[[Scheme], Codec]
CODECS: dict[str, CodecFactory] = {}


def register_codec(*names: str) -> Callable[[CodecFactory], CodecFactory]:
    """Decorator of what makes a `Codec` of a scheme of these data types. Raises ConfigError when a name is taken."""

    def register(factory: CodecFactory) -> CodecFactory:
        for name in names:
            if CODECS.setdefault(name, factory) is not factory:
                raise ConfigError(f"data type {name!r} is already registered")
        return factory

    return register
