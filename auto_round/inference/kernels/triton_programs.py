# mypy: ignore-errors
# (functions under @triton.jit are in Triton's language, not Python)
"""The Triton programs for packed integer weights. Imported only where Triton is installed.

A code at bit `at` of a word, with `at + bits <= 23`, becomes a float by one logic instruction: the word, masked and
or-ed with 0x4B000000, is 2**23 + code * 2**at. Subtracting 2**23 + zero * 2**at is exact; the power of two is divided
out of the sum, not of each weight. Higher codes are shifted down together, as many as fit below bit 23 at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _floats(words, zero, exponent, place: tl.constexpr, BITS: tl.constexpr):
    """(code - zero) * 2**at in float32, of the code at position `place` of each word."""
    FIT: tl.constexpr = 23 // BITS
    at: tl.constexpr = place % FIT * BITS
    value = (words & (((1 << BITS) - 1) << at)) | exponent
    return value.to(tl.float32, bitcast=True) - (8388608.0 + zero * (1 << at))


@triton.jit
def _power(place: tl.constexpr, BITS: tl.constexpr):
    FIT: tl.constexpr = 23 // BITS
    return 1.0 / (1 << (place % FIT * BITS))


@triton.jit
def _two(x, row, x_stride, k, mask, KIND: tl.constexpr):
    """Inputs k and k + 1 (k is even) in float32. KIND: 0 for float32, 1 and 2 for pairs of bfloat16 and float16."""
    if KIND == 0:
        here = x + row * x_stride + k
        first, second = tl.load(here, mask=mask, other=0.0), tl.load(here + 1, mask=mask, other=0.0)
    else:
        pair = tl.load(x + row * x_stride + k // 2, mask=mask, other=0).to(tl.uint32, bitcast=True)
        if KIND == 1:
            first = (pair << 16).to(tl.float32, bitcast=True)
            second = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            first = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            second = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def matvec(
    x, words, scales, zeros, out, offsets, exponent, down, rows, columns, row_stride, x_stride, in_features, blocks,
    blocks_each, word_stride, scale_stride,
    BITS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    ZERO: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Product of few rows: out[part, row, column] over the blocks of one part, for COLUMNS columns. Axes of a tile:
    [row, warp, lane, column]. A warp processes a block at a time; its lanes cover LANES rows of words, 16 bytes of
    columns per lane, and exchange sums only at the end."""
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, None, None, :]
    live = row < rows
    if EXPERTS > 0:
        row = row + tl.program_id(2)
        index = tl.arange(0, PADDED)
        ends = tl.load(offsets + index + 1, mask=index < EXPERTS, other=2147483647)
        expert = tl.sum((ends <= tl.program_id(2)).to(tl.int32), axis=0)  # EXPERTS for rows without an expert
        live = row < tl.where(expert < EXPERTS, rows, 0)
        expert = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
        words += expert * word_stride
        scales += expert * scale_stride
        zeros += expert * scale_stride
    acc = tl.zeros((ROWS, WARPS, LANES, COLUMNS), tl.float32)
    last = tl.minimum((part + 1) * blocks_each, blocks)
    for start in tl.range(part * blocks_each, last, WARPS):
        block = start + warp
        inside = block < last
        if MASKED:
            block = tl.minimum(block, last - 1)
        here = words + (block * WIDTH + 2 * lane) * row_stride + column
        low, high = (), ()
        for step in tl.static_range(WIDTH // LANES):
            word = tl.load(here + (step // 2 * 2 * LANES + step % 2) * row_stride).to(tl.uint32, bitcast=True)
            low, high = low + (word,), high + (word >> down,)
        for few in tl.static_range(PER // SLICES):
            group = block * 0 + lane * 0
            if GROUP > 0:
                group += (block * (PER * WIDTH) + few * (SLICES * WIDTH)) // GROUP
            scale = tl.load(scales + group * row_stride + column).to(tl.float32)
            if ZERO < 0:
                zero = tl.load(zeros + group * row_stride + column).to(tl.float32)
            else:
                zero = ZERO * 1.0
            grouped = tl.zeros((ROWS, WARPS, LANES, COLUMNS), tl.float32)
            for slice in tl.static_range(SLICES):
                some = tl.zeros((ROWS, WARPS, LANES, COLUMNS), tl.float32)
                for pair in tl.static_range(WIDTH // LANES // 2):
                    k = block * (PER * WIDTH) + (few * SLICES + slice) * WIDTH + pair * 2 * LANES + 2 * lane
                    mask = live
                    if MASKED:
                        mask = live & inside & (k < in_features)
                    first, second = _two(x, row, x_stride, k, mask, KIND)
                    if few * SLICES + slice < 23 // BITS:
                        word, next_word = low[2 * pair], low[2 * pair + 1]
                    else:
                        word, next_word = high[2 * pair], high[2 * pair + 1]
                    some += _floats(word, zero, exponent, few * SLICES + slice, BITS) * first
                    some += _floats(next_word, zero, exponent, few * SLICES + slice, BITS) * second
                grouped += some * _power(few * SLICES + slice, BITS)
            acc += grouped * scale
    total = tl.sum(tl.sum(acc, axis=2), axis=1)
    row = tl.arange(0, ROWS)[:, None]
    if EXPERTS > 0:
        row = row + tl.program_id(2)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    place_out = out + (part * rows + row) * columns + column
    tl.store(place_out, total.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))


@triton.jit
def _weights(
    words, scales, zeros, turn, row_stride, column, known, exponent, down,
    BITS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Dequantize 16 rows of words: float32 [PER, 16, columns], and the input index of each, [PER, 16, 1]."""
    TURNS: tl.constexpr = WIDTH // 16
    first = turn // TURNS * (PER * WIDTH) + turn % TURNS * 16
    within = tl.arange(0, 16)[None, :, None]
    place = tl.arange(0, PER)[:, None, None]
    column, known = column[None, None, :], known[None, None, :]
    low = tl.load(words + (turn * 16 + within) * row_stride + column, mask=known, other=0)
    low = low.to(tl.uint32, bitcast=True)
    group = place * 0
    if GROUP > 0:
        group += (first + place * WIDTH) // GROUP
    scale = tl.load(scales + group * row_stride + column, mask=known, other=0.0).to(tl.float32)
    FIT: tl.constexpr = 23 // BITS
    at = (place % FIT) * BITS
    if ZERO < 0:
        zero = tl.load(zeros + group * row_stride + column, mask=known, other=0).to(tl.float32)
    else:
        zero = ZERO * 1.0
    code = tl.where(place < FIT, low, low >> down) & (((1 << BITS) - 1) << at).to(tl.uint32)
    power = (1 << at).to(tl.float32)
    value = (code | exponent.to(tl.uint32)).to(tl.float32, bitcast=True) - (8388608.0 + zero * power)
    return value * (scale / power), first + place * WIDTH + within


@triton.jit
def matmul(
    x, words, scales, zeros, out, offsets, exponent, down, rows, columns, row_stride, x_stride, in_features, blocks,
    blocks_each, word_stride, scale_stride, row_tiles,
    BITS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Product of many rows: a tile of out[part, row, column]; weights are rounded to the inputs' dtype."""
    part = tl.program_id(1)
    tile = tl.program_id(0) % row_tiles
    column = tl.program_id(0) // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    first_row, end = tile * ROWS, rows
    first, last = part * blocks_each, tl.minimum((part + 1) * blocks_each, blocks)
    if EXPERTS > 0:
        index = tl.arange(0, PADDED)
        starts = tl.load(offsets + index, mask=index <= EXPERTS, other=0)
        ends = tl.load(offsets + index + 1, mask=index <= EXPERTS, other=0)
        tiles = tl.cumsum((ends - starts + ROWS - 1) // ROWS, axis=0)
        expert = tl.sum((tiles <= tile).to(tl.int32), axis=0)
        if expert > EXPERTS:
            return
        before = tl.sum(tl.where(index == expert - 1, tiles, 0), axis=0)
        first_row = tl.sum(tl.where(index == expert, starts, 0), axis=0) + (tile - before) * ROWS
        end = tl.sum(tl.where(index == expert, ends, 0), axis=0)
        if expert == EXPERTS:  # rows of no expert: zeros
            last = first
        expert = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
        words += expert * word_stride
        scales += expert * scale_stride
        zeros += expert * scale_stride
    row = first_row + tl.arange(0, ROWS)
    live = row < end
    if EXPERTS > 0:  # rows of all tokens together may be many
        row = row.to(tl.int64)
    known = column < row_stride
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for turn in range(first * (WIDTH // 16), last * (WIDTH // 16)):
        weight, _ = _weights(
            words, scales, zeros, turn, row_stride, column, known, exponent, down, BITS, PER, WIDTH, GROUP, ZERO
        )
        # The same k, in a form that shows the compiler that 16 of them are consecutive.
        each = tl.arange(0, PER * 16)
        k = turn // (WIDTH // 16) * (PER * WIDTH) + turn % (WIDTH // 16) * 16 + each // 16 * WIDTH + each % 16
        mask = live[:, None]
        if MASKED:
            mask = mask & (k < in_features)[None, :]
        values = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        weight = tl.reshape(weight, (PER * 16, COLUMNS)).to(x.dtype.element_ty)
        if WIDEN:  # the interpreter stores bfloat16 as integers, and would multiply those
            values, weight = values.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(values, weight, acc, input_precision="ieee")
    place_out = out + (part * rows + row)[:, None] * columns + column[None, :]
    tl.store(place_out, acc.to(out.dtype.element_ty), mask=live[:, None] & (column < columns)[None, :])


@triton.jit
def add_parts(partial, out, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum, in order, of PARTS contiguous float32 arrays of `numel` numbers."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * numel + index, mask=index < numel, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < numel)


@triton.jit
def dense(
    words, scales, zeros, out, exponent, down, columns, row_stride, first_column, in_features,
    BITS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Dequantize to memory: out[k, column] for 16 rows of words and `columns` columns from `first_column`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    weight, k = _weights(
        words, scales, zeros, tl.program_id(1), row_stride, first_column + column, known, exponent, down, BITS, PER,
        WIDTH, GROUP, ZERO,
    )  # fmt: skip
    place_out = out + k.to(tl.int64) * columns + column[None, None, :]
    tl.store(place_out, weight.to(out.dtype.element_ty), mask=known[None, None, :] & (k < in_features))
