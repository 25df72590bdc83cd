"""The K types without importance: a fit for each group of 16 or 32, then integers for their steps and minima.

| type | how much an error counts | ranges tried (steps between the ends) | error |
|---|---|---|---|
| Q2_K | the weight's magnitude | 2.5 to 4.0 | magnitude |
| Q4_K, Q5_K | that, and the root mean square of the group | 14 to 16, 30.5 to 32 | square |
| Q6_K | the weight's square | 31.1 to 32.9 | square |
| Q3_K | the weight's square | none: descent over the codes | square |

From `quantize_row_q2_K_ref` to `quantize_row_q6_K_ref` in ggml-quants.c.
"""

from __future__ import annotations

import torch

from auto_round.data_type.gguf.columns import nearest_codes, over, peak, total
from auto_round.data_type.gguf.fits import SMALLEST, candidates, descend_symmetric, fit_symmetric, fit_with_minimum
from auto_round.data_type.gguf.pieces import group_columns, of_blocks, to_columns
from auto_round.data_type.gguf.store import BlockStore
from auto_round.data_type.gguf.types import GgmlType

_AROUND = torch.arange(-9, 10) * 0.1 + 32
_RANGES = {
    "Q2_K": candidates(-0.5, 0.1, 16, 3), "Q4_K": candidates(-1.0, 0.1, 21, 15), "Q5_K": candidates(-0.5, 0.1, 16, 31),
    "Q6_K": torch.cat((_AROUND[9:10], _AROUND[:9], _AROUND[10:])),
}  # fmt: skip


def put_plain_k(store: BlockStore, where: slice, piece: torch.Tensor, kind: GgmlType) -> None:
    """Store blocks float32 [some, 256] of a K type."""
    columns = group_columns(piece, kind.group)
    (_put_with_minimum if kind.has_min else _put_symmetric)(store, where, columns, kind)


def _put_with_minimum(store: BlockStore, where: slice, x: torch.Tensor, kind: GgmlType) -> None:
    weight, top = x.abs(), kind.codes - 1
    if kind.bits > 2:
        # PyTorch's float32 square root may be off by one bit; rounded from float64 it is not.
        weight.add_(over(total(x * x), float(kind.group)).double().sqrt_().float())
    fit = fit_with_minimum(x, weight, top, _RANGES[kind.name], absolute=kind.bits == 2)
    assert fit.minimum is not None
    some, largest = where.stop - where.start, (1 << kind.scale_bits) - 1
    d, scales = _as_integers(of_blocks(fit.step, some, kind), largest)
    dmin, mins = _as_integers(of_blocks(fit.minimum, some, kind), largest)
    step = to_columns(d.float().unsqueeze(1) * scales)
    codes = nearest_codes(x, step, kind, to_columns(dmin.float().unsqueeze(1) * mins))
    store.put_columns(where, torch.where(step == 0, fit.codes, codes))
    store.put_numbers(where, d, scales, dmin, mins)


def _as_integers(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor float16 [some], float32 [some, groups] of 0 .. top): the largest of a block becomes `top`."""
    largest = values.amax(1)
    none = largest <= 0
    largest.masked_fill_(none, 0.0)  # not -0
    inverse = over(float(top), largest).masked_fill_(none, 0.0)
    integers = (values * inverse.unsqueeze(1)).round_().clamp_(0, top).nan_to_num_(0.0)
    return over(largest, float(top)).half(), integers


def _put_symmetric(store: BlockStore, where: slice, x: torch.Tensor, kind: GgmlType) -> None:
    some, end = where.stop - where.start, 1 << (kind.scale_bits - 1)
    if kind.bits == 3:
        fit = descend_symmetric(x, x * x, kind.zero)
    else:
        fit = fit_symmetric(x, x * x, kind.zero, _RANGES[kind.name])
    steps = of_blocks(fit.step, some, kind)
    far = peak(steps, 1)
    inverse = over(-float(end), far)
    # An empty block is zero bytes; those of Q3_K's integers stand for -32.
    empty = far == 0 if kind.bits == 3 else far.abs() < SMALLEST
    scales = (steps * inverse.unsqueeze(1)).round_().clamp_(-end, end - 1)
    scales.masked_fill_(empty.unsqueeze(1), -end if kind.bits == 3 else 0)
    d = over(1.0, inverse).masked_fill_(empty, 0.0).half()
    step = to_columns(d.float().unsqueeze(1) * scales)
    store.put_columns(where, torch.where(step == 0, fit.codes, nearest_codes(x, step, kind)))
    store.put_numbers(where, d, scales)
