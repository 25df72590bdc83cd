"""GPTQ: round a layer column by column and compensate each column's error in the columns that follow.

With D = W - w and inputs x, the summed squared error of the outputs is tr(D H D') with the Hessian H = sum x
x'. Written as H = M' diag(c) M, with M unit lower triangular, the error of a row is

    sum over columns i of  c_i (D_i + sum over j < i of M_ij D_j)^2

so in order, the best code for column i is the nearest one to its weight less `sum M_ij D_j` (GPTQ, arXiv
2210.17323; in this form LDLQ of QuIP, arXiv 2307.13304). One pass does more than several passes of coordinate
descent, because later columns can still compensate an error (docs/adr/0011). Columns with large inputs come
first (GPTQ's `act_order`): their errors cost most. Rows are independent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from threading import Lock
from typing import cast

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.descent import damp, row_slices
from auto_round.codecs.ggml.types import GgmlBlocks, GgmlType, code_limits, divisor_of
from auto_round.threads import parallel_map, split_torch_threads

HessianFactors = Mapping[int, "HessianFactor"]

_BLOCK_COLUMNS = 64  # columns between two products with all that came before
_MICRO_BLOCK = 8  # columns between two products within those
_SCRIPT_LOCK = Lock()


@dataclass(frozen=True, eq=False)
class HessianFactor:
    """What the columns of one band take over from each other.

    Attributes:
        order: int64 [n], the columns in the order in which they are rounded.
        matrix: M in that order, float32 [n, n]; what is on and above its diagonal is not used.
    """

    order: torch.Tensor
    matrix: torch.Tensor

    @cached_property
    def inverse_order(self) -> torch.Tensor:
        """int64 [n]: where each column lies in that order."""
        return self.order.argsort()


def factorize_hessian(hessian: torch.Tensor, damping: float) -> HessianFactor:
    """The feedback that minimises the error for A.

    Args:
        square: A, symmetric, float32 [n, n].
        damping: in parts of its mean diagonal, more than zero.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    reversed_order = order.flip(0)
    matrix = hessian.index_select(0, reversed_order).index_select(1, reversed_order)
    damp(matrix, damping)
    with split_torch_threads(torch.get_num_threads()):  # how it adds up may depend on the number of threads
        # Turned around, A = L L'; turned back, L is an upper triangle, and L' with ones on its diagonal M.
        found = torch.linalg.cholesky(matrix).t().flip(0, 1)
    return HessianFactor(order, found.div_(found.diagonal().unsqueeze(1).clone()))


def shared_hessian_factors(tasks: Sequence[LayerTask], damping: float, device: torch.device) -> HessianFactors:
    """The feedback of layers, by the identity of their products: layers that are fed the same share one."""
    hessians = {id(hessian): hessian for task in tasks for hessian in task.input_hessians or ()}
    found = parallel_map(partial(factorize_hessian, damping=damping), list(hessians.values()), device)
    return dict(zip(hessians, found, strict=True))


def gptq_blocks(weight: torch.Tensor, blocks: GgmlBlocks, bands: Sequence[HessianFactor]) -> GgmlBlocks:
    """The blocks with codes by feedback, on the steps and minima that they have.

    Args:
        weight: [out, in], any float dtype.
        blocks: stored numbers of it; their codes do not matter.
        bands: the feedback within each band of input channels, in order.
    """
    codes = torch.empty_like(blocks.codes)
    steps, minima = divisor_of(blocks.step()), blocks.minimum()
    start = 0
    for one in bands:
        band = slice(start, start + one.matrix.shape[0])
        groups = slice(band.start // blocks.kind.group, band.stop // blocks.kind.group)
        own = None if minima is None else minima[:, groups]
        put = partial(_write_codes, codes[:, band], weight[:, band], steps[:, groups], own, one, blocks.kind)
        parallel_map(put, row_slices(weight), weight.device)
        start = band.stop
    return replace(blocks, codes=codes)


def _write_codes(
    codes: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor, minima: torch.Tensor | None, factor: HessianFactor,
    kind: GgmlType, rows: slice,
) -> None:  # fmt: skip
    """The codes of some rows within a band: `codes` and `weight` [out, n], `steps` and `minima` [out, groups]."""
    group_of = factor.order // kind.group
    columns = weight[rows].float().t().contiguous().index_select(0, factor.order)
    if minima is not None:
        columns -= minima[rows].t().contiguous().index_select(0, group_of)
    step = steps[rows].t().contiguous()
    rounded = round_columns(columns, step, group_of.tolist(), factor.matrix, code_limits(kind))
    codes[rows] = rounded.add_(kind.zero).to(torch.uint8).index_select(0, factor.inverse_order).t()


@torch.no_grad()
def round_columns(
    columns: torch.Tensor, steps: torch.Tensor, group_of: list[int], matrix: torch.Tensor, limits: tuple[float, float]
) -> torch.Tensor:
    """Codes less the zero, float32 [in, rows], one input column after the other.

    Args:
        columns: the weights less their minima, float32 [in, rows], contiguous; overwritten with -D.
        steps: float32 [groups, rows], none zero.
        group_of: for each column the row of `steps` that is its own.
        matrix: M, float32 [in, in].
        limits: of the codes less the zero.
    """
    codes, inverse = torch.empty_like(columns), steps.reciprocal()
    round_block = _round_block
    if columns.device.type == "cpu":
        with _SCRIPT_LOCK:  # two threads that parse Python at once can make it fail
            round_block = _scripted()
    for start in range(0, len(group_of), _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, len(group_of))
        torch.addmm(columns[start:stop], matrix[start:stop, :start], columns[:start], out=codes[start:stop])
        round_block(codes, columns, matrix, steps, inverse, group_of, start, stop, _MICRO_BLOCK, limits[0], limits[1])
    return codes


def _round_block(
    codes: torch.Tensor, errors: torch.Tensor, matrix: torch.Tensor, steps: torch.Tensor, inverse: torch.Tensor,
    group_of: list[int], start: int, stop: int, micro_block: int, low: float, high: float,
) -> None:  # fmt: skip
    """Columns `start` to `stop`, whose codes hold the weights with the shares of all columns before `start`."""
    for first in range(start, stop, micro_block):
        last = min(first + micro_block, stop)
        if first > start:
            codes[first:last].addmm_(matrix[first:last, start:first], errors[start:first])
        for i in range(first, last):
            code, group = codes[i], group_of[i]
            if i > first:
                code.addmv_(errors[first:i].t(), matrix[i, first:i])
            code.mul_(inverse[group]).round_().clamp_(low, high)
            errors[i].addcmul_(code, steps[group], value=-1.0)


@lru_cache(maxsize=1)
def _scripted() -> Callable[..., None]:
    """`_round_block` without Python between its operations, of which each takes a few microseconds: layers that are
    rounded side by side would wait for each other's turn to run Python most of the time. The same operations as such.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is to be replaced by compilers, which need one to be installed
            return cast("Callable[..., None]", torch.jit.script(_round_block))
    except (RuntimeError, AttributeError, OSError):  # this Python or PyTorch has it no more
        return _round_block
