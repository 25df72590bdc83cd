"""Weights left in half precision on CPUs without instructions for it, where PyTorch's own products take several times
as long as they must. What is fast for how many rows, and why: docs/cpu-kernels.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from auto_round.inference.compute import cpu_multiplies
from auto_round.inference.kernels.cpu import DTYPES, loaded

# Rows for which our own product is faster than widening the weights to float32 for PyTorch's.
ROWS = 48
# Weights widened at once.
_PIECE = 1 << 22
HALVES = (torch.bfloat16, torch.float16)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU emulates products in `dtype`, and our code can do better."""
    return dtype in HALVES and not cpu_multiplies(dtype) and (dtype != torch.float16 or loaded()[1])


def dense_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x [..., in] times `weight` [out, in] transposed, both of one half precision. Returns [..., out] in it.

    Products and sums are in float32, rounded once; up to `ROWS` rows do not depend on each other, nor on threads.
    """
    out, inputs = weight.shape
    rows = x.numel() // inputs
    if rows > ROWS:
        return _in_float32(weight, x)
    weight, flat = weight.contiguous(), x.reshape(-1, inputs)
    flat = flat if flat.stride(1) == 1 or inputs == 1 else flat.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    failed = loaded()[0].dense(
        weight.data_ptr(), out, inputs, rows, flat.data_ptr(), flat.stride(0), y.data_ptr(), DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory to multiply with weights in half precision")
    return y


def _in_float32(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    wide, step = x.float(), max(_PIECE // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        piece = weight[start : start + step]
        y[..., start : start + len(piece)] = F.linear(wide, piece.float())
    return y


@torch.library.custom_op("auto_round::cpu_dense", mutates_args=(), schema="(Tensor weight, Tensor x) -> Tensor")
def _cpu_dense(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return dense_product(weight, x)


@_cpu_dense.register_fake
def _(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
