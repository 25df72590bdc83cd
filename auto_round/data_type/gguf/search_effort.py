"""What the search tries for each type, as data.

Each list is in the order in which its entries help: of a few hundred possible ones, the next is the one that lowers the
error most after those before it, over layers of SmolLM2-135M (docs/gguf.md). A longer list costs time in proportion and
gains less with each entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Pair = tuple[float, float]


@dataclass(frozen=True)
class Effort:
    """What is tried for a type.

    Attributes:
        starts: grids of a group that are tried first: (width, start) as parts of the group's range; without minimum
            (width, sign of the step).
        refits: rounds of least squares after the best of them.
        moves: for each round over neighbours, what is tried, see `Stored.moved`; without minimum the second number is
            unused.
    """

    starts: tuple[Pair, ...]
    refits: int
    moves: tuple[tuple[Pair, ...], ...]


def _widths(*widths: float, mirrored: tuple[float, ...] = ()) -> tuple[Pair, ...]:
    return tuple((width, 1.0) for width in widths) + tuple((width, -1.0) for width in mirrored)


def _line(*moves: float) -> tuple[Pair, ...]:
    return tuple((move, 0.0) for move in moves)


_TWO_BITS = ((0.8, 0.1), (0.8, 0.2), (0.8, 0), (0.5, 0.3), (1.05, 0), (0.55, 0.15), (0.75, 0.3), (0.65, 0))
_FOUR_BITS = (
    (0.96, 0.02),
    (1.02, 0.02),
    (0.96, 0),
    (0.96, 0.04),
    (1.06, -0.04),
    (1.06, -0.02),
    (0.88, 0.06),
    (0.94, 0),
)
_FIVE_BITS = ((1, 0), (1.04, 0), (0.98, 0), (0.98, 0.02), (1.06, 0), (1.06, -0.02), (1.02, 0), (0.96, 0.02))

# Without sub-blocks, in parts of a step.
_SHIFTS = (
    ((0, 1), (-0.75, 0), (-0.75, 0.25), (1, -0.25), (1, 1), (1.5, -0.5), (-0.25, 0), (-1.25, -0.25), (0.5, 0)),
    ((0, 1), (-0.25, 0), (1.5, -0.5), (0.25, 0), (-0.75, 0.75), (1.5, -0.25), (-1, 0.5), (-1.5, -0.25), (0.5, 1)),
)  # fmt: skip
# With sub-blocks, in integers.
_MOVES_2 = (
    ((0, -1), (-1, 0), (1, 0), (0, 1), (-1, -1), (1, 1)),
    ((-1, -1), (1, 1), (-1, -2), (1, 0), (1, 2), (-1, 0), (0, -1), (0, 1)),
)  # fmt: skip
_MOVES_4 = (
    ((0, -1), (-1, -1), (-1, 0), (1, 1), (1, 0), (-2, -3), (0, -4), (-3, -2), (3, 4), (4, 0)),
    ((-1, -1), (1, 1), (-2, -3), (0, -4), (4, 0), (-3, -2), (3, 4), (-2, -4), (0, -1), (-1, 0), (3, 3), (0, 1)),
)  # fmt: skip
_MOVES_5 = (
    ((-1, 0), (1, 0), (-1, -1), (1, 1), (3, 3), (2, 1), (-2, -1), (3, -1), (0, 3), (2, 0)),
    ((3, 3), (4, 3), (3, 4), (0, 3), (0, -3), (-1, -1), (2, 1), (1, 1), (-2, -1), (4, 1), (-2, 1), (0, 2), (1, 0)),
)  # fmt: skip

EFFORTS: Mapping[str, Effort] = MappingProxyType({
    "Q4_0": Effort(_widths(0.98, 0.86, 1.14, 0.74, 1.06, 0.94, mirrored=(0.94, 0.66)), 2, (
        _line(1.375, 1, 0.5, 0.25, -0.25),
    )),
    "Q5_0": Effort(_widths(0.99, 1.06, 0.92, 1.02, 0.96, 0.88, mirrored=(0.99,)), 2, (
        _line(1.25, 0.75, 1.5, -1.5, 0.375, 1), _line(1.5, 1.25, 0.25, -1.5),
    )),
    "Q8_0": Effort(_widths(1), 0, (_line(1.125, 1.5, 0.75, -0.5, -1, -0.25), _line(1.5, 1.125, 0.375, -1.5))),
    "Q4_1": Effort(_FOUR_BITS, 2, _SHIFTS),
    "Q5_1": Effort(_FIVE_BITS, 2, _SHIFTS),
    "Q2_K": Effort(_TWO_BITS, 2, _MOVES_2),
    "Q3_K": Effort(_widths(0.95, 0.7, 1.2, 1.05, 0.85, 0.55, mirrored=(0.9, 0.65)), 2, (
        _line(-5, 6, 3, -3, 8, -7), _line(8, -7, -10, 6, -1, 1),
    )),
    "Q4_K": Effort(_FOUR_BITS, 2, _MOVES_4),
    "Q5_K": Effort(_FIVE_BITS, 2, _MOVES_5),
    "Q6_K": Effort(_widths(1, 1.05, 1.03, 0.97, 1.06, 1.01, 0.99, mirrored=(1.04,)), 2, (
        _line(-6, 7, -4, 4, -9, 10, 3, -3), _line(-8, 8, -6, 10, -10, 6, -5, 5, 3, -3),
    )),
})  # fmt: skip

# Where codes are found by the outputs of a layer, what the rest adds is lost in what they win.
QUICK: Mapping[str, Effort] = MappingProxyType(
    {name: Effort(effort.starts[:4], 1, ()) for name, effort in EFFORTS.items()}
)
