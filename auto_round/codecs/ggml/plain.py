"""Quantize to ggml types without importance, byte for byte as llama.cpp does without an imatrix.

The rules are `quantize_row_q4_0_ref` to `quantize_row_q6_K_ref` of ggml-quants.c, operation by operation in float32
(order of sums, quotients, ties), even where they are not optimal; `search.py` gives smaller errors. K types fit a step
(and minimum) to each group of 16 or 32, then integers to these:

| type | weight of an error | ranges tried (steps between the ends) | error |
|---|---|---|---|
| Q2_K | the weight's magnitude | 2.5 to 4.0 | magnitude |
| Q4_K, Q5_K | that, and the root mean square of the group | 14 to 16, 30.5 to 32 | square |
| Q6_K | the weight's square | 31.1 to 32.9 | square |
| Q3_K | the weight's square | none: coordinate descent over the codes | square |

They work on float32 [group, columns], one column per group, so that PyTorch vectorizes sums and extremes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType, block_slices
from auto_round.errors import NumericsError
from auto_round.threads import parallel_map

MIN_MAGNITUDE = 1e-15  # a group whose largest magnitude is below it has no step
_ROUNDS = 5  # of coordinate descent, at most
_DESCENT_COLUMNS = 1 << 14  # columns per thread of coordinate descent: a few rows stay in the innermost caches
_TINY = torch.finfo(torch.float32).tiny
# Columns are padded to a multiple of four vectors of 16 lanes, the widest: PyTorch sums four vectors side by side in
# row order, and left-over columns in another order.
_COLUMNS = 64
_ROWS_IN_ORDER = 16
# The largest float32 below one half: adding one half itself to a fraction just below it may round up.
_BELOW_HALF = 0.49999997


class OrderedSum:
    """A buffer [16 or 32, columns] whose columns are summed from the first row to the last, as ggml's loops do:
    PyTorch's sum over the first dimension adds only 16 rows in order."""

    def __init__(self, like: Tensor) -> None:
        self.values = torch.empty_like(like)
        self._first = self.values[:_ROWS_IN_ORDER]
        starts = range(_ROWS_IN_ORDER, like.shape[0], _ROWS_IN_ORDER)
        self._rest = [(self.values[s - 1], self.values[s - 1 : s + _ROWS_IN_ORDER]) for s in starts]

    def total(self, out: Tensor | None = None) -> Tensor:
        """[columns]: the sums. Overwrites 32 rows of terms."""
        out = torch.sum(self._first, 0) if out is None else torch.sum(self._first, 0, out=out)
        for spare, rows in self._rest:
            spare.copy_(out)
            torch.sum(rows, 0, out=out)
        return out


def total(terms: Tensor) -> Tensor:
    """[columns]: the sum of each column of `terms`, in the order of `OrderedSum`."""
    buffer = OrderedSum(terms)
    buffer.values.copy_(terms)
    return buffer.total()


def signed_absmax(values: Tensor, dim: int) -> Tensor:
    """The value of the largest magnitude along `dim` of a matrix: the first on a tie, never -0; NaN if one is."""
    high, low = values.amax(dim), values.amin(dim)
    found = torch.where(high >= -low, high, low).add_(0.0)
    tied = ((high == -low) & (high > 0)).nonzero().squeeze(1)
    if tied.numel():
        some = values.index_select(1 - dim, tied)
        first = (some.abs() == high[tied].unsqueeze(dim)).to(torch.uint8).argmax(dim, keepdim=True)
        found[tied] = some.gather(dim, first).squeeze(dim)
    return found


def exact_quotient(numerator: float | Tensor, divisor: float | Tensor) -> Tensor:
    """The correctly rounded quotient, also where PyTorch multiplies by the reciprocal of a Python number."""
    like = numerator if isinstance(numerator, Tensor) else divisor
    assert isinstance(like, Tensor)
    sides = [x if isinstance(x, Tensor) else like.new_full((), x) for x in (numerator, divisor)]
    return sides[0] / sides[1]


class Fit(NamedTuple):
    """Fit of each group."""

    step: Tensor  # float32 [columns]
    codes: Tensor  # float32 [group, columns], as stored; used where the stored step is zero
    minimum: Tensor | None = None  # float32 [columns], subtracted by readers, not negative


def candidates(first: float, delta: float, count: int, top: int) -> Tensor:
    """float32 [count]: `first + delta * i + top`, the ranges to try instead of `top` steps."""
    return (torch.arange(count, dtype=torch.float32) * delta + first) + top


def fit_with_minimum(x: Tensor, weight: Tensor, top: int, ranges: Tensor, absolute: bool = False) -> Fit:
    """Steps and minima of columns `x` with small errors, weighted by `weight`: magnitudes if `absolute`, else squares.
    Every candidate range proposes codes 0 to `top`, and weighted least squares through them a step and a minimum of at
    most zero; the pair with the smallest error is kept. Candidates start at the best minimum so far."""
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

    def find_codes(of: Tensor) -> None:
        torch.sub(x, of[4], out=codes).mul_(of[3]).round_().clamp_(0, top)

    def find_error(of: Tensor) -> None:
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


def fit_symmetric(x: Tensor, weight: Tensor, zero: int, ranges: Tensor) -> Fit:
    """Steps (of either sign) of columns `x` with small squared errors, weighted by `weight`. Each candidate range maps
    the value of the largest magnitude to its end; the least-squares step with the largest reduction of the error is
    kept."""
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


def descend_symmetric(x: Tensor, weight: Tensor, zero: int) -> Fit:
    """Steps by coordinate descent over the codes. Arguments as for `fit_symmetric`."""
    extreme = signed_absmax(x, 0)
    none = extreme.abs() < MIN_MAGNITUDE
    codes = x.mul(exact_quotient(-float(zero), extreme).masked_fill_(none, 0.0)).round_().clamp_(-zero, zero - 1)
    pull = weight * x
    sums = torch.stack((total(pull * codes), total((weight * codes).mul_(codes))))
    _descend((x, weight, pull, codes, sums), zero, _ROUNDS)
    step = torch.where(sums[1] == 0, torch.zeros_like(extreme), sums[0] / sums[1])
    return Fit(step.masked_fill_(none, 0.0), codes.add_(zero).mul_((~none).float()))


def _descend(state: Sequence[Tensor], zero: int, rounds: int) -> None:
    """Update codes and sums of (x, weight, pull, codes, sums of pull * codes and of weight * codes**2 [2, columns])."""
    x = state[0]
    width = _DESCENT_COLUMNS * torch.get_num_threads() if x.device.type == "cpu" else x.shape[1]
    parts = [[t[:, i : i + width] for t in state] for i in range(0, x.shape[1], width)]
    moved = torch.cat([_descend_once(zero, *part) for part in parts])
    # Columns without a change in a whole round have converged; about a fifth remain, then a twentieth.
    active = moved.nonzero().squeeze(1)
    if rounds > 1 and active.numel():
        some = [t.index_select(1, active) for t in state]
        _descend(some, zero, rounds - 1)
        for whole, part in zip(state[3:], some[3:], strict=True):
            whole.index_copy_(1, active, part)


def _descend_once(zero: int, x: Tensor, weight: Tensor, pull: Tensor, codes: Tensor, sums: Tensor) -> Tensor:
    """One round of `_descend`; returns float32 [columns], 1 where a code changed: bools are slow beside floats."""
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


Numbers = dict[str, Tensor]  # fields of GgmlBlocks for some blocks: d and dmin [some], scales and mins by group


def _plain_k(x: Tensor, kind: GgmlType, codes: Tensor) -> Numbers:
    """Blocks float32 [some, 256] of a K type."""
    groups, some = x.reshape(-1, kind.group), x.shape[0]
    groups = torch.nn.functional.pad(groups, (0, 0, 0, -groups.shape[0] % _COLUMNS))
    columns = groups.t().contiguous()
    found, numbers = (_k_with_minimum if kind.has_min else _k_symmetric)(columns, some, kind)
    target = codes.view(-1, kind.group)
    target.view(torch.int8).copy_(found.t()[: target.shape[0]].contiguous())
    return numbers


def _k_with_minimum(x: Tensor, some: int, kind: GgmlType) -> tuple[Tensor, Numbers]:
    weight, top = x.abs(), kind.codes - 1
    if kind.bits > 2:
        # PyTorch's float32 square root may be off by one bit; rounded from float64 it is not.
        weight.add_(exact_quotient(total(x * x), float(kind.group)).double().sqrt_().float())
    fit = fit_with_minimum(x, weight, top, _RANGES[kind.name], absolute=kind.bits == 2)
    assert fit.minimum is not None
    largest = (1 << kind.scale_bits) - 1
    d, scales = _as_integers(_by_block(fit.step, some, kind), largest)
    dmin, mins = _as_integers(_by_block(fit.minimum, some, kind), largest)
    step, minimum = _by_column(d, scales), _by_column(dmin, mins)
    nearest = (x + minimum).div_(step).round_().clamp_(0, top)
    return torch.where(step == 0, fit.codes, nearest), {"d": d, "scales": scales, "dmin": dmin, "mins": mins}


def _k_symmetric(x: Tensor, some: int, kind: GgmlType) -> tuple[Tensor, Numbers]:
    zero, end = kind.zero, 1 << (kind.scale_bits - 1)
    searched = kind.bits > 3
    fit = fit_symmetric(x, x * x, zero, _RANGES[kind.name]) if searched else descend_symmetric(x, x * x, zero)
    steps = _by_block(fit.step, some, kind)
    extreme = signed_absmax(steps, 1)
    inverse = exact_quotient(-float(end), extreme)
    # An empty block is zero bytes, which are -32 for Q3_K's integers.
    empty = extreme == 0 if kind.bits == 3 else extreme.abs() < MIN_MAGNITUDE
    scales = (steps * inverse.unsqueeze(1)).round_().clamp_(-end, end - 1)
    scales.masked_fill_(empty.unsqueeze(1), -end if kind.bits == 3 else 0)
    d = exact_quotient(1.0, inverse).masked_fill_(empty, 0.0).half()
    step = _by_column(d, scales)
    nearest = (x / step).round_().clamp_(-zero, kind.codes - 1 - zero).add_(zero)
    return torch.where(step == 0, fit.codes, nearest), {"d": d, "scales": scales}


def _by_block(columns: Tensor, some: int, kind: GgmlType) -> Tensor:
    """[columns], one value per group, as [some, groups of a block], without the padding."""
    groups = kind.block // kind.group
    return columns[: some * groups].view(some, groups)


def _by_column(scale: Tensor, integers: Tensor) -> Tensor:
    """[columns]: scale float16 [some] times integers [some, groups], zero-padded."""
    flat = (scale.float().unsqueeze(1) * integers).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _COLUMNS))


def _as_integers(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale float16 [some], integers float32 [some, groups] of 0 .. top): the largest of a block becomes `top`."""
    largest = values.amax(1)
    none = largest <= 0
    largest.masked_fill_(none, 0.0)  # not -0
    inverse = exact_quotient(float(top), largest).masked_fill_(none, 0.0)
    integers = (values * inverse.unsqueeze(1)).round_().clamp_(0, top).nan_to_num_(0.0)
    return exact_quotient(largest, float(top)).half(), integers


def _inverse(step: Tensor) -> Tensor:
    """1 / step, or zero where it is zero."""
    return exact_quotient(1.0, step).masked_fill_(step == 0, 0.0).unsqueeze(1)


def _plain_symmetric(x: Tensor, kind: GgmlType, codes: Tensor) -> Numbers:
    """The largest magnitude gets the first code; in `Q8_0` one of the two ends, and ties round away from zero."""
    if kind.bits == 8:
        step = exact_quotient(torch.maximum(x.amax(1), -x.amin(1)).add_(0.0), 127.0)  # no -0
        x.mul_(_inverse(step))
        codes.view(torch.int8).copy_(x.add_(x.new_full((), _BELOW_HALF).copysign(x)))
        codes.bitwise_xor_(0x80)
    else:
        step = exact_quotient(signed_absmax(x, 1), -float(kind.zero))
        codes.view(torch.int8).copy_(x.mul_(_inverse(step)).add_(kind.zero + 0.5))
        codes.clamp_(max=kind.codes - 1)
    return {"d": step}


def _plain_with_minimum(x: Tensor, kind: GgmlType, codes: Tensor) -> Numbers:
    """Codes from the block's minimum to its maximum."""
    low = x.amin(1).add_(0.0)  # no -0
    step = exact_quotient(x.amax(1) - low, float(kind.codes - 1))
    codes.view(torch.int8).copy_(x.sub_(low.unsqueeze(1)).mul_(_inverse(step)).add_(0.5))
    codes.clamp_(max=kind.codes - 1)
    return {"d": step, "dmin": low}


def plain_blocks(weight: Tensor, name: str) -> GgmlBlocks:
    """A weight [out, in] rounded to nearest in a ggml type. Raises NumericsError for what a float16 d cannot hold."""
    kind = GGML_TYPES[name]
    out, columns = weight.shape
    assert columns % kind.block == 0
    blocks = GgmlBlocks.empty(kind, out, columns, weight.device)
    targets = {field: t.view(-1, t.shape[1] * kind.block // columns) for field, t in blocks.tensors().items()}
    encode = _plain_k if kind.is_k else _plain_with_minimum if kind.has_min else _plain_symmetric
    flat = weight.detach().reshape(-1, kind.block)

    def encode_part(part: slice) -> None:
        buffer = None
        # Q3_K's descent has many small steps, most of them on few groups.
        for where in block_slices(part, kind.block, flat.device, times=2 if name == "Q3_K" else 1):
            some = flat[where]
            buffer = torch.empty_like(some, dtype=torch.float32) if buffer is None else buffer
            numbers = encode(buffer[: some.shape[0]].copy_(some), kind, targets["codes"][where])
            for field, values in numbers.items():
                targets[field][where] = values.view(some.shape[0], -1).to(targets[field].dtype)

    cuts = [flat.shape[0] * index // torch.get_num_threads() for index in range(torch.get_num_threads() + 1)]
    parallel_map(encode_part, [slice(*ends) for ends in pairwise(cuts) if ends[1] > ends[0]], weight.device)
    for half in (blocks.d, blocks.dmin):
        if half is None or bool(half.isfinite().all()):
            continue
        if bool(half.isnan().any()):
            raise NumericsError(f"the weights hold NaN or Inf, which {name} cannot store")
        raise NumericsError(f"the weights are too large for {name}: a block's scale exceeds float16's 65504")
    return blocks
