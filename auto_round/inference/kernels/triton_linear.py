"""Packed integer weights on a GPU: their layout, the sizes of the Triton programs and their launch, as opaque operators
for `torch.compile`. Why so: docs/triton.md, docs/adr/0016-triton-layout.md.

**Layout.** A word (int32) contains 32 / bits codes of one output, `width` inputs apart (16 or 32), and the words of a
row are contiguous over the outputs: the codes at position j of `width` consecutive words are `width` consecutive
inputs, and share a scale, as groups are multiples of 16. 3-bit codes use 4-bit fields.

**Programs.** One or two rows: vector products. Up to 511 rows: tiles that dequantize in registers. More: the weight is
dequantized to memory and multiplied by the vendor's library. With few columns, programs split the inputs, and a second
pass adds their sums in a fixed order. Sizes that affect the order of sums depend only on the shape and the kind of
device, so equal inputs give equal bits; only the others are tuned by timing.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from auto_round.inference.kernels import IntegerWeight, JoinedKernels, LayerSpec, LinearKernel
from auto_round.layouts.bit_stream import pack_rows, unpack_rows

_FIELD = {2: 2, 3: 4, 4: 4, 8: 8}
# Exponent bits of 2**23 in float32. An argument, not a constant: a GPU instruction has one constant operand.
EXPONENT = 0x4B000000
# Rows from which the weight is dequantized to memory once and multiplied by the vendor's library.
DENSE_ROWS = {torch.float32: 64, torch.float16: 512, torch.bfloat16: 512}
DENSE_NUMEL = 1 << 27  # weights dequantized to memory at once: 256 MB in half precision
VECTOR_ROWS = 2  # maximum number of rows of the vector program, which repeats its work for each; tiles pad rows to 16
_FORM = "int bits, int width, int group, int zero, int in_features, int out_features"


class Form(NamedTuple):
    """The packing of codes in words."""

    bits: int  # per field of a word
    width: int  # rows of words in a block
    group: int  # inputs that share a scale; 0 for all
    zero: int  # the common zero point of all groups, or -1 when they differ
    in_features: int
    out_features: int

    @property
    def per(self) -> int:
        """Codes per word."""
        return 32 // self.bits

    @property
    def block(self) -> int:
        return self.per * self.width

    @property
    def blocks(self) -> int:
        return -(-self.in_features // self.block)

    @property
    def padded(self) -> int:
        return -(-self.out_features // 32) * 32

    @property
    def slices(self) -> int:
        """Number of consecutive runs of `width` inputs that share a scale in every block."""
        group = self.group or self.block
        return next(n for n in range(self.per, 0, -1) if self.per % n == 0 and group % (n * self.width) == 0)

    def constants(self) -> dict[str, int]:
        """The compile-time arguments of the programs that describe the packing."""
        return {"BITS": self.bits, "PER": self.per, "WIDTH": self.width, "GROUP": self.group, "ZERO": self.zero}


def form_of(weight: IntegerWeight) -> Form:
    """The packing of a weight: blocks of 32 rows of words if the groups allow it without much padding, else of 16."""
    spec, bits = weight.spec, _FIELD[weight.spec.bits]
    group = 0 if spec.group_size >= spec.in_features else spec.group_size
    waste = -spec.in_features % (32 // bits * 32)
    width = 32 if group % 32 == 0 and waste * 20 <= spec.in_features else 16
    first = int(weight.zeros.flatten()[0])
    equal = bool((weight.zeros == first).all())
    return Form(bits, width, group, first if equal else -1, spec.in_features, spec.out_features)


def pack_words(codes: torch.Tensor, form: Form) -> torch.Tensor:
    """uint8 [out, in] to int32 [blocks * width, padded out]: word r of a block has at j its input j * width + r."""
    whole = codes.new_zeros(form.padded, form.blocks, form.per, form.width)
    whole.view(form.padded, -1)[: form.out_features, : form.in_features] = codes
    return pack_rows(whole.transpose(2, 3).reshape(form.padded, -1), form.bits).T.contiguous()


def unpack_words(words: torch.Tensor, form: Form) -> torch.Tensor:
    """The inverse of `pack_words`."""
    whole = unpack_rows(words.T, form.bits).view(form.padded, form.blocks, form.width, form.per)
    return whole.transpose(2, 3).reshape(form.padded, -1)[: form.out_features, : form.in_features].contiguous()


class TritonLinear(LinearKernel):
    """y = x W^T on cuda and xpu; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1), for tests."""

    words: torch.Tensor  # int32 [rows of words, padded out]
    scales: torch.Tensor  # [groups, padded out] in the file's dtype
    zeros: torch.Tensor | None  # uint8, likewise; None when all zero points are equal

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        form = self.form = form_of(weight)
        groups = -(-form.blocks * form.block // form.group) if form.group else 1

        def padded(values: torch.Tensor) -> torch.Tensor:  # [out, groups] to [groups of whole blocks, padded out]
            whole = values.new_zeros(groups, form.padded)
            whole[: values.shape[1], : form.out_features] = values.T
            return whole

        zeros = padded(weight.zeros) if form.zero < 0 else None
        self.hold(words=pack_words(weight.codes, form), scales=padded(weight.scales), zeros=zeros)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.group_size != spec.in_features and spec.group_size % 16:
            return f"needs groups of a multiple of 16 or whole rows, not {spec.group_size}"
        if spec.in_features % 2:
            return f"needs an even number of inputs, not {spec.in_features}"
        if spec.device == "cpu":
            return None if interpreting() else "runs on cuda and xpu (on a CPU only with TRITON_INTERPRET=1, for tests)"
        if not getattr(torch, spec.device).is_available():
            return f"no {spec.device} device was found"
        if spec.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "needs a GPU of compute capability 8.0 or later"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, dtype = _as_rows(x)
        y = triton_linear(rows, self.words, self.scales, self.zeros, *self.form)
        return y.view(*x.shape[:-1], self.spec.out_features).to(dtype)

    def codes(self) -> torch.Tensor:
        return unpack_words(self.words, self.form)

    @classmethod
    def join(cls, kernels: Sequence[LinearKernel]) -> JoinedKernels:
        """One launch for experts of one form; the kernels' tensors become views of the joined ones, without a copy."""
        form, *others = dict.fromkeys(kernel.form for kernel in kernels if isinstance(kernel, TritonLinear))
        if others:
            return super().join(kernels)

        def stacked(name: str) -> torch.Tensor:
            first = kernels[0].get_buffer(name)
            whole = first.new_empty(len(kernels), *first.shape)
            for one, kernel in zip(whole, kernels, strict=True):
                one.copy_(kernel.get_buffer(name))
                setattr(kernel, name, one)
            return whole

        words, scales, zeros = stacked("words"), stacked("scales"), stacked("zeros") if form.zero < 0 else None

        def run(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            rows, dtype = _as_rows(x)
            return triton_experts(rows, words, scales, zeros, offsets, *form).to(dtype)

        return run


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """`x` as [rows, in] in a supported dtype with an even row stride, and its original dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype not in DENSE_ROWS:
        rows = rows.float()
    if rows.stride(1) != 1 or rows.stride(0) % 2:
        rows = rows.contiguous()
    return rows, x.dtype


class TilePlan(NamedTuple):
    """How the program of tiles is launched."""

    rows: int
    columns: int
    warps: int
    stages: int  # blocks that are prefetched


def vector_plan(blocks: int, padded: int, units: int) -> tuple[int, int, int]:
    """Columns and warps of a vector program on `units` multiprocessors of 16 warps, and programs that split the blocks.
    32 columns are whole lines of 128 bytes; 16 when there would be far fewer programs than `units`. Blocks are split
    among the warps of a program, and then among programs, which needs a second launch to add the parts."""
    columns = 32 if padded // 32 * 4 >= units * 3 else 16
    parts = max(1, min(units // (padded // columns), blocks // 4, 16))
    programs = padded // columns * parts
    warps = next((w for w in (16, 8) if programs * w <= units * 16), 4)
    while warps > -(-blocks // parts):
        warps //= 2
    return columns, warps, parts


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
def _multiprocessors(device: torch.device) -> int:
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
    """The fastest of `plans` by `timer(call)`, cached by `key`; without a timer and a cached plan, the first."""
    if key not in _TUNED:
        if timer is None or len(plans) == 1:
            return plans[0]
        from triton.runtime.errors import OutOfResources

        times: list[tuple[float, int]] = []
        for index, plan in enumerate(plans):
            with contextlib.suppress(RuntimeError, OutOfResources):  # too many registers, or too much shared memory
                times.append((float(timer(functools.partial(run, plan))), index))
        _TUNED[key] = plans[min(times)[1]] if times else plans[0]
    return _TUNED[key]


def _current(device: torch.device) -> Any:
    """A context in which the tensor's device is current: Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def _launch(
    program: str, grid: tuple[int, ...], device: torch.device, arguments: Sequence[Any], warps: int, stages: int = 3,
    **constants: Any,
) -> None:  # fmt: skip
    from auto_round.inference.kernels import triton_programs

    options = {} if device.type == "cpu" else {"num_warps": warps, "num_stages": stages}
    with _current(device):
        getattr(triton_programs, program)[grid](*arguments, **constants, **options)


class Packed(NamedTuple):
    """words int32 [(experts,) rows of words, padded]; scales and zeros [(experts,) groups, padded]; their form."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    form: Form

    @property
    def experts(self) -> int:
        """Their number; 0 for one layer."""
        return len(self.words) if self.words.dim() == 3 else 0

    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.words, self.scales, self.scales if self.zeros is None else self.zeros

    def arguments(self, x: torch.Tensor, out: torch.Tensor, offsets: torch.Tensor | None, each: int) -> tuple[Any, ...]:
        """The arguments of a product. `each`: blocks of a part."""
        form, strides = self.form, (self.words.stride(0), self.scales.stride(0)) if self.experts else (0, 0)
        return (
            x, *self.pointers(), out, self.words if offsets is None else offsets, EXPONENT, 23 // form.bits * form.bits,
            len(x), form.out_features, form.padded, x.stride(0), form.in_features, form.blocks, each, *strides,
        )  # fmt: skip

    def constants(self) -> dict[str, int]:
        """The compile-time arguments of a product that describe the weight."""
        return {**self.form.constants(), "EXPERTS": self.experts, "PADDED": 1 << self.experts.bit_length()}


def _split(x: torch.Tensor, form: Form, parts: int) -> tuple[int, torch.Tensor]:
    """Blocks of each of at most `parts` parts, and an empty [parts, rows, out] for their sums."""
    each = -(-form.blocks // parts)
    parts = -(-form.blocks // each)
    dtype = torch.float32 if parts > 1 else x.dtype
    return each, x.new_empty((parts, len(x), form.out_features), dtype=dtype)


def run_vector(x: torch.Tensor, packed: Packed, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, out], for at most VECTOR_ROWS rows, or any number of rows sorted by expert."""
    form, rows, device = packed.form, len(x), x.device
    copies = rows if packed.experts else 1
    columns, warps, parts = vector_plan(form.blocks, form.padded, max(1, _multiprocessors(device) // copies))
    each, out = _split(x, form, parts)
    pairs, kind = x, 0
    if x.dtype != torch.float32:  # pairs of half-precision numbers as int32
        pairs = (x.clone() if x.storage_offset() % 2 else x).view(torch.int32)
        kind = 1 if x.dtype == torch.bfloat16 else 2
    # With this limit two programs of 8 warps fit on an NVIDIA multiprocessor.
    limit = {"maxnreg": 128} if device.type == "cuda" and torch.version.hip is None else {}
    _launch(
        "matvec", (-(-form.out_features // columns), len(out), copies), device,
        packed.arguments(pairs, out, offsets, each), warps, **packed.constants(), SLICES=form.slices,
        MASKED=form.in_features % form.block != 0 or each % warps != 0 or form.blocks % each != 0,
        ROWS=1 if packed.experts or rows == 1 else 2, WARPS=warps, LANES=128 // columns, COLUMNS=columns,
        KIND=kind, **limit,
    )  # fmt: skip
    return _sum_parts(out, x.dtype)


def run_tiles(x: torch.Tensor, packed: Packed, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, out] for any number of rows, of one layer or sorted by expert."""
    form, experts, rows, device = packed.form, packed.experts, len(x), x.device
    plans = tile_plans(-(-rows // experts) if experts else rows, form.bits, x.dtype)
    height = plans[0].rows
    tiles = rows // height + min(rows, experts + 1) if experts else -(-rows // height)
    parts = parts_for(tiles * -(-form.out_features // plans[0].columns), form.blocks, _multiprocessors(device))
    each, out = _split(x, form, parts)

    def run(plan: TilePlan) -> None:
        _launch(
            "matmul", (-(-form.out_features // plan.columns) * tiles, len(out)), device,
            (*packed.arguments(x, out, offsets, each), tiles), plan.warps, plan.stages, **packed.constants(),
            MASKED=form.in_features % form.block != 0, ROWS=plan.rows, COLUMNS=plan.columns,
            WIDEN=interpreting() and x.dtype == torch.bfloat16,
        )  # fmt: skip

    with _current(device):
        timer: Any = None  # in the interpreter, and while a CUDA graph is captured
        if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            from triton.testing import do_bench

            timer = functools.partial(do_bench, warmup=5, rep=20)
        run(tuned((device, x.dtype, form, experts, height, tiles, len(out)), plans, run, timer))
    return _sum_parts(out, x.dtype)


def run_dense(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """[rows, out] by dequantizing the weight to memory, a bounded number of columns at a time, and multiplying."""
    form, device = packed.form, x.device
    step = max(16, DENSE_NUMEL // form.in_features // 16 * 16)
    width = 32 if interpreting() else 128
    found = []
    for first in range(0, form.out_features, step):
        columns = min(step, form.out_features - first)
        weight = torch.empty(form.in_features, columns, dtype=x.dtype, device=device)
        arguments = (
            *packed.pointers(), weight, EXPONENT, 23 // form.bits * form.bits, columns, form.padded, first,
            form.in_features,
        )  # fmt: skip
        grid = (-(-columns // width), form.blocks * form.width // 16)
        _launch("dense", grid, device, arguments, 8, **form.constants(), COLUMNS=width)
        found.append(x @ weight)
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _sum_parts(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[parts, rows, columns] float32 to [rows, columns]."""
    if len(out) == 1:
        return out[0]
    total = torch.empty(out.shape[1:], dtype=dtype, device=out.device)
    arguments, grid = (out, total, total.numel()), (-(-total.numel() // 1024),)
    _launch("add_parts", grid, out.device, arguments, 4, PARTS=len(out), BLOCK=1024)
    return total


@torch.library.custom_op(
    "auto_round::triton_linear", mutates_args=(),
    schema=f"(Tensor x, Tensor words, Tensor scales, Tensor? zeros, {_FORM}) -> Tensor",
)  # fmt: skip
def triton_linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *sizes: int
) -> torch.Tensor:
    """x [rows, in] contiguous in its last dimension -> [rows, out]. `sizes`: the fields of `Form`."""
    packed, rows = Packed(words, scales, zeros, Form(*sizes)), x.shape[0]
    if rows == 0:
        return x.new_empty(0, packed.form.out_features)
    if rows <= VECTOR_ROWS:
        return run_vector(x, packed)
    return run_dense(x, packed) if rows >= DENSE_ROWS[x.dtype] else run_tiles(x, packed)


@torch.library.custom_op(
    "auto_round::triton_experts", mutates_args=(),
    schema=f"(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor offsets, {_FORM}) -> Tensor",
)  # fmt: skip
def triton_experts(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, offsets: torch.Tensor,
    *sizes: int,
) -> torch.Tensor:  # fmt: skip
    """x [rows, in] sorted by expert -> [rows, out]; offsets (see `JoinedKernels`) are read on the device only."""
    packed = Packed(words, scales, zeros, Form(*sizes))
    if x.shape[0] == 0:
        return x.new_empty(0, packed.form.out_features)
    run = run_vector if x.shape[0] <= max(4, packed.experts // 4) else run_tiles
    return run(x, packed, offsets)


@triton_linear.register_fake
@triton_experts.register_fake
def _shape(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rest[-1])
