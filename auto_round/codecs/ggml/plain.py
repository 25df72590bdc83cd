"""Quantize to ggml types without importance, byte for byte as llama.cpp does without an imatrix.

The rules are `quantize_row_q4_0_ref` to `quantize_row_q6_K_ref` of ggml-quants.c, operation by operation, even where
they are not optimal (a `Q4_0` block whose d is zero in float16 keeps its codes); `search.py` gives smaller errors.

K types fit a step (and minimum) to each group of 16 or 32, then integers to these:

| type | weight of an error | ranges tried (steps between the ends) | error |
|---|---|---|---|
| Q2_K | the weight's magnitude | 2.5 to 4.0 | magnitude |
| Q4_K, Q5_K | that, and the root mean square of the group | 14 to 16, 30.5 to 32 | square |
| Q6_K | the weight's square | 31.1 to 32.9 | square |
| Q3_K | the weight's square | none: coordinate descent over the codes | square |
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from auto_round.codecs.ggml.columns import (
    GgmlBlockWriter,
    OrderedSum,
    block_row_chunks,
    blocks_to_columns,
    columns_to_blocks,
    even_parts,
    exact_quotient,
    group_columns,
    nearest_codes,
    signed_absmax,
    total,
)
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType
from auto_round.threads import parallel_map

MIN_MAGNITUDE = 1e-15  # a group whose largest magnitude is below it has no step
_ROUNDS = 5  # of coordinate descent, at most
_DESCENT_COLUMNS = 1 << 14  # columns per thread of coordinate descent: a few rows stay in the innermost caches
_TINY = torch.finfo(torch.float32).tiny


class Fit(NamedTuple):
    """Fit of each group."""

    step: torch.Tensor  # float32 [columns]
    codes: torch.Tensor  # float32 [group, columns], as stored; used where the stored step is zero
    minimum: torch.Tensor | None = None  # float32 [columns], subtracted by readers, not negative


def candidates(first: float, delta: float, count: int, top: int) -> torch.Tensor:
    """float32 [count]: `first + delta * i + top`, the ranges to try instead of `top` steps."""
    return (torch.arange(count, dtype=torch.float32) * delta + first) + top


def fit_with_minimum(
    x: torch.Tensor, weight: torch.Tensor, top: int, ranges: torch.Tensor, absolute: bool = False
) -> Fit:
    """Steps and minima with small weighted errors.

    Every candidate range proposes codes, and weighted least squares through them a step and a minimum of at most zero;
    the pair with the smallest error is kept. Candidates start at the best minimum so far.

    Args:
        x: weights, float32 [group, columns].
        weight: of each error, float32, same shape, not negative.
        top: the largest code.
        ranges: float32 [n] on the CPU (`candidates`).
        absolute: errors are magnitudes, not squares.
    """
    products, others = OrderedSum(x), OrderedSum(x)
    codes, term, other = torch.empty_like(x), products.values, others.values
    # One column per group, of the best fit so far and of the trial: error, step, low, inverse, origin. The codes are
    # those of (x - origin) * inverse.
    best, tried = torch.empty(2, 5, x.shape[1], device=x.device).unbind(0)
    low, high = torch.amin(x, 0, out=best[2]).clamp_(max=0), x.amax(0)
    width = high - low
    flat = width <= top / torch.finfo(torch.float32).max  # all values equal, or too close for a step
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

    best[3], best[4] = exact_quotient(float(top), width), low
    best[1] = exact_quotient(1.0, best[3])
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

    Each candidate range maps the value of the largest magnitude to its end and proposes codes; the least-squares step
    with the largest reduction of the error is kept.

    Args:
        x: weights, float32 [group, columns].
        weight: of each error, float32, same shape.
        zero: codes are -zero .. zero - 1.
        ranges: float32 [n] on the CPU; the first is the starting point.
    """
    extreme = signed_absmax(x, 0)
    none = extreme.abs() < MIN_MAGNITUDE
    terms, pull, codes = OrderedSum(x), weight * x, torch.empty_like(x)
    # One column per group, of the best fit so far and of the trial: reduction of the error, step, inverse.
    best, tried = torch.empty(2, 3, x.shape[1], device=x.device).unbind(0)
    sumlx, suml2, left, right = torch.empty(4, x.shape[1], device=x.device).unbind(0)
    for count, size in enumerate(ranges):
        torch.div(-size, extreme, out=tried[2])
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
    """Steps by coordinate descent over the codes. Arguments as for `fit_symmetric`."""
    extreme = signed_absmax(x, 0)
    none = extreme.abs() < MIN_MAGNITUDE
    codes = x.mul(exact_quotient(-float(zero), extreme).masked_fill_(none, 0.0)).round_().clamp_(-zero, zero - 1)
    pull = weight * x
    sums = torch.stack((total(pull * codes), total((weight * codes).mul_(codes))))
    _descend(x, weight, pull, codes, sums, zero, _ROUNDS)
    step = torch.where(sums[1] == 0, torch.zeros_like(extreme), sums[0] / sums[1])
    return Fit(step.masked_fill_(none, 0.0), codes.add_(zero).mul_((~none).float()))


def _descend(
    x: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, codes: torch.Tensor, sums: torch.Tensor, zero: int,
    rounds: int,
) -> None:  # fmt: skip
    """Update `codes` [group, columns] and `sums` [2, columns] of pull * codes and weight * codes**2."""
    every = (x, weight, pull, codes, sums)
    width = _DESCENT_COLUMNS * torch.get_num_threads() if x.device.type == "cpu" else x.shape[1]
    parts = [[t[:, i : i + width] for t in every] for i in range(0, x.shape[1], width)]
    moved = torch.cat([_descend_once(p[0], p[1], p[2], p[3], p[4], zero) for p in parts])
    # Columns without a change in a whole round have converged; about a fifth remain, then a twentieth.
    active = moved.nonzero().squeeze(1)
    if rounds > 1 and active.numel():
        some = [t.index_select(1, active) for t in every]
        _descend(some[0], some[1], some[2], some[3], some[4], zero, rounds - 1)
        codes.index_copy_(1, active, some[3])
        sums.index_copy_(1, active, some[4])


def _descend_once(
    x: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, codes: torch.Tensor, sums: torch.Tensor, zero: int
) -> torch.Tensor:
    """One round of `_descend`; returns float32 [columns], 1 where a code changed.

    Conditions are float32 tensors, because on a CPU PyTorch is several times slower with bools beside floats.
    """
    sumlx, suml2 = sums.unbind(0)
    slx, sl2, new, with_it, left, right, moved = torch.zeros(7, sumlx.shape[0], device=x.device).unbind(0)
    shares = pull * codes, (weight * codes).mul_(codes)
    rows = (x, weight, pull, codes, *shares)
    for value, w, wx, code, of_lx, of_l2 in zip(*(t.unbind(0) for t in rows), strict=True):
        # Sums without this weight, and its code with the step of the others.
        torch.sub(sumlx, of_lx, out=slx)
        torch.sub(suml2, of_l2, out=sl2)
        torch.div(torch.mul(value, sl2, out=left), torch.clamp(slx, min=_TINY, out=right), out=new)
        new.round_().clamp_(-zero, zero - 1)
        # Sums with the new code.
        torch.add(slx, torch.mul(wx, new, out=left), out=with_it)
        sl2.add_(torch.mul(w, new, out=left).mul_(new))
        torch.mul(with_it, with_it, out=left).mul_(suml2)
        torch.mul(sumlx, sumlx, out=right).mul_(sl2)
        moves = torch.minimum(slx, sl2, out=slx).gt_(0).mul_(left.gt_(right))
        moves.mul_(torch.sub(new, code, out=right).ne_(0))
        for now, then in ((sumlx, with_it), (suml2, sl2), (code, new)):
            now.lerp_(then, moves)  # exact, since `moves` is 0 or 1
        torch.maximum(moved, moves, out=moved)
    return moved


_AROUND = torch.arange(-9, 10) * 0.1 + 32
_RANGES = {
    "Q2_K": candidates(-0.5, 0.1, 16, 3), "Q4_K": candidates(-1.0, 0.1, 21, 15), "Q5_K": candidates(-0.5, 0.1, 16, 31),
    "Q6_K": torch.cat((_AROUND[9:10], _AROUND[:9], _AROUND[10:])),
}  # fmt: skip


def put_plain_k(store: GgmlBlockWriter, where: slice, chunk: torch.Tensor, kind: GgmlType) -> None:
    """Store blocks float32 [some, 256] of a K type."""
    columns = group_columns(chunk, kind.group)
    (_put_k_with_minimum if kind.has_min else _put_k_symmetric)(store, where, columns, kind)


def _put_k_with_minimum(store: GgmlBlockWriter, where: slice, x: torch.Tensor, kind: GgmlType) -> None:
    weight, top = x.abs(), kind.codes - 1
    if kind.bits > 2:
        # PyTorch's float32 square root may be off by one bit; rounded from float64 it is not.
        weight.add_(exact_quotient(total(x * x), float(kind.group)).double().sqrt_().float())
    fit = fit_with_minimum(x, weight, top, _RANGES[kind.name], absolute=kind.bits == 2)
    assert fit.minimum is not None
    some, largest = where.stop - where.start, (1 << kind.scale_bits) - 1
    d, scales = _as_integers(columns_to_blocks(fit.step, some, kind), largest)
    dmin, mins = _as_integers(columns_to_blocks(fit.minimum, some, kind), largest)
    step = blocks_to_columns(d.float().unsqueeze(1) * scales)
    codes = nearest_codes(x, step, kind, blocks_to_columns(dmin.float().unsqueeze(1) * mins))
    store.put_columns(where, torch.where(step == 0, fit.codes, codes))
    store.put_numbers(where, d, scales, dmin, mins)


def _as_integers(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale float16 [some], integers float32 [some, groups] of 0 .. top): the largest of a block becomes `top`."""
    largest = values.amax(1)
    none = largest <= 0
    largest.masked_fill_(none, 0.0)  # not -0
    inverse = exact_quotient(float(top), largest).masked_fill_(none, 0.0)
    integers = (values * inverse.unsqueeze(1)).round_().clamp_(0, top).nan_to_num_(0.0)
    return exact_quotient(largest, float(top)).half(), integers


def _put_k_symmetric(store: GgmlBlockWriter, where: slice, x: torch.Tensor, kind: GgmlType) -> None:
    some, end = where.stop - where.start, 1 << (kind.scale_bits - 1)
    if kind.bits == 3:
        fit = descend_symmetric(x, x * x, kind.zero)
    else:
        fit = fit_symmetric(x, x * x, kind.zero, _RANGES[kind.name])
    steps = columns_to_blocks(fit.step, some, kind)
    extreme = signed_absmax(steps, 1)
    inverse = exact_quotient(-float(end), extreme)
    # An empty block is zero bytes, which are -32 for Q3_K's integers.
    empty = extreme == 0 if kind.bits == 3 else extreme.abs() < MIN_MAGNITUDE
    scales = (steps * inverse.unsqueeze(1)).round_().clamp_(-end, end - 1)
    scales.masked_fill_(empty.unsqueeze(1), -end if kind.bits == 3 else 0)
    d = exact_quotient(1.0, inverse).masked_fill_(empty, 0.0).half()
    step = blocks_to_columns(d.float().unsqueeze(1) * scales)
    store.put_columns(where, torch.where(step == 0, fit.codes, nearest_codes(x, step, kind)))
    store.put_numbers(where, d, scales)


# The largest float32 below one half: adding one half itself to a fraction just below it may round up.
_BELOW_HALF = 0.49999997


def plain_blocks(weight: torch.Tensor, name: str) -> GgmlBlocks:
    """A weight in a ggml type, rounded to nearest.

    Args:
        weight: [out, in] of any float type and on any device; `in` fills whole blocks.
        name: of the type, `Q4_K`.

    Returns:
        Blocks on the weight's device. Raises NumericsError when weights are NaN or Inf, or too large for a float16 d.
    """
    kind = GGML_TYPES[name]
    out, columns = weight.shape
    assert columns % kind.block == 0
    store = GgmlBlockWriter((out, columns), kind, weight.device)
    put = put_plain_k if kind.is_k else _put_with_minimum if kind.has_min else _put_symmetric
    flat = weight.detach().reshape(-1, kind.block)

    def put_all(part: slice) -> None:
        # Q3_K's descent has many small steps, most of them on few groups.
        for where, chunk in block_row_chunks(flat, part, times=2 if name == "Q3_K" else 1):
            put(store, where, chunk, kind)

    parallel_map(put_all, even_parts(flat.shape[0], torch.get_num_threads()), weight.device)
    return store.blocks()


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step, or zero where it is zero."""
    return exact_quotient(1.0, step).masked_fill_(step == 0, 0.0).unsqueeze(1)


def _put_symmetric(store: GgmlBlockWriter, where: slice, chunk: torch.Tensor, kind: GgmlType) -> None:
    """The value of the largest magnitude gets the first code, which is one step further from zero than the last. In
    `Q8_0` both ends are 127 steps from zero, and ties round away from zero."""
    if kind.bits == 8:
        step = exact_quotient(torch.maximum(chunk.amax(1), -chunk.amin(1)).add_(0.0), 127.0)  # no -0
        chunk.mul_(_inverse(step))
        store.put_signed_rows(where, chunk.add_(chunk.new_full((), _BELOW_HALF).copysign(chunk)))
    else:
        step = exact_quotient(signed_absmax(chunk, 1), -float(kind.zero))
        store.put_rows(where, chunk.mul_(_inverse(step)).add_(kind.zero + 0.5))
    store.put_numbers(where, step)


def _put_with_minimum(store: GgmlBlockWriter, where: slice, chunk: torch.Tensor, kind: GgmlType) -> None:
    """Codes from the block's minimum to its maximum."""
    low = chunk.amin(1).add_(0.0)  # no -0
    step = exact_quotient(chunk.amax(1) - low, float(kind.codes - 1))
    store.put_rows(where, chunk.sub_(low.unsqueeze(1)).mul_(_inverse(step)).add_(0.5))
    store.put_numbers(where, step, dmin=low)
