"""How the largest value of a tile becomes the scale that its small floats share, in a form that a file can hold.

A rule knows its element, and gives float32 scales. `NaN` stands for the scale of a tile that holds NaN or Inf, so that
all of it becomes NaN (as a NaN scale does in OCP MX v1.0, 5.1) and the place is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from auto_round.data_type.elements import ELEMENTS, Element

GLOBAL_TOP = 448.0 * 6.0  # largest block scale times largest element
_MANTISSA = 0x7FFFFF
_ROOT_OF_TWO = 0x3504F3  # mantissa bits of sqrt(2)
_SMALLEST_BLOCK = 2.0**-9  # smallest positive e4m3
_BLOCK_OF_ZEROS = 2.0**-3  # under it, whatever has a scale that rounds to zero is less than half the smallest element
_SMALLEST_PLAIN = 2.0**-100  # of a tile of zeros; far from where 448 / scale or 448 * scale leaves float32


class ScaleRule(Protocol):
    """From extremes to scales. Tensors are float32 of any shape; `global_scale` is a scalar for NVFP4 and else None."""

    @property
    def element(self) -> Element: ...

    def scale(self, largest: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The stored scale of tiles whose largest magnitudes these are."""
        ...

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest scales that can be stored."""
        ...

    def candidates(self, scale: torch.Tensor) -> Iterator[torch.Tensor]:
        """Other stored scales near these, for a search."""
        ...


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """2**e for int32 e, cut to -127 .. 127, exactly."""
    # The bits of 2**-127, which float32 holds as a subnormal, are the lone exception to `(e + 127) << 23`.
    return ((exponents.clamp(-127, 127) + 127) << 23).clamp_(min=1 << 22).view(torch.float32)


@dataclass(frozen=True)
class PowerOfTwo:
    """Scales 2**-127 .. 2**127, one byte each (E8M0, OCP MX v1.0, 5.4.1).

    Attributes:
        up: False: `floor(log2(largest)) - emax`, the rule of OCP MX v1.0, 6.3; values between the element's largest and
            the next power of two are cut. True: the smallest power with which nothing is cut ("round up", the rule of
            NVIDIA's conversion instructions).
    """

    element: Element
    up: bool = False

    def scale(self, largest: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        # largest = m * 2**k and maximum = M * 2**emax with 1 <= m, M < 2, so the power that fits has k - emax, and one
        # more when m > M: a carry out of the mantissa when what M lacks to two is added.
        carry = _MANTISSA - _mantissa(self.element.maximum) if self.up else 0
        bits = largest.contiguous().view(torch.int32)
        exponents = ((bits + carry) >> 23).sub_(127 + self.element.exponent)
        return torch.where(largest.isfinite(), _powers(exponents), torch.nan)

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        """Nearest by ratio."""
        bits = scale.contiguous().view(torch.int32)
        powers = _powers(((bits + (_MANTISSA + 1 - _ROOT_OF_TWO)) >> 23).sub_(127))
        powers = torch.where(scale < 2.0**-126.5, 2.0**-127, powers)  # below normal numbers the bits say nothing of it
        return torch.where(scale.isfinite(), powers, torch.nan)

    def candidates(self, scale: torch.Tensor) -> Iterator[torch.Tensor]:
        yield (scale * 0.5).clamp(min=2.0**-127)
        yield (scale * 2).clamp(max=2.0**127)


def _mantissa(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) & _MANTISSA


@dataclass(frozen=True)
class BlockScale:
    """Positive e4m3 scales, under a float32 scale of the whole tensor by which they are too large (NVFP4).

    A scale that would round to zero is the smallest there is.

    Attributes:
        of_inputs: such a group of inputs becomes zeros instead: its scale is one under which all of it rounds to zero.
    """

    element: Element
    of_inputs: bool = False

    def scale(self, largest: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        assert global_scale is not None
        share = torch.where(largest.isfinite(), largest, torch.nan) * (1 / self.element.maximum) * global_scale
        if self.of_inputs:
            scale = ELEMENTS["e4m3"].nearest(share)
            return torch.where(scale == 0, _BLOCK_OF_ZEROS, scale)
        return self.store(share)

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        return ELEMENTS["e4m3"].nearest(scale).clamp_(min=_SMALLEST_BLOCK)

    def candidates(self, scale: torch.Tensor) -> Iterator[torch.Tensor]:
        # Codes of positive values are in their order: neighbours are neighbours.
        e4m3 = ELEMENTS["e4m3"]
        codes = e4m3.encode(scale).int()
        for offset in (-1, 1, -2, 2, -3, 3, -4, 4, -5, -6):
            yield e4m3.decode((codes + offset).clamp_(1, 126).to(torch.uint8))


def global_scale_of(largest: torch.Tensor) -> torch.Tensor:
    """float32 scalar 448 * 6 / largest, with which the largest block gets the largest scale (NVFP4); 1 for zeros."""
    largest = largest.detach().float().reshape(())
    exact = (torch.full_like(largest, GLOBAL_TOP) / largest).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(largest > 0, exact, torch.where(largest == 0, 1.0, torch.nan))


@dataclass(frozen=True)
class PlainScale:
    """`largest / maximum`, rounded to bfloat16 where it is to be stored.

    Attributes:
        stored: False keeps float32, for scales that live only as long as one input.
    """

    element: Element
    stored: bool = True

    def scale(self, largest: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        return self.store(torch.where(largest.isfinite(), largest, torch.nan) / self.element.maximum)

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clamp(min=_SMALLEST_PLAIN)
        return scale.bfloat16().float() if self.stored else scale

    def candidates(self, scale: torch.Tensor) -> Iterator[torch.Tensor]:
        for factor in (0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5):
            yield self.store(scale * factor)
