"""CPU kernels in C: packed integer weights, and dense half-precision weights on CPUs that are slow in them.

`CpuKernel` runs 2- to 8-bit layers with integer products. `DenseLinear` runs the layers that a checkpoint leaves
in half precision, mostly the head, on CPUs without instructions for it, where PyTorch's own products are several
times slower. How both work, and what is fast for how many rows: docs/cpu-kernels.md.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.inference.kernels.compiled import load
from auto_round.inference.linear import cpu_multiplies

SOURCES = tuple(Path(__file__).with_name(f"cpu_{name}") for name in ("linear.c", "dense.c", "common.h"))
# Columns that share a scale of the inputs, at most: `CHUNK` in the source, where the bound on sums depends on it.
CHUNK = 128
_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_P, _I, _Q = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "packed_size": (_Q, [_I, _Q, _Q, _I, _P, _I, _I]),
    "pack": (None, [_P, _I, _Q, _Q, _I, _P, _I, _I, _P, _P, _P, _I]),
    "unpack": (None, [_P, _P, _I]),
    "linear": (_I, [_P, _P, _Q, _P, _Q, _P, _I, _I]),
    "linear_one": (_I, [_P, _Q, _P, _Q, _P, _I, _I]),
    "dense": (_I, [_P, _Q, _Q, _Q, _P, _Q, _P, _I, _I]),
    "use_threads_of": (None, [_P]),
}


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The compiled code, or the reason why it is not here."""
    found = load(*SOURCES)
    if isinstance(found, str):
        return found
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.use_threads_of(_torch_threads())
    return found


def _torch_threads() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that PyTorch has loaded; GNU's and LLVM's both have it. A second
    runtime would start threads of its own, which wait for work by spinning, as PyTorch's do: each would take the cores
    from the other."""
    handles: list[str | None] = [None]
    lib = Path(torch.__file__).parent
    for folder in (lib / "lib", lib.with_name("torch.libs")):
        handles += sorted(str(path) for path in folder.glob("lib*omp*"))
    for handle in handles:
        try:
            # Only what is loaded already.
            mode = ctypes.DEFAULT_MODE if handle is None else os.RTLD_NOLOAD | os.RTLD_NOW
            return ctypes.cast(ctypes.CDLL(handle, mode=mode).GOMP_parallel, _P).value
        except (OSError, AttributeError):
            continue
    return None


class CpuKernel(LinearKernel):
    """Weights of 2, 3 (held as 4), 4 and 8 bits, any group size, symmetric or not.

    Inputs are rounded to 16-bit integers for each group of columns, at most 128: their error is at most 2**-16 of the
    largest of the group. Scales are exact, codes and zero points are, and so are the sums of a group. Results depend
    neither on the number of threads nor on how many rows are computed together.
    """

    packed: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        (lib, has_half), spec = loaded(), weight.spec
        starts = chunk_starts(spec.in_features, spec.group_size)
        group = (starts[:-1] // spec.group_size).long()
        scales, zeros = weight.scales[:, group].float().contiguous(), weight.zeros[:, group].contiguous()
        zero = int(zeros[0, 0])
        zero = zero if bool((zeros == zero).all()) else -1
        half = int(has_half and torch.equal(scales.half().float(), scales))
        sizes = (_BITS[spec.bits], spec.out_features, spec.in_features, len(starts) - 1, starts.data_ptr(), zero, half)
        packed = torch.empty(lib.packed_size(*sizes), dtype=torch.uint8)
        codes = weight.codes.contiguous()
        lib.pack(
            packed.data_ptr(), *sizes, codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), torch.get_num_threads()
        )
        self.register_buffer("packed", packed, persistent=False)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.device != "cpu":
            return f"runs on cpu, not {spec.device}"
        if spec.bits not in _BITS:
            return f"runs {', '.join(map(str, _BITS))} bits, not {spec.bits}"
        found = library()
        return found if isinstance(found, str) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.auto_round.cpu_linear([self.packed], x, [], self.spec.out_features)
        # Not through the operator: its dispatch costs as much as a small layer. `_buffers`: so does `__getattr__`.
        packed = self._buffers["packed"]
        assert packed is not None
        return multiply((packed,), x, (), self.spec.out_features)

    def codes(self) -> torch.Tensor:
        codes = torch.empty(self.spec.out_features, self.spec.in_features, dtype=torch.uint8)
        loaded()[0].unpack(self.packed.data_ptr(), codes.data_ptr(), torch.get_num_threads())
        return codes

    @classmethod
    def grouped(cls, kernels: Sequence[LinearKernel], x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        packed = [kernel.get_buffer("packed") for kernel in kernels]
        out = kernels[0].spec.out_features
        if torch.compiler.is_compiling():
            return torch.ops.auto_round.cpu_linear(packed, x, list(counts), out)
        return multiply(packed, x, counts, out)


def chunk_starts(in_features: int, group_size: int) -> torch.Tensor:
    """int32 [chunks + 1]: where chunks begin, of at most `CHUNK` columns of one group, and `in_features` at the end."""
    found: list[int] = []
    for start in range(0, in_features, group_size):
        found += range(start, min(start + group_size, in_features), CHUNK)
    return torch.tensor([*found, in_features], dtype=torch.int32)


def multiply(packed: Sequence[torch.Tensor], x: torch.Tensor, counts: Sequence[int], out: int) -> torch.Tensor:
    """x [..., in] times the one weight in `packed`; with `counts`, rows of x [rows, in] sorted by weight. Returns
    [..., out] in the dtype of `x`."""
    lib, half = loaded()
    dtype = DTYPES.get(x.dtype)
    if dtype is None or (dtype == 2 and not half):
        return multiply(packed, x.float(), counts, out).to(x.dtype)
    # Called for every layer of every token: what is usual costs no call that is not needed.
    inputs = x.shape[-1]
    rows, flat, stride = x.numel() // inputs, x, inputs
    if not x.is_contiguous():
        flat = x.reshape(-1, inputs)
        flat = flat if flat.stride(1) == 1 or inputs == 1 else flat.contiguous()
        stride = flat.stride(0)
    y = x.new_empty(*x.shape[:-1], out)
    rest = (flat.data_ptr(), stride, y.data_ptr(), dtype, torch.get_num_threads())
    if counts:
        firsts = [0]
        for count in counts:
            firsts.append(firsts[-1] + count)
        assert firsts[-1] == rows and len(counts) == len(packed)
        pointers = (_P * len(packed))(*(p.data_ptr() for p in packed))
        failed = lib.linear(pointers, (_Q * len(firsts))(*firsts), len(packed), *rest)
    else:
        failed = lib.linear_one(packed[0].data_ptr(), rows, *rest)
    if failed:
        raise MemoryError("no memory to multiply with packed weights")
    return y


@functools.lru_cache(maxsize=1)
def loaded() -> tuple[ctypes.CDLL, bool]:
    """The library, and whether it converts float16."""
    found = library()
    assert not isinstance(found, str), found
    return found, bool(found.has_half())


@torch.library.custom_op(
    "auto_round::cpu_linear", mutates_args=(), schema="(Tensor[] packed, Tensor x, int[] counts, int out) -> Tensor"
)
def _cpu_linear(packed: list[torch.Tensor], x: torch.Tensor, counts: list[int], out: int) -> torch.Tensor:
    return multiply(packed, x, counts, out)


@_cpu_linear.register_fake
def _cpu_linear_fake(packed: list[torch.Tensor], x: torch.Tensor, counts: list[int], out: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out))


# Weights left in half precision on CPUs without instructions for it, where PyTorch's own products take several times
# as long as they must. What is fast for how many rows, and why: docs/cpu-kernels.md.

# Rows for which our own product is faster than widening the weights to float32 for PyTorch's.
ROWS = 48
# Weights widened at once.
_CHUNK_NUMEL = 1 << 22
HALF_DTYPES = (torch.bfloat16, torch.float16)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU emulates products in `dtype`, and our code can do better."""
    return dtype in HALF_DTYPES and not cpu_multiplies(dtype) and (dtype != torch.float16 or loaded()[1])


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
    wide, step = x.float(), max(_CHUNK_NUMEL // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        chunk = weight[start : start + step]
        y[..., start : start + len(chunk)] = F.linear(wide, chunk.float())
    return y


@torch.library.custom_op("auto_round::cpu_dense", mutates_args=(), schema="(Tensor weight, Tensor x) -> Tensor")
def _cpu_dense(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return dense_product(weight, x)


@_cpu_dense.register_fake
def _cpu_dense_fake(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Linear layers that a checkpoint leaves in half precision, mostly the head, on CPUs that are slow in it.


class DenseLinear(nn.Linear):
    """An ordinary linear layer, faster where `is_slow`: on a CPU, without gradients, inputs and weight in the same half
    precision. Anything else, another device after `to()` too, is PyTorch's."""

    _slow: frozenset[torch.dtype] = frozenset()

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseLinear:
        """With the same parameters."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
        new._slow = frozenset(filter(is_slow, HALF_DTYPES))  # now, since `torch.compile` cannot look into it
        return new.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if x.dtype not in self._slow or x.dtype != weight.dtype or not weight.is_cpu or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        product = torch.ops.auto_round.cpu_dense if torch.compiler.is_compiling() else dense_product
        y: torch.Tensor = product(weight, x)
        return y if bias is None else y + bias


def use_dense_linear(model: nn.Module) -> None:
    """Let the ordinary linear layers of `model` that are in a slow precision be `DenseLinear`."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and is_slow(module.weight.dtype):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, DenseLinear.of(module))
