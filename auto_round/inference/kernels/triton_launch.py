"""Choose the sizes of the Triton programs of a product and launch them, as opaque operators for `torch.compile`.

Sizes that affect the order of sums depend only on the shape and the kind of device, so equal inputs give equal bits on
equal devices. Only the others are tuned by timing: columns of a tile, warps and stages.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# Exponent bits of 2**23 in float32. An argument, not a constant: a GPU instruction has one constant operand.
EXPONENT = 0x4B000000
# Rows from which the weight is dequantized to memory once and multiplied by the vendor's library.
DENSE_ROWS = {torch.float32: 64, torch.float16: 512, torch.bfloat16: 512}
# Weights dequantized to memory at once: 256 MB in half precision.
DENSE_NUMEL = 1 << 27
# Maximum number of rows of the vector program, which repeats its work for each; tiles pad rows to 16.
VECTOR_ROWS = 2


class Form(NamedTuple):
    """The packing of codes in words; see `triton_linear.pack_words`.

    Attributes:
        bits: per field of a word.
        width: rows of words in a block.
        group: inputs that share a scale; 0 for all.
        zero: the common zero point of all groups, or -1 when they differ.
    """

    bits: int
    width: int
    group: int
    zero: int
    in_features: int
    out_features: int

    @property
    def per(self) -> int:
        """Codes per word."""
        return 32 // self.bits

    @property
    def block(self) -> int:
        """Inputs per block."""
        return self.per * self.width

    @property
    def blocks(self) -> int:
        return -(-self.in_features // self.block)

    @property
    def slices(self) -> int:
        """Number of consecutive runs of `width` inputs that share a scale in every block."""
        group = self.group or self.block
        return next(n for n in range(self.per, 0, -1) if self.per % n == 0 and group % (n * self.width) == 0)

    def constants(self) -> dict[str, int]:
        """The compile-time arguments of the programs that describe the packing."""
        return {"BITS": self.bits, "PER": self.per, "WIDTH": self.width, "GROUP": self.group, "ZERO": self.zero}


class VectorPlan(NamedTuple):
    """columns: per program; warps: per program, each processes one block at a time; parts: programs that split the
    blocks."""

    columns: int
    warps: int
    parts: int


class TilePlan(NamedTuple):
    """rows, columns, warps: per tile; stages: blocks that are prefetched."""

    rows: int
    columns: int
    warps: int
    stages: int


def vector_plan(blocks: int, padded: int, units: int) -> VectorPlan:
    """The plan of the vector program for `blocks` blocks and `padded` columns on `units` multiprocessors.

    32 columns per program are whole lines of 128 bytes; 16 when there would be far fewer programs than `units`. Blocks
    are split among the warps of a program, and then among programs, which needs a second launch to add the parts. A
    multiprocessor holds 16 warps; warps per program are chosen such that all programs run at once.
    """
    columns = 32 if padded // 32 * 4 >= units * 3 else 16
    parts = max(1, min(units // (padded // columns), blocks // 4, 16))
    each = -(-blocks // parts)
    programs = padded // columns * parts
    warps = next((w for w in (16, 8) if programs * w <= units * 16), 4)
    while warps > each:
        warps //= 2
    return VectorPlan(columns, warps, parts)


def tile_plans(rows: int, bits: int, dtype: torch.dtype) -> list[TilePlan]:
    """Candidate plans; the first is used without timing. Tall tiles use the large matrix instructions."""
    if dtype == torch.float32:
        return [TilePlan(16, 32, 4, 2)]
    wide = 64 if bits == 2 else 128
    if rows <= 32:
        height = 16 if rows <= 16 else 32
        plans = [TilePlan(height, 64, 4, 4), TilePlan(height, 64, 4, 3), TilePlan(height, 32, 4, 4)]
        return plans[2:] if bits == 2 and height == 32 else plans  # 2 bits, 32 x 64: not enough registers
    if rows <= 64:
        return [TilePlan(64, wide, 8, 3), TilePlan(64, 64, 4, 3), TilePlan(64, wide, 4, 2)]
    plans = [TilePlan(128, wide, 8, 3), TilePlan(128, wide, 8, 2), TilePlan(128, 64, 4, 3)]
    return plans[1:2] if bits == 2 else plans  # 2 bits: 256 inputs per tile, shared memory for two stages


def parts_for(tiles: int, blocks: int, units: int) -> int:
    """Number of programs that split the blocks of a tile, above 1 when there are too few tiles for the device."""
    return max(1, min(units // max(tiles, 1), blocks // 2, 16))


@functools.lru_cache(maxsize=32)
def _parallel_programs(device: torch.device) -> int:
    """Number of multiprocessors of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(getattr(torch.xpu.get_device_properties(device), "gpu_subslice_count", 32))
    return 2


def interpreting() -> bool:
    """Whether Triton runs its programs in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


_TUNED: dict[tuple[Any, ...], TilePlan] = {}


def tuned(key: tuple[Any, ...], plans: Sequence[TilePlan], run: Callable[[TilePlan], object], timer: Any) -> TilePlan:
    """The fastest of `plans` by `timer(call)`, cached by `key`; without a timer and a cached plan, the first.

    Plans that need more registers or shared memory than the device has are skipped.
    """
    if key not in _TUNED:
        if timer is None or len(plans) == 1:
            return plans[0]
        times: list[tuple[float, int]] = []
        for index, plan in enumerate(plans):
            with contextlib.suppress(RuntimeError, _out_of_resources()):
                times.append((float(timer(functools.partial(run, plan))), index))
        _TUNED[key] = plans[min(times)[1]] if times else plans[0]
    return _TUNED[key]


def _out_of_resources() -> type[BaseException]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _timer(device: torch.device) -> Any:
    """Triton's benchmark function; None in the interpreter and during capture of a CUDA graph."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    from triton.testing import do_bench

    return functools.partial(do_bench, warmup=5, rep=20)


def _device_guard(device: torch.device) -> Any:
    """A context in which the tensor's device is current: Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def _options(device: torch.device, warps: int, stages: int = 3) -> dict[str, int]:
    return {} if device.type == "cpu" else {"num_warps": warps, "num_stages": stages}


def _registers(device: torch.device) -> dict[str, int]:
    """A register limit with which two programs of 8 warps fit on an NVIDIA multiprocessor."""
    return {"maxnreg": 128} if device.type == "cuda" and torch.version.hip is None else {}


def _high_code_shift(bits: int) -> int:
    return 23 // bits * bits


def _as_int32_pairs(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` with pairs of half-precision numbers viewed as int32, and the vector program's code of its dtype."""
    if x.dtype == torch.float32:
        return x, 0
    if x.storage_offset() % 2:
        x = x.clone()
    return x.view(torch.int32), 1 if x.dtype == torch.bfloat16 else 2


class Packed(NamedTuple):
    """words int32 [(experts,) rows of words, padded]; scales and zeros [(experts,) groups, padded]."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @property
    def padded(self) -> int:
        return int(self.words.shape[-1])

    def strides(self) -> tuple[int, int]:
        """Strides between experts, of words and of scales."""
        return (int(self.words.stride(0)), int(self.scales.stride(0))) if self.words.dim() == 3 else (0, 0)

    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments `words, scales, zeros` of the programs."""
        return self.words, self.scales, self.scales if self.zeros is None else self.zeros


def run_vector(x: torch.Tensor, packed: Packed, form: Form, offsets: torch.Tensor | None, experts: int) -> torch.Tensor:
    """[rows, out], for at most VECTOR_ROWS rows, or any number of rows sorted by expert."""
    from auto_round.inference.kernels import triton_programs as programs

    rows = x.shape[0]
    copies = rows if experts else 1
    plan = vector_plan(form.blocks, packed.padded, max(1, _parallel_programs(x.device) // copies))
    each = -(-form.blocks // plan.parts)
    parts = -(-form.blocks // each)
    masked = form.in_features % form.block != 0 or each % plan.warps != 0 or form.blocks % each != 0
    pairs, kind = _as_int32_pairs(x)
    out = x.new_empty((parts, rows, form.out_features), dtype=torch.float32 if parts > 1 else x.dtype)
    grid = (-(-form.out_features // plan.columns), parts, copies)
    with _device_guard(x.device):
        programs.matvec[grid](
            pairs, *packed.pointers(), out, packed.words if offsets is None else offsets, EXPONENT,
            _high_code_shift(form.bits), rows, form.out_features, packed.padded, pairs.stride(0), form.in_features,
            form.blocks, each, *packed.strides(), **form.constants(),
            SLICES=form.slices, MASKED=masked, ROWS=1 if experts or rows == 1 else 2, WARPS=plan.warps,
            LANES=128 // plan.columns, COLUMNS=plan.columns, KIND=kind, EXPERTS=experts,
            PADDED=_power_of_two(experts + 1), **_options(x.device, plan.warps), **_registers(x.device),
        )  # fmt: skip
    return _sum_parts(out, x.dtype)


def run_tiles(x: torch.Tensor, packed: Packed, form: Form, offsets: torch.Tensor | None, experts: int) -> torch.Tensor:
    """[rows, out] for any number of rows, of one layer or sorted by expert."""
    from auto_round.inference.kernels import triton_programs as programs

    rows, units = x.shape[0], _parallel_programs(x.device)
    plans = tile_plans(-(-rows // experts) if experts else rows, form.bits, x.dtype)
    height = plans[0].rows
    tiles = rows // height + min(rows, experts + 1) if experts else -(-rows // height)
    parts = parts_for(tiles * -(-form.out_features // plans[0].columns), form.blocks, units)
    each = -(-form.blocks // parts)
    parts = -(-form.blocks // each)
    out = x.new_empty((parts, rows, form.out_features), dtype=torch.float32 if parts > 1 else x.dtype)

    def run(plan: TilePlan) -> None:
        grid = (-(-form.out_features // plan.columns) * tiles, parts)
        programs.matmul[grid](
            x, *packed.pointers(), out, packed.words if offsets is None else offsets, EXPONENT,
            _high_code_shift(form.bits), rows, form.out_features, packed.padded, x.stride(0), form.in_features,
            form.blocks, each, tiles, *packed.strides(), **form.constants(),
            MASKED=form.in_features % form.block != 0, ROWS=plan.rows, COLUMNS=plan.columns,
            WIDEN=interpreting() and x.dtype == torch.bfloat16, EXPERTS=experts, PADDED=_power_of_two(experts + 1),
            **_options(x.device, plan.warps, plan.stages),
        )  # fmt: skip

    with _device_guard(x.device):
        key = (x.device, x.dtype, form, experts, height, tiles, parts)
        run(tuned(key, plans, run, _timer(x.device)))
    return _sum_parts(out, x.dtype)


def run_dense(x: torch.Tensor, packed: Packed, form: Form) -> torch.Tensor:
    """[rows, out] by dequantizing the weight to memory, a bounded number of columns at a time, and multiplying."""
    step = max(16, DENSE_NUMEL // form.in_features // 16 * 16)
    if step >= form.out_features:
        return x @ weight_columns(packed, form, 0, form.out_features, x.dtype)
    out = x.new_empty(x.shape[0], form.out_features)
    for first in range(0, form.out_features, step):
        last = min(first + step, form.out_features)
        out[:, first:last] = x @ weight_columns(packed, form, first, last, x.dtype)
    return out


def weight_columns(packed: Packed, form: Form, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns `first` to `last` of the transposed weight, [in, last - first]."""
    from auto_round.inference.kernels import triton_programs as programs

    out = torch.empty(form.in_features, last - first, dtype=dtype, device=packed.words.device)
    width = 32 if interpreting() else 128
    with _device_guard(out.device):
        programs.dense[(-(-(last - first) // width), form.blocks * form.width // 16)](
            *packed.pointers(), out, EXPONENT, _high_code_shift(form.bits), last - first, packed.padded, first,
            form.in_features, **form.constants(), COLUMNS=width, **_options(out.device, 8),
        )  # fmt: skip
    return out


def _sum_parts(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[parts, rows, columns] float32 to [rows, columns]."""
    if out.shape[0] == 1:
        return out[0]
    from auto_round.inference.kernels import triton_programs as programs

    total = torch.empty(out.shape[1:], dtype=dtype, device=out.device)
    with _device_guard(out.device):
        programs.add_parts[(-(-total.numel() // 1024),)](
            out, total, total.numel(), PARTS=out.shape[0], BLOCK=1024, **_options(out.device, 4)
        )
    return total


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


_FORM = "int bits, int width, int group, int zero, int in_features, int out_features"


@torch.library.custom_op(
    "auto_round::triton_linear", mutates_args=(),
    schema=f"(Tensor x, Tensor words, Tensor scales, Tensor? zeros, {_FORM}) -> Tensor",
)  # fmt: skip
def triton_linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *sizes: int
) -> torch.Tensor:
    """x [rows, in] contiguous in its last dimension -> [rows, out]. `sizes`: the fields of `Form`."""
    packed, form, rows = Packed(words, scales, zeros), Form(*sizes), x.shape[0]
    if rows == 0:
        return x.new_empty(0, form.out_features)
    if rows <= VECTOR_ROWS:
        return run_vector(x, packed, form, None, 0)
    return run_dense(x, packed, form) if rows >= DENSE_ROWS[x.dtype] else run_tiles(x, packed, form, None, 0)


@torch.library.custom_op(
    "auto_round::triton_experts", mutates_args=(),
    schema=f"(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor offsets, {_FORM}) -> Tensor",
)  # fmt: skip
def triton_experts(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, offsets: torch.Tensor,
    *sizes: int,
) -> torch.Tensor:  # fmt: skip
    """x [rows, in] sorted by expert -> [rows, out]; offsets int32 [experts + 2], see `JoinedKernels`. They are read on
    the device only."""
    packed, form, experts = Packed(words, scales, zeros), Form(*sizes), words.shape[0]
    if x.shape[0] == 0:
        return x.new_empty(0, form.out_features)
    run = run_vector if x.shape[0] <= max(4, experts // 4) else run_tiles
    return run(x, packed, form, offsets, experts)


@triton_linear.register_fake
@triton_experts.register_fake
def _shape(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rest[-1])
