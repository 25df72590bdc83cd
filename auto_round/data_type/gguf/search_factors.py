"""Steps and minima of a block's groups as small integers times a float16: which factor, which integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from auto_round.data_type.gguf.search_piece import Piece, fold
from auto_round.data_type.gguf.types import GgmlType

_TINY = 1e-30


def to_half(value: torch.Tensor) -> torch.Tensor:
    """float32 values that float16 holds; Inf where they are beyond it, which callers refuse in the end."""
    return value.half().float()


def scale_limits(kind: GgmlType) -> tuple[int, int]:
    """Least and largest integer that a group's scale (and minimum) may be."""
    if kind.signed_scales:
        return -(1 << (kind.scale_bits - 1)), (1 << (kind.scale_bits - 1)) - 1
    return 0, (1 << kind.scale_bits) - 1


def over_groups(values: torch.Tensor) -> torch.Tensor:
    """[g, B] summed to [1, B]; `values` is overwritten."""
    return fold(values).unsqueeze(0)


def choose_factor(
    values: torch.Tensor, weights: torch.Tensor, low: int, high: int, widths: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor d of each block with the least `sum a (v - d k)^2` over its groups, among the candidates.

    Args:
        values: v, [g, B]; not negative where `low` is 0.
        weights: a, [g, B].
        low, high: limits of the integers k.
        widths: candidates, as factors on the d that maps the value of largest magnitude to the far end of the range.

    Returns:
        (d float32 [1, B], values of float16; k float32 [g, B]).
    """
    top, bottom = values.amax(0, keepdim=True), values.amin(0, keepdim=True)
    base = top / high if low == 0 else torch.where(top > -bottom, top, bottom) / low
    # All candidates at once, [g, candidates, B]: there are many steps, and few numbers in one.
    d = torch.stack([base * width for width in widths], dim=1)
    v, a = values.unsqueeze(1), weights.unsqueeze(1)
    for _ in range(2):
        whole = _integers(v, d, low, high)
        part = a * whole
        d = over_groups(part * v) / over_groups(part.mul_(whole)).clamp(min=_TINY)
    d = to_half(d)
    whole = _integers(v, d, low, high)
    errors = over_groups((v - d * whole).square_().mul_(a))
    least, found, integers = errors[:, 0], d[:, 0], whole[:, 0]
    for index in range(1, len(widths)):
        better = errors[:, index] < least
        least = torch.where(better, errors[:, index], least)
        found = torch.where(better, d[:, index], found)
        integers = torch.where(better, whole[:, index], integers)
    return found, integers


def _integers(values: torch.Tensor, d: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (values / torch.where(d == 0, 1 / _TINY, d)).round_().clamp_(low, high)


def refit_factors(
    piece: Piece, d: torch.Tensor, scales: torch.Tensor, dmin: torch.Tensor | None, mins: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The factors with the least weighted error for the integers and codes at hand, as float16 holds them.

    Args:
        d, dmin: float32 [1, B].
        scales, mins: float32 [g, B], ones where there are no sub-blocks.
    """
    if dmin is None or mins is None:
        sums = piece.sums(d * scales)
        u, a = over_groups(scales * sums.qx), over_groups(scales * scales * sums.qq)
        return to_half(torch.where(a > _TINY, u / a.clamp(min=_TINY), d)), None
    sign = piece.kind.min_sign
    sums = piece.sums(d * scales, dmin * mins * sign)
    # the normal equations of sum h (d k q + e m - x)^2, with e = sign * dmin
    a = over_groups(scales * scales * sums.qq)
    b = over_groups(scales * mins * sums.q)
    c = over_groups(mins * mins * piece.sum_h)
    u, v = over_groups(scales * sums.qx), over_groups(mins * piece.sum_hx)
    spread = a * c - b * b
    over = spread.clamp(min=_TINY).reciprocal_()
    new_d, new_dmin = (u * c - b * v) * over, (a * v - b * u) * over * sign
    usable = (spread > 1e-5 * a * c) & (new_d > 0)
    if sign < 0:
        usable &= new_dmin >= 0
    return to_half(torch.where(usable, new_d, d)), to_half(torch.where(usable, new_dmin, dmin))
