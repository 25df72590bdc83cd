"""GPTQ: round a layer column by column and compensate each column's error in the columns that follow.

With D the change of the weight [out, in] and inputs x, the summed squared error of the layer's outputs is tr(D H D')
with the Hessian H = sum x x'. Written as H = M' diag(c) M, with M unit lower triangular, the error of a row is

    sum over columns i of  c_i (D_i + sum over j < i of M_ij D_j)^2

so in order, the best code for column i is the nearest one to its weight less `sum M_ij D_j`. This is GPTQ
(arXiv 2210.17323) without the inverse: its factor U of H^-1 = U'U is diag(c)^-1/2 M'^-1, and its updates of the
columns that follow add up to the same sum. In this form it is LDLQ of QuIP (arXiv 2307.13304).

Columns with large inputs come first (GPTQ's `act_order`): their errors cost most. Scales are chosen before any code,
so this order costs nothing when the layer runs. Rows are independent. It works on every type whose codes stand for
values on a scale: integers, small floats and ggml types (`codecs.base.Grid`). Why not descent: docs/adr/0011.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from auto_round.algorithms.base import BlockResult, BlockTask, LayerTask
from auto_round.algorithms.descent import damp, row_slices
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.base import Grid
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, NumericsError
from auto_round.schemes import SchemeFields
from auto_round.threads import parallel_map, split_torch_threads

DAMPING = 0.3  # in parts of the Hessian's mean diagonal
MIN_TOKENS = 32  # with fewer a Hessian says more about these tokens than about the layer

_BLOCK_COLUMNS = 64  # columns between two products with all that came before
_MICRO_BLOCK = 8  # columns between two products within those
_SCRIPT_LOCK = Lock()


@dataclass(frozen=True, kw_only=True, repr=False)
class GPTQConfig(SchemeFields):
    """Error feedback for every layer whose data type has codes. With `iters=0` it decides the codes; otherwise tuning
    starts from them where they are better than the nearest codes on held-out samples.

    `damping`, from 0.001 to 10, is added to the Hessian's diagonal, in parts of its mean. The paper has 0.01; with more
    the codes follow the calibration data less closely, and other text better (docs/adr/0011). The scheme's fields
    (`bits`, `group_size`, `sym`, ...) may be given too.
    """

    damping: float = DAMPING

    def __post_init__(self) -> None:
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not (number and 0.001 <= self.damping <= 10):
            raise ConfigError(f"damping={self.damping!r}: give a number from 0.001 to 10")


@dataclass(frozen=True, eq=False)
class HessianFactor:
    """How the errors of columns act on the columns that follow, within one band of input channels."""

    order: Tensor  # int64 [n], the columns in the order in which they are rounded
    matrix: Tensor  # M in that order, float32 [n, n]; what is on and above its diagonal is not used


HessianFactors = Mapping[int, HessianFactor]


def factorize_hessian(hessian: Tensor, damping: float) -> HessianFactor:
    """Order the columns of H, float32 [n, n], and factorize H = M' diag(c) M by Cholesky; `damping` as in `GPTQConfig`.
    Raises NumericsError when the damped Hessian holds NaN, or is not positive definite in float32."""
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise NumericsError("NaN or Inf in the Hessian of a layer's inputs")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    reversed_order = order.flip(0)
    matrix = damp(hessian.index_select(0, reversed_order).index_select(1, reversed_order), damping)
    try:
        with split_torch_threads(torch.get_num_threads()):  # how it adds up may depend on the number of threads
            # In reversed order, H = L L'; reversed back, L is upper triangular, and L' with ones on its diagonal is M.
            found = torch.linalg.cholesky(matrix).t().flip(0, 1)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"the Hessian of a layer's inputs is not positive definite with damping={damping}; use a larger one"
        ) from error
    return HessianFactor(order, found.div_(found.diagonal().unsqueeze(1).clone()))


def shared_hessian_factors(tasks: Sequence[LayerTask], damping: float, device: torch.device) -> HessianFactors:
    """Factors by the identity of the Hessian: layers with the same inputs share one."""
    hessians = {id(hessian): hessian for task in tasks for hessian in task.input_hessians or ()}
    found = parallel_map(partial(factorize_hessian, damping=damping), list(hessians.values()), device)
    return dict(zip(hessians, found, strict=True))


def gptq_codes(weight: Tensor, grid: Grid, factors: Sequence[HessianFactor]) -> Tensor:
    """The codes of a weight, uint8 [out, in], by error feedback, with a factor for each band of input channels."""
    codes, start = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), 0
    if isinstance(grid.zero, Tensor):  # zero points that differ become minima
        grid = replace(grid, zero=0, minimum=-grid.scale * grid.zero)
    for factor in factors:
        band = slice(start, start + factor.order.shape[0])
        round_rows = partial(_round_rows, codes, weight, grid, factor, band)
        parallel_map(round_rows, row_slices(weight), weight.device)
        start = band.stop
    return codes


@torch.no_grad()
def _round_rows(codes: Tensor, weight: Tensor, grid: Grid, factor: HessianFactor, band: slice, rows: slice) -> None:
    """Fill in the codes of some rows within a band of input channels, one column at a time."""
    groups = slice(band.start // grid.group, -(-band.stop // grid.group))
    group_of = (factor.order + band.start) // grid.group - groups.start
    own_group = group_of.tolist()
    # The columns in order, less their minima; they become -D.
    columns = weight[rows, band].float().t().contiguous().index_select(0, factor.order)
    if grid.minimum is not None:
        columns -= grid.minimum[rows, groups].t().contiguous().index_select(0, group_of)
    scale = grid.scale[rows, groups].t().contiguous()
    values, inverse, matrix = torch.empty_like(columns), scale.reciprocal(), factor.matrix
    low, high = float(grid.low - grid.zero), float(grid.high - grid.zero)
    round_block = _round_block
    if columns.device.type == "cpu":
        with _SCRIPT_LOCK:  # two threads that parse Python at once can make it fail
            round_block = _scripted()
    for start in range(0, len(columns), _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, len(columns))
        torch.addmm(columns[start:stop], matrix[start:stop, :start], columns[:start], out=values[start:stop])
        round_block(
            values, columns, matrix, scale, inverse, own_group, start, stop, _MICRO_BLOCK, low, high,
            grid.mantissa, grid.smallest,
        )  # fmt: skip
    codes[rows, band] = grid.codes(values).index_select(0, factor.order.argsort()).t()


def _round_block(
    values: Tensor, errors: Tensor, matrix: Tensor, scale: Tensor, inverse: Tensor, group_of: list[int], start: int,
    stop: int, micro_block: int, low: float, high: float, mantissa: int, smallest: float,
) -> None:  # fmt: skip
    """Columns `start` to `stop` of `values`, less the shares of errors before; `mantissa` -1 rounds to whole
    numbers."""
    for first in range(start, stop, micro_block):
        last = min(first + micro_block, stop)
        if first > start:
            values[first:last].addmm_(matrix[first:last, start:first], errors[start:first])
        for i in range(first, last):
            value, group = values[i], group_of[i]
            if i > first:
                value.addmv_(errors[first:i].t(), matrix[i, first:i])
            value.mul_(inverse[group])
            if mantissa < 0:
                value.round_().clamp_(low, high)
            else:
                # Adding and subtracting 2**(e + 23 - mantissa) rounds a value from 2**e on to the minifloat's step
                # there (`MinifloatType.nearest`); 0x7F800000 are the bits of a float32's exponent.
                size = value.clamp_(low, high).abs()
                bits = size.view(dtype=torch.int32).bitwise_and(0x7F800000)
                lift = bits.view(dtype=torch.float32).clamp(min=smallest).mul_(2.0 ** (23 - mantissa))
                value.copy_(size.add_(lift).sub_(lift).copysign_(value))
            errors[i].addcmul_(value, scale[group], value=-1.0)


@lru_cache(maxsize=1)
def _scripted() -> Callable[..., None]:
    """`_round_block` without Python between its operations, for which layers rounded side by side would wait."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favor of compilers, which need one to be installed
            return cast("Callable[..., None]", torch.jit.script(_round_block))
    except (RuntimeError, AttributeError, OSError):  # this Python or PyTorch does not have it
        return _round_block


def feedback_start(
    task: LayerTask, optimized: bool, scale_dtype: torch.dtype, damping: float, known: HessianFactors
) -> tuple[Any, Tensor | None]:
    """(scales of a layer before any tuning, codes uint8 [out, in] by error feedback or None without a Hessian). Later
    columns compensate what scales do badly, so a quick search of them is enough where there is feedback."""
    codec, feedback = task.codec, task.input_hessians is not None
    start = task.start(optimized, scale_dtype, quick=feedback)
    if not feedback:
        return start, None
    factors = [known.get(id(hessian)) or factorize_hessian(hessian, damping) for hessian in task.input_hessians or ()]
    grid = codec.grid(start, (task.weight.shape[0], task.weight.shape[1]))
    return start, gptq_codes(codec.limited(task.weight), grid, factors)


def gptq_layer(
    task: LayerTask, optimized: bool, scale_dtype: torch.dtype, damping: float = DAMPING,
    known: HessianFactors | None = None,
) -> QuantizedLayer:  # fmt: skip
    """Quantize one layer by error feedback; to the nearest codes where it has no Hessian, or its type no codes."""
    if task.input_hessians is None or not task.codec.uses_feedback(asked=True):
        return quantize_layer(task, optimized, scale_dtype)
    start, codes = feedback_start(task, optimized, scale_dtype, damping, known or {})
    assert codes is not None
    return task.quantized(task.codec.with_codes(start, codes))


class GPTQQuantizer:
    """Error feedback, layer by layer: for all layers with codes, or without a `config` for those in ggml types only,
    and others get the nearest codes. `optimized`: on scales of the weighted search, instead of plain ones."""

    needs_targets = False
    name = "GPTQ"

    def __init__(
        self, config: GPTQConfig | None = None, optimized: bool = True, scale_dtype: torch.dtype = torch.float16
    ) -> None:
        self.config, self.scale_dtype = config, scale_dtype
        self.optimized = self.needs_importance = optimized

    def needs_hessian(self, layer: LayerTask) -> bool:
        return layer.codec.uses_feedback(asked=self.config is not None)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        damping = DAMPING if self.config is None else self.config.damping
        known = shared_hessian_factors(task.layers, damping, task.device)
        quantize = lambda layer: gptq_layer(layer, self.optimized, self.scale_dtype, damping, known)  # noqa: E731
        return BlockResult(parallel_map(quantize, task.layers, task.device))
