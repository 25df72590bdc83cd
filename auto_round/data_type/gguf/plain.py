"""Weights to blocks of ggml without knowing which of them matter: what llama.cpp's quantizer does without an imatrix.

The rules are those of `quantize_row_q4_0_ref` to `quantize_row_q6_K_ref` in ggml-quants.c, operation by operation, so
that the bytes come out the same. They are kept even where one could do better (a block of `Q4_0` whose d is zero in
float16 keeps its codes): better is what the search is for.
"""

from __future__ import annotations

import torch

from auto_round.data_type.gguf.blocks import GgmlBlocks
from auto_round.data_type.gguf.columns import over, peak
from auto_round.data_type.gguf.pieces import block_pieces, even_parts
from auto_round.data_type.gguf.plain_k import put_plain_k
from auto_round.data_type.gguf.store import BlockStore
from auto_round.data_type.gguf.types import GGML_TYPES, GgmlType
from auto_round.threads import side_by_side

# The largest float32 below one half. Added to a value whose fraction is just less than half it does not reach the next
# integer, as one half itself may by rounding.
_BELOW_HALF = 0.49999997


def plain_blocks(weight: torch.Tensor, name: str) -> GgmlBlocks:
    """A weight in a ggml type, rounded to nearest.

    Args:
        weight: [out, in] of any float type and on any device; `in` fills whole blocks.
        name: of the type, `Q4_K`.

    Returns:
        Blocks on the weight's device. Beside them it needs memory for some pieces (`pieces.py`), and for a copy of the
        weight when that is not contiguous. Raises NumericsError when weights are NaN or Inf, or too large for the
        float16 factor of a block.
    """
    kind = GGML_TYPES[name]
    out, columns = weight.shape
    assert columns % kind.block == 0
    store = BlockStore((out, columns), kind, weight.device)
    put = put_plain_k if kind.is_k else _put_with_minimum if kind.has_min else _put_symmetric
    flat = weight.detach().reshape(-1, kind.block)

    def put_all(part: slice) -> None:
        # The descent of Q3_K goes through many small steps, most of them with a few of the groups.
        for where, piece in block_pieces(flat, part, times=2 if name == "Q3_K" else 1):
            put(store, where, piece, kind)

    side_by_side(put_all, even_parts(flat.shape[0], torch.get_num_threads()), weight.device)
    return store.blocks()


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step, or zero where it is zero."""
    return over(1.0, step).masked_fill_(step == 0, 0.0).unsqueeze(1)


def _put_symmetric(store: BlockStore, where: slice, piece: torch.Tensor, kind: GgmlType) -> None:
    """The value of the largest magnitude gets the first code, which is one step further from zero than the last; in
    `Q8_0` both ends are 127 steps away, and halves go away from zero."""
    if kind.bits == 8:
        step = over(torch.maximum(piece.amax(1), -piece.amin(1)).add_(0.0), 127.0)  # no -0
        piece.mul_(_inverse(step))
        store.put_signed_rows(where, piece.add_(piece.new_full((), _BELOW_HALF).copysign(piece)))
    else:
        step = over(peak(piece, 1), -float(kind.zero))
        store.put_rows(where, piece.mul_(_inverse(step)).add_(kind.zero + 0.5))
    store.put_numbers(where, step)


def _put_with_minimum(store: BlockStore, where: slice, piece: torch.Tensor, kind: GgmlType) -> None:
    """Codes from the block's minimum to its maximum."""
    low = piece.amin(1).add_(0.0)  # no -0
    step = over(piece.amax(1) - low, float(kind.codes - 1))
    store.put_rows(where, piece.sub_(low.unsqueeze(1)).mul_(_inverse(step)).add_(0.5))
    store.put_numbers(where, step, dmin=low)
