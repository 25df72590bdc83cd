"""CPU kernels in C (docs/cpu-kernels.md): `CpuKernel` for packed integers, and `DenseLinear` for unquantized layers in
half precision, mostly the head, on CPUs where PyTorch emulates their products.

The C files are compiled once for this machine. The name of the cached library contains two hashes: of everything that
the compiler's output depends on, and of the file itself, so that a damaged library is compiled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from auto_round import envs
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.inference.linear import cpu_multiplies
from auto_round.inference.table import find_compiler
from auto_round.logger import logger

SOURCES = tuple(Path(__file__).with_name(f"cpu_{name}") for name in ("linear.c", "dense.c", "common.h"))
# Maximum number of columns that share an input scale: `CHUNK` in the C source, where the bound on sums depends on it.
CHUNK = 128
ROWS = 48  # rows up to which our half-precision product is faster than converting the weights to float32 for PyTorch's
# Weights converted to float32 at once.
_CHUNK_NUMEL = 1 << 22
HALF_DTYPES = (torch.bfloat16, torch.float16)
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
_SECONDS = 120
# No contraction to fused multiply-add, so that loops that must give equal results do.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
NO_COMPILER = (
    "needs a C compiler: none of $CC, cc, gcc and clang was found; install one "
    "(apt install gcc, dnf install gcc, or conda install gcc)"
)


@functools.lru_cache(maxsize=8)
def load(*sources: Path) -> ctypes.CDLL | str:
    """The library compiled, in a few seconds, from `sources` (headers included), or the reason why there is none."""
    compiler = find_compiler()
    if compiler is None:
        return NO_COMPILER
    key = _key(sources, compiler)
    private = _private_folder()
    with contextlib.ExitStack() as stack:
        try:
            folder = private or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="auto_round_")))
            for path in folder.glob(f"{sources[0].stem}-{key}-*.so"):
                if path.stem.rpartition("-")[2] == _digest(path):
                    return ctypes.CDLL(str(path))
                logger.warning("%s is damaged; it is compiled again", path)
                path.unlink(missing_ok=True)
            built = _compile(sources, compiler, folder, key)
            return built if isinstance(built, str) else ctypes.CDLL(str(built))
        except OSError as error:
            return f"the library built by the C compiler {compiler[0]} cannot be loaded: {error}"


def _key(sources: tuple[Path, ...], compiler: list[str]) -> str:
    """A hash of the sources, the flags, the compiler, and of the processor as far as `-march=native` depends on it."""
    binary = os.stat(os.path.realpath(compiler[0]))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
        processor = "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    except OSError:
        processor = platform.processor()
    parts = [*compiler, *_FLAGS, str(binary.st_size), str(binary.st_mtime_ns), platform.machine(), processor]
    text = b"\0".join(source.read_bytes() for source in sources)
    return hashlib.sha256("\0".join(parts).encode() + text).hexdigest()[:20]


def _private_folder() -> Path | None:
    """The cache folder; None when there is none that only the user can write to."""
    if envs.is_set("AR_WORK_SPACE"):
        folder = envs.work_space() / "kernels"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auto_round" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    if not hasattr(os, "getuid"):
        return folder
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _compile(sources: tuple[Path, ...], compiler: list[str], folder: Path, key: str) -> Path | str:
    """Compile the library into `folder`. Returns its path, or the reason of the failure."""
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    files, problem = [str(source) for source in sources if source.suffix != ".h"], ""
    with tempfile.TemporaryDirectory(prefix="part-", dir=folder) as work:
        output = Path(work) / "library.so"
        for flags in ((native, *_FLAGS), _FLAGS):
            command = [*compiler, *flags, "-o", str(output), *files]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
                )
            except subprocess.TimeoutExpired:
                return f"the C compiler {compiler[0]} did not finish in {_SECONDS} s"
            if done.returncode == 0:
                return output.replace(folder / f"{sources[0].stem}-{key}-{_digest(output)}.so")
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            problem = problem or (lines[0] if lines else f"exit status {done.returncode}")
    return f"the C compiler {compiler[0]} failed: {problem}"


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The compiled library, with `half`, whether it takes float16 inputs, or the reason why there is none, a text."""
    found: Any = load(*SOURCES)
    if not isinstance(found, str):
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        # The threads of a second OpenMP runtime would compete with PyTorch's for the cores: both wait by spinning.
        found.use_threads_of(_torch_openmp())
        found.half = bool(found.has_half())
    return found


def _torch_openmp() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that PyTorch has loaded."""
    lib = Path(torch.__file__).parent
    found = (path for folder in (lib / "lib", lib.with_name("torch.libs")) for path in sorted(folder.glob("lib*omp*")))
    for handle in (None, *map(str, found)):
        try:
            # RTLD_NOLOAD: only libraries that are loaded already.
            mode = ctypes.DEFAULT_MODE if handle is None else os.RTLD_NOLOAD | os.RTLD_NOW
            return ctypes.cast(ctypes.CDLL(handle, mode=mode).GOMP_parallel, _P).value
        except (OSError, AttributeError):
            continue
    return None


class CpuKernel(LinearKernel):
    """Integer weights in any groups. Inputs are rounded to 16 bits per group of at most 128 columns; sums are exact."""

    packed: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        lib, spec = library(), weight.spec
        starts = chunk_starts(spec.in_features, spec.group_size)
        group = (starts[:-1] // spec.group_size).long()
        scales, zeros = weight.scales[:, group].float().contiguous(), weight.zeros[:, group].contiguous()
        zero = int(zeros[0, 0])
        zero = zero if bool((zeros == zero).all()) else -1
        half = int(lib.half and torch.equal(scales.half().float(), scales))
        sizes = (_BITS[spec.bits], spec.out_features, spec.in_features, len(starts) - 1, starts.data_ptr(), zero, half)
        packed = torch.empty(lib.packed_size(*sizes), dtype=torch.uint8)
        arrays = (weight.codes.contiguous(), scales, zeros)
        lib.pack(packed.data_ptr(), *sizes, *(array.data_ptr() for array in arrays), torch.get_num_threads())
        self.hold(packed=packed)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        found = library()
        return found if isinstance(found, str) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self._buffers["packed"]  # `__getattr__` costs as much as a small layer
        assert packed is not None
        return _product()([packed], x, [], self.spec.out_features)

    def codes(self) -> torch.Tensor:
        codes = torch.empty(self.spec.out_features, self.spec.in_features, dtype=torch.uint8)
        library().unpack(self.packed.data_ptr(), codes.data_ptr(), torch.get_num_threads())
        return codes

    @classmethod
    def grouped(cls, kernels: Sequence[LinearKernel], x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        packed = [kernel.get_buffer("packed") for kernel in kernels]
        return _product()(packed, x, list(counts), kernels[0].spec.out_features)


def _product() -> Callable[..., torch.Tensor]:
    """`multiply`; the operator, whose dispatch costs as much as a small layer, only for `torch.compile`."""
    product: Callable[..., torch.Tensor] = torch.ops.auto_round.cpu_linear
    return product if torch.compiler.is_compiling() else multiply


def chunk_starts(in_features: int, group_size: int) -> torch.Tensor:
    """int32 [chunks + 1]: the first column of each chunk, at most `CHUNK` columns of one group, and `in_features`."""
    found: list[int] = []
    for start in range(0, in_features, group_size):
        found += range(start, min(start + group_size, in_features), CHUNK)
    return torch.tensor([*found, in_features], dtype=torch.int32)


def _flat(x: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    """Number of rows, a tensor with them whose last dimension is contiguous, and the stride of the rows."""
    # Called for every layer of every token, so the usual case avoids unnecessary calls.
    inputs = x.shape[-1]
    if x.is_contiguous():
        return x.numel() // inputs, x, inputs
    flat = x.reshape(-1, inputs)
    flat = flat if flat.stride(1) == 1 or inputs == 1 else flat.contiguous()
    return len(flat), flat, flat.stride(0)


def multiply(packed: Sequence[torch.Tensor], x: torch.Tensor, counts: Sequence[int], out: int) -> torch.Tensor:
    """x [..., in] -> [..., out] in its dtype, by one weight or, with `counts` of rows of x, one per expert."""
    lib = library()
    dtype = DTYPES.get(x.dtype)
    if dtype is None or (dtype == 2 and not lib.half):
        return multiply(packed, x.float(), counts, out).to(x.dtype)
    rows, flat, stride = _flat(x)
    y = x.new_empty(*x.shape[:-1], out)
    rest = (flat.data_ptr(), stride, y.data_ptr(), dtype, torch.get_num_threads())
    if counts:
        firsts = [0, *itertools.accumulate(counts)]
        assert firsts[-1] == rows and len(counts) == len(packed)
        pointers = (_P * len(packed))(*(p.data_ptr() for p in packed))
        failed = lib.linear(pointers, (_Q * len(firsts))(*firsts), len(packed), *rest)
    else:
        failed = lib.linear_one(packed[0].data_ptr(), rows, *rest)
    if failed:
        raise MemoryError("no memory to multiply with packed weights")
    return y


_operator = torch.library.custom_op(
    "auto_round::cpu_linear", multiply, mutates_args=(),
    schema="(Tensor[] packed, Tensor x, int[] counts, int out) -> Tensor",
)  # fmt: skip
_operator.register_fake(lambda packed, x, counts, out: x.new_empty((*x.shape[:-1], out)))


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU emulates products in a half-precision dtype and the library supports it."""
    return dtype in HALF_DTYPES and not cpu_multiplies(dtype) and (dtype != torch.float16 or library().half)


def dense_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x W^T of one half-precision dtype, summed in float32; up to `ROWS` rows the same for any number of threads."""
    out, inputs = weight.shape
    rows, y = x.numel() // inputs, x.new_empty(*x.shape[:-1], out)
    if rows > ROWS:  # PyTorch's float32 product, some weights at a time
        wide, step = x.float(), max(_CHUNK_NUMEL // inputs, 1)
        for start in range(0, out, step):
            chunk = weight[start : start + step]
            y[..., start : start + len(chunk)] = F.linear(wide, chunk.float())
        return y
    weight, (_, flat, stride) = weight.contiguous(), _flat(x)
    failed = library().dense(
        weight.data_ptr(), out, inputs, rows, flat.data_ptr(), stride, y.data_ptr(), DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory to multiply with weights in half precision")
    return y


_dense_operator = torch.library.custom_op(
    "auto_round::cpu_dense", dense_product, mutates_args=(), schema="(Tensor weight, Tensor x) -> Tensor"
)
_dense_operator.register_fake(lambda weight, x: x.new_empty((*x.shape[:-1], weight.shape[0])))


class DenseLinear(nn.Linear):
    """`nn.Linear` that uses `dense_product` on a CPU without gradients, when inputs and weight have one slow dtype."""

    _slow: frozenset[torch.dtype] = frozenset()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if x.dtype not in self._slow or x.dtype != weight.dtype or not weight.is_cpu or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        product = torch.ops.auto_round.cpu_dense if torch.compiler.is_compiling() else dense_product
        y: torch.Tensor = product(weight, x)
        return y if bias is None else y + bias


def use_dense_linear(model: nn.Module) -> None:
    """Replace linear layers in a dtype that is slow on this CPU by `DenseLinear` with the same parameters."""
    slow = frozenset(filter(is_slow, HALF_DTYPES))  # not in `forward`: `torch.compile` cannot trace it
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module.weight.dtype not in slow:
            continue
        sizes, dtype = (module.in_features, module.out_features), module.weight.dtype
        new = DenseLinear(*sizes, bias=False, device="meta", dtype=dtype)
        new.weight, new.bias, new._slow = module.weight, module.bias, slow
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(module.training))
