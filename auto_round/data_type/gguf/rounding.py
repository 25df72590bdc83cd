"""From weights to codes on a stored grid: the nearest ones, or those that rounding offsets lead to."""

from __future__ import annotations

from dataclasses import replace

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.types import GgmlType

_ROWS = 1 << 17  # weights rounded at a time: stays in cache, and no float32 copy of a whole layer is made
_HUGE = 1e30


def code_limits(kind: GgmlType) -> tuple[float, float]:
    """Least and largest code less the zero. Of 8 bits -128 is left out: no quantizer of ggml writes it."""
    low = -kind.zero + (1 if kind.bits == 8 else 0)
    return float(low), float(kind.codes - 1 - kind.zero)


def divisor_of(step: torch.Tensor) -> torch.Tensor:
    """The step, to divide by: that of zero is a huge one, so that all codes of its group are zero."""
    return torch.where(step == 0, _HUGE, step)


def inverse_of(step: torch.Tensor) -> torch.Tensor:
    """1 / step, and almost zero for a step of zero."""
    return divisor_of(step).reciprocal_()


def round_codes(
    groups: torch.Tensor, inverse: torch.Tensor, minimum: torch.Tensor | None, v: torch.Tensor | None,
    limits: tuple[float, float],
) -> torch.Tensor:  # fmt: skip
    """Codes less the zero, float32 like `groups`: `clamp(round((w - minimum) / step + v))`.

    Args:
        groups: weights, float32.
        inverse, minimum: of the groups' steps, and their minima; broadcast.
        v: offsets in units of one code.
    """
    codes = groups * inverse if minimum is None else (groups - minimum).mul_(inverse)
    if v is not None:
        codes += v
    return codes.round_().clamp_(*limits)


@torch.no_grad()
def assign_codes(weight: torch.Tensor, blocks: GgmlBlocks, v: torch.Tensor | None = None) -> GgmlBlocks:
    """The blocks with the codes of a weight on their steps and minima.

    Args:
        weight: [out, in], any float dtype.
        blocks: stored numbers; their codes do not matter.
        v: rounding offsets in units of one code, [out, in] or in groups, or None for the nearest codes.
    """
    kind, (out, columns) = blocks.kind, weight.shape
    groups = weight.view(out, columns // kind.group, kind.group)
    offsets = None if v is None else v.view_as(groups)
    inverse, minimum = inverse_of(blocks.step()).unsqueeze(-1), blocks.minimum()
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, _ROWS // columns)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        found = round_codes(
            groups[rows].float(), inverse[rows], None if minimum is None else minimum[rows].unsqueeze(-1),
            None if offsets is None else offsets[rows], code_limits(kind),
        )  # fmt: skip
        codes[rows] = found.add_(kind.zero).to(torch.uint8)
    return replace(blocks, codes=codes.view(out, columns))
