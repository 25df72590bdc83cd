"""The step (and minimum) of each group that fits its weights best, by trying some steps and solving for better ones.

All take groups side by side, `[group, columns]` of `pieces.group_columns`, and do for each what ggml-quants.c does for
one, operation by operation: `make_qkx2_quants`, `make_qx_quants` and `make_q3_quants`. A group without a step gets 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from auto_round.data_type.gguf.columns import Terms, over, peak, total

SMALLEST = 1e-15  # a group whose largest magnitude is below it has no step
_ROUNDS = 5  # of a descent over the codes, at most
_AT_ONCE = 1 << 14  # columns of a descent for each thread: some rows of them stay in the innermost caches
_TINY = torch.finfo(torch.float32).tiny


class Fit(NamedTuple):
    """What was found for each group."""

    step: torch.Tensor  # float32 [columns]
    codes: torch.Tensor  # float32 [group, columns], as stored: what a group keeps whose step is zero once it is stored
    minimum: torch.Tensor | None = None  # float32 [columns], what is taken off, so not negative


def candidates(first: float, delta: float, count: int, top: int) -> torch.Tensor:
    """float32 [count]: `first + delta * i + top`, the ranges to try in place of `top` steps, rounded as in float32."""
    return (torch.arange(count, dtype=torch.float32) * delta + first) + top


def fit_with_minimum(
    x: torch.Tensor, weight: torch.Tensor, top: int, ranges: torch.Tensor, absolute: bool = False
) -> Fit:
    """Steps and minima with small weighted errors.

    Every candidate range gives codes; the line through them by weighted least squares gives a step and a minimum, of
    which the pair with the smallest error is kept. A minimum above zero is not allowed. Candidates start at the best
    minimum so far.

    Args:
        x: weights, float32 [group, columns].
        weight: float32, same shape, not negative: how much an error counts.
        top: the largest code.
        ranges: float32 [n] on the CPU (`candidates`).
        absolute: errors are magnitudes, not squares.
    """
    products, others = Terms(x), Terms(x)
    codes, term, other = torch.empty_like(x), products.values, others.values
    # A column for each group of what is best so far, and of what is tried: error, step, low, inverse, origin. The codes
    # are those of (x - origin) * inverse.
    best, tried = torch.empty(2, 5, x.shape[1], device=x.device).unbind(0)
    low, high = torch.amin(x, 0, out=best[2]).clamp_(max=0), x.amax(0)
    width = high - low
    flat = width <= top / torch.finfo(torch.float32).max  # all the same, or too close for a step
    torch.mul(weight, x, out=term)
    other.copy_(weight)
    sum_x, sum_w = products.total(), others.total()
    sum_l, sum_l2, sum_xl, spread, part = torch.empty(5, x.shape[1], device=x.device).unbind(0)

    def find_codes(of: torch.Tensor) -> None:
        torch.sub(x, of[4], out=codes).mul_(of[3]).round_().clamp_(0, top)

    def find_error(of: torch.Tensor) -> None:
        torch.mul(codes, of[1], out=term).add_(of[2]).sub_(x)
        (term.abs_() if absolute else term.mul_(term)).mul_(weight)
        products.total(of[0])

    best[3], best[4] = over(float(top), width), low
    best[1] = over(1.0, best[3])
    find_codes(best)
    find_error(best)
    for size in ranges:
        torch.div(size, torch.sub(high, low, out=part), out=tried[3])
        tried[4] = low
        find_codes(tried)
        torch.mul(weight, codes, out=term)
        torch.mul(term, codes, out=other)
        others.total(sum_l2)
        torch.mul(term, x, out=other)
        others.total(sum_xl)
        products.total(sum_l)
        # The weighted line through (code, weight): its slope is the step, and at code 0 it is at `low`.
        torch.mul(sum_w, sum_l2, out=spread).sub_(torch.mul(sum_l, sum_l, out=part))
        torch.mul(sum_w, sum_xl, out=tried[1]).sub_(torch.mul(sum_x, sum_l, out=part)).div_(spread)
        torch.mul(sum_l2, sum_x, out=tried[2]).sub_(torch.mul(sum_l, sum_xl, out=part)).div_(spread)
        above = tried[2] > 0
        torch.where(above, torch.div(sum_xl, sum_l2, out=part), tried[1], out=tried[1])
        tried[2].clamp_(max=0)
        find_error(tried)
        better = (tried[0] < best[0]).logical_and_(spread > 0)
        torch.where(better, tried, best, out=best)
    torch.sub(x, best[4], out=codes).mul_(best[3].masked_fill_(flat, 0.0)).round_().clamp_(0, top)
    return Fit(best[1].masked_fill(flat, 0.0), codes, -best[2])


def fit_symmetric(x: torch.Tensor, weight: torch.Tensor, zero: int, ranges: torch.Tensor) -> Fit:
    """Steps (of either sign) with small weighted squared errors.

    For each candidate range the value of the largest magnitude is put at its end, and the step is that of least squares
    for the codes found; the one that explains most is kept.

    Args:
        x: weights, float32 [group, columns].
        weight: float32, same shape: how much an error counts.
        zero: codes are -zero .. zero - 1.
        ranges: float32 [n] on the CPU: first the one to start from, then the others in order.
    """
    far = peak(x, 0)
    none = far.abs() < SMALLEST
    terms, pull, codes = Terms(x), weight * x, torch.empty_like(x)
    # A column for each group of what is best so far, and of what is tried: what it explains, step, inverse.
    best, tried = torch.empty(2, 3, x.shape[1], device=x.device).unbind(0)
    sumlx, suml2, left, right = torch.empty(4, x.shape[1], device=x.device).unbind(0)
    for count, size in enumerate(ranges):
        torch.div(-size, far, out=tried[2])
        torch.mul(x, tried[2], out=codes).round_().clamp_(-zero, zero - 1)
        torch.mul(weight, codes, out=terms.values).mul_(codes)
        terms.total(suml2)
        torch.mul(pull, codes, out=terms.values)
        terms.total(sumlx)
        torch.div(sumlx, suml2, out=tried[1])
        torch.mul(tried[1], sumlx, out=tried[0])
        if count == 0:
            best.copy_(tried)
            continue
        torch.mul(sumlx, sumlx, out=left)
        better = (left > torch.mul(best[0], suml2, out=right)).logical_and_(suml2 > 0)
        torch.where(better, tried, best, out=best)
    torch.mul(x, best[2].masked_fill(none, 0.0), out=codes).round_().clamp_(-zero, zero - 1)
    codes.add_(zero).mul_((~none).float())
    return Fit(best[1].masked_fill(none, 0.0), codes)


def descend_symmetric(x: torch.Tensor, weight: torch.Tensor, zero: int) -> Fit:
    """Steps by coordinate descent: one code after the other moves to where the step fits all others, while that
    explains more. Arguments as of `fit_symmetric`."""
    far = peak(x, 0)
    none = far.abs() < SMALLEST
    codes = x.mul(over(-float(zero), far).masked_fill_(none, 0.0)).round_().clamp_(-zero, zero - 1)
    pull = weight * x
    sums = torch.stack((total(pull * codes), total((weight * codes).mul_(codes))))
    _descend(x, weight, pull, codes, sums, zero, _ROUNDS)
    step = torch.where(sums[1] == 0, torch.zeros_like(far), sums[0] / sums[1])
    return Fit(step.masked_fill_(none, 0.0), codes.add_(zero).mul_((~none).float()))


def _descend(
    x: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, codes: torch.Tensor, sums: torch.Tensor, zero: int,
    rounds: int,
) -> None:  # fmt: skip
    """Move `codes` from -zero [group, columns], and keep `sums` [2, columns] of pull * codes and weight * codes**2."""
    every = (x, weight, pull, codes, sums)
    width = _AT_ONCE * torch.get_num_threads() if x.device.type == "cpu" else x.shape[1]
    parts = [[t[:, i : i + width] for t in every] for i in range(0, x.shape[1], width)]
    moved = torch.cat([_descend_once(p[0], p[1], p[2], p[3], p[4], zero) for p in parts])
    # Where no code moved in a whole round none ever will: a fifth of the columns goes on, then a twentieth.
    going = moved.nonzero().squeeze(1)
    if rounds > 1 and going.numel():
        some = [t.index_select(1, going) for t in every]
        _descend(some[0], some[1], some[2], some[3], some[4], zero, rounds - 1)
        codes.index_copy_(1, going, some[3])
        sums.index_copy_(1, going, some[4])


def _descend_once(
    x: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, codes: torch.Tensor, sums: torch.Tensor, zero: int
) -> torch.Tensor:
    """One round of `_descend`; float32 [columns], 1 where a code moved.

    Truth values are float32, made in place: on a CPU PyTorch is several times slower with bools beside floats.
    """
    sumlx, suml2 = sums.unbind(0)
    slx, sl2, new, with_it, left, right, moved = torch.zeros(7, sumlx.shape[0], device=x.device).unbind(0)
    shares = pull * codes, (weight * codes).mul_(codes)
    rows = (x, weight, pull, codes, *shares)
    for value, w, wx, code, of_lx, of_l2 in zip(*(t.unbind(0) for t in rows), strict=True):
        # Without this weight, and the code that the step of the others gives it.
        torch.sub(sumlx, of_lx, out=slx)
        torch.sub(suml2, of_l2, out=sl2)
        torch.div(torch.mul(value, sl2, out=left), torch.clamp(slx, min=_TINY, out=right), out=new)
        new.round_().clamp_(-zero, zero - 1)
        # With it again.
        torch.add(slx, torch.mul(wx, new, out=left), out=with_it)
        sl2.add_(torch.mul(w, new, out=left).mul_(new))
        torch.mul(with_it, with_it, out=left).mul_(suml2)
        torch.mul(sumlx, sumlx, out=right).mul_(sl2)
        moves = torch.minimum(slx, sl2, out=slx).gt_(0).mul_(left.gt_(right))
        moves.mul_(torch.sub(new, code, out=right).ne_(0))
        for now, then in ((sumlx, with_it), (suml2, sl2), (code, new)):
            now.lerp_(then, moves)  # exact: it is one or the other
        torch.maximum(moved, moves, out=moved)
    return moved
