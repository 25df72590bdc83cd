"""The table of inference backends, one row per way to run packed layers, and the choice among them.

A layer gets the row of highest priority that can run it. Requirements are checked without importing anything but
PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.inference.config import PACKINGS, LayerFormat, PluginPacking
from auto_round.inference.kernels import LayerSpec, kernel_class
from auto_round.layouts.base import Layout
from auto_round.layouts.integers import MLX, PLAIN_INT
from auto_round.logger import logger

COMPILER = "C compiler"  # the one requirement that is not of pip
# Names of a package in PyTorch's builds for other devices.
_OTHER_NAMES = {"triton": ("pytorch-triton", "triton-xpu", "pytorch-triton-xpu", "triton-windows")}
DTYPE_LABELS = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
AUTO = "auto"
SCALED_MM = "auto_round:scaled_mm"
OWN_CPU = "auto_round:cpu"
_FP16, _BF16, _HALF, _ALL = ("float16",), ("bfloat16",), ("bfloat16", "float16"), ("float32", "float16", "bfloat16")
_V1, _GPTQ = ("gptq_zp+-1",), ("gptq", "gptq_zp+-1")


def find_compiler() -> list[str] | None:
    """The command of a C compiler: `CC` with its flags, else cc, gcc or clang; None when there is none."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    return None


def unmet_requirement(requirement: str) -> str | None:
    """None when `requirement`, of pip ("torch>=2.8.0") or `COMPILER`, is met, or what is missing."""
    if requirement == COMPILER:
        return None if find_compiler() is not None else f"needs a {requirement}, and none was found"
    wanted = Requirement(requirement)
    version = installed_version(wanted.name)
    if version is None:
        return f"needs {requirement}, which is not installed"
    try:
        met = not version or wanted.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        met = True  # a local build with a version of its own
    return None if met else f"needs {requirement}, and {wanted.name} {version} is installed"


def installed_version(package: str) -> str | None:
    """Version of a package; empty when it has no metadata, None when it is not installed."""
    for name in (package, *_OTHER_NAMES.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    module = "auto_round_kernel" if package == "auto-round-lib" else package.replace("-", "_")
    return "" if importlib.util.find_spec(module) is not None else None


def install_command(requirements: tuple[str, ...]) -> str:
    """The command that installs those of `requirements` that are missing; empty when none is."""
    missing = [r for r in requirements if unmet_requirement(r) is not None]
    packages = [f"'{r}'" if set("<>=") & set(r) else r for r in missing if r != COMPILER]
    parts = [f"pip install {' '.join(packages)}"] if packages else []
    return " and ".join([*parts, *(f"install a {r}" for r in missing if r == COMPILER)])


def available_devices() -> tuple[str, ...]:
    """Kinds of device on this machine, "cpu" first."""
    accelerators = [kind for kind in ("cuda", "xpu") if hasattr(torch, kind) and getattr(torch, kind).is_available()]
    gaudi = importlib.util.find_spec("habana_frameworks") is not None
    return ("cpu", *accelerators, "hpu") if gaudi else ("cpu", *accelerators)


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str  # as written in `AutoRoundConfig(backend=...)`
    devices: tuple[str, ...]
    bits: tuple[int, ...]
    dtypes: tuple[str, ...]  # of the inputs
    priority: int
    packings: tuple[str, ...]  # of `LayerFormat.packing`
    requirements: tuple[str, ...] = ()  # of pip, or `COMPILER`
    group: str = ""  # name that requests several rows together
    capability: tuple[int, int] | None = None  # minimum of a CUDA device
    kernel: str = ""  # "module:Class" that runs the layer; without it the layer's module computes the product
    instead: str = ""  # the row to use when the package cannot be installed together with this one
    gain: str = ""  # measured speedup, for the hint to install it
    by_name: bool = False  # chosen only when requested by name

    @property
    def plain(self) -> bool:
        """Whether it runs without a kernel."""
        return not self.kernel and not self.instead

    def mismatch(self, fmt: LayerFormat, device: str, spec: LayerSpec | None = None) -> str | None:
        """None when the row supports such a layer, whatever is installed, or the reason why not."""
        checks: list[tuple[str, tuple[object, ...], object]] = [
            ("runs on {}, not {}", self.devices, device),
            ("runs {} bits, not {}", self.bits, fmt.scheme.bits),
            ("reads packing {}, not {}", self.packings, fmt.packing),
        ]
        if spec is not None and not self.plain:  # plain PyTorch takes any dtype
            checks.append(("computes in {}, not {}", self.dtypes, str(spec.dtype).removeprefix("torch.")))
        wrong = (text.format(", ".join(map(str, able)), asked) for text, able, asked in checks if asked not in able)
        return next(wrong, None)

    def missing_requirement(self) -> str | None:
        """None when everything that it needs is installed, or what is missing."""
        if self.instead:
            old, new = self.requirements[0], self.instead
            return f"{old} does not work with Transformers 5, which this package needs; use {new}"
        return next((missing for r in self.requirements if (missing := unmet_requirement(r)) is not None), None)

    def unmet(self) -> str | None:
        """None when this machine has what it needs, the compute capability of a CUDA device too, or what is missing."""
        missing = self.missing_requirement()
        if missing is None and self.capability is not None:
            if not torch.cuda.is_available() or torch.cuda.get_device_capability() < self.capability:
                return f"needs a device of compute capability {'.'.join(map(str, self.capability))}"
        return missing

    def unsupported_reason(self, fmt: LayerFormat, device: str, spec: LayerSpec | None = None) -> str | None:
        """The first reason why it cannot run such a layer on this device, or None; sizes are checked where known."""
        reason = self.mismatch(fmt, device, spec) or self.unmet()
        if reason is None and self.kernel and spec is not None:
            reason = kernel_class(self.kernel).unsupported_reason(spec)
        return reason


_BITS = (2, 3, 4, 8)
_ARK = ("auto-round-lib", "torch>=2.8.0")
_GPTQMODEL = ("gptqmodel>=7.0.0",)
_OLD = ("auto-gptq", "transformers<5.0.0")
_KERNELS = "auto_round.inference.kernels."
_VENDOR = f"{_KERNELS}vendor:"
_CPU, _TRITON = f"{_KERNELS}cpu:CpuKernel", f"{_KERNELS}triton_linear:TritonLinear"
_ARK_KERNEL = _VENDOR + "ArkKernel"
# `auto-round generate` of SmolLM2-135M at 4 bits on one core; tokens/s: torch 2.1, ark 17.6, auto_round:cpu 22.0.
_GAIN = "about {} times as many tokens a second as plain PyTorch"
_CPU_GAIN, _ARK_GAIN = _GAIN.format("ten"), _GAIN.format("eight")
_ALL_INT = (*_GPTQ, "awq")


def _torch(name: str, bits: tuple[int, ...], packings: tuple[str, ...]) -> Backend:
    return Backend(f"auto_round:{name}", ("cpu", "cuda", "xpu"), bits, _ALL, 0, packings, group="torch")


# GPTQModel's kernels in plain PyTorch run by name only: on a CPU with two cores one row of inputs took 86 ms, `torch`
# 9 ms (2048 x 2048, bfloat16); 512 rows took 27 s and 37 ms. Its `aten` rows are fast (0.5 ms), but importing it takes
# 20 s, and `auto_round:cpu_int4` calls the same operation of PyTorch.
BACKENDS: list[Backend] = [
    Backend(OWN_CPU, ("cpu",), _BITS, _ALL, 7, _ALL_INT, (COMPILER,), kernel=_CPU, gain=_CPU_GAIN),
    Backend("auto_round:cpu_int4", ("cpu",), (2, 3, 4), _BF16, 1, _ALL_INT, kernel=_VENDOR + "CpuInt4"),
    Backend("auto_round:cpu_int8", ("cpu",), (8,), _BF16, 1, _GPTQ, kernel=_VENDOR + "CpuInt8"),
    Backend("ark", ("cpu",), (2, 4, 8), _ALL, 6, _GPTQ, _ARK, group="ark", kernel=_ARK_KERNEL, gain=_ARK_GAIN),
    Backend("ark:awq", ("cpu",), (4,), _ALL, 6, ("awq",), _ARK, group="ark", kernel=_ARK_KERNEL, gain=_ARK_GAIN),
    Backend("ark:xpu", ("xpu",), (4, 8), _ALL, 6, _GPTQ, _ARK, group="ark", kernel=_ARK_KERNEL),
    Backend("ark:xpu_awq", ("xpu",), (4,), _ALL, 6, ("awq",), _ARK, group="ark", kernel=_ARK_KERNEL),
    Backend("marlin", ("cuda",), (4, 8), _HALF, 6, _GPTQ, _GPTQMODEL, kernel=_VENDOR + "Marlin"),
    Backend("gptqmodel:exllamav2", ("cuda",), (4,), _HALF, 5, _GPTQ, _GPTQMODEL,
            group="exllamav2", kernel=_VENDOR + "ExllamaV2"),
    Backend("gptq:exllamav2", ("cuda",), (4,), _FP16, 3, _V1, _OLD, group="exllamav2", instead="gptqmodel:exllamav2"),
    Backend("gptq:cuda", ("cuda",), _BITS, _FP16, 1, _V1, _OLD, instead="triton or torch"),
    Backend("triton", ("xpu", "cuda"), _BITS, _ALL, 2, _ALL_INT, ("triton",), kernel=_TRITON),
    Backend("awq", ("cuda",), (4,), _FP16, 5, ("awq",), ("auto-awq", "transformers<4.57.0"), instead="gptqmodel:awq"),
    Backend("gptqmodel:awq_exllamav2", ("cuda",), (4,), _HALF, 6, ("awq",), _GPTQMODEL,
            group="gptqmodel:awq", kernel=_VENDOR + "AwqExllamaV2"),
    Backend("gptqmodel:awq_marlin", ("cuda",), (4, 8), _FP16, 5, ("awq",), _GPTQMODEL, kernel=_VENDOR + "AwqMarlin"),
    Backend("gptqmodel:awq_gemm", ("cuda",), (4,), _FP16, 3, ("awq",), _GPTQMODEL, kernel=_VENDOR + "AwqGemm"),
    Backend("gptqmodel:awq_torch", ("cuda", "cpu"), (4,), _FP16, 2, ("awq",), _GPTQMODEL,
            kernel=_VENDOR + "AwqTorch", by_name=True),
    Backend("gptqmodel:torch", ("cuda", "cpu"), _BITS, _HALF, 0, _GPTQ, _GPTQMODEL,
            kernel=_VENDOR + "Torch", by_name=True),
    Backend("gptqmodel:torch_aten", ("cpu",), (4,), _BF16, 0, _GPTQ, _GPTQMODEL,
            group="gptqmodel:aten", kernel=_VENDOR + "TorchAten", by_name=True),
    Backend("gptqmodel:awq_torch_aten", ("cpu",), (4,), _BF16, 0, ("awq",), _GPTQMODEL,
            group="gptqmodel:aten", kernel=_VENDOR + "AwqTorchAten", by_name=True),
    Backend("hpu", ("hpu",), (4,), _BF16, 0, _GPTQ, kernel=_VENDOR + "HpuLinear"),
    Backend(SCALED_MM, ("cuda",), (8,), _ALL, 4, ("fp8_static",), capability=(8, 9)),
    _torch("torch_zp", _BITS, _V1),
    _torch("torch", _BITS, ("gptq",)),
    _torch("torch_awq", (4,), ("awq",)),
    _torch("torch_int8", PLAIN_INT.bits, ("int8",)),
    _torch("torch_mlx", MLX.bits, ("mlx",)),
    _torch("torch_mxfp4", (4,), ("mxfp4",)),
    _torch("torch_mxint4", (4,), ("mxint4",)),
    _torch("torch_nvfp4", (4,), ("nvfp4",)),
    _torch("torch_mxfp8", (8,), ("mxfp8",)),
    _torch("torch_fp8", (8,), ("fp8", "fp8_block")),
    _torch("torch_fp8_static", (8,), ("fp8_static",)),
]  # fmt: skip


def register_backend(backend: Backend) -> Backend:
    """Add a row to the table and return it. Raises ConfigError when another row has its name."""
    if any(row.name == backend.name and row != backend for row in BACKENDS):
        raise ConfigError(f"backend {backend.name!r} is already registered")
    if backend not in BACKENDS:
        BACKENDS.append(backend)
    return backend


def register_layout(packing_format: str, layout: Layout, bits: Sequence[int]) -> None:
    """Let Transformers open layers that a plugin's format wrote, in plain PyTorch: `layout` reads those whose
    `quantization_config` says `packing_format`, `auto_round:NAME` by convention. Raises ConfigError when the packing is
    known already, or its codes have the name of a dense weight."""
    packing = PluginPacking(packing_format, layout, (packing_format,))
    if PACKINGS.get(packing_format, packing) != packing:
        raise ConfigError(f"packing_format {packing_format!r} is already registered")
    if layout.leaves[0] in ("weight", "bias"):
        raise ConfigError(f"packing_format {packing_format!r}: codes in {layout.leaves[0]!r} look like a dense tensor")
    PACKINGS[packing_format] = packing
    register_backend(_torch(f"torch_{packing_format.rpartition(':')[2]}", tuple(bits), (packing_format,)))


class BackendChoice(NamedTuple):
    """The backend of one layer, why rows before it cannot run it, and those that only need to be installed."""

    backend: Backend
    rejected: tuple[str, ...]
    missing: tuple[Backend, ...] = ()


def backend_names() -> list[str]:
    """Every allowed value of `backend`, "auto" first."""
    return list(dict.fromkeys([AUTO, *(b.group for b in BACKENDS if b.group), *(b.name for b in BACKENDS)]))


def requested_rows(requested: str) -> tuple[Backend, ...]:
    """The rows of a requested backend, the highest priority first. Raises ConfigError when there is no such backend.
    `requested`: "auto", the name of a row or group, or several of them separated by commas. A row of a group also
    selects the others of its group: a layer's packing decides which of them runs it."""
    wanted = _split_names(requested)
    for word in wanted:
        if word not in backend_names():
            short = ", ".join(dict.fromkeys([AUTO, *(b.group or b.name for b in BACKENDS)]))
            hint = nearest(word, backend_names())
            raise ConfigError(f"unknown backend {word!r}{hint} Known: {short}; see auto-round list backend")
    rows = [b for b in BACKENDS if b.name in wanted or b.group in wanted or (AUTO in wanted and not b.by_name)]
    groups = {b.group for b in rows if b.group and not b.instead}
    chosen = [b for b in BACKENDS if b in rows or (b.group in groups and not b.instead)]
    return tuple(sorted(chosen, key=lambda b: -b.priority))


def _split_names(requested: str) -> list[str]:
    return [word.strip().lower() for word in requested.split(",") if word.strip()] or [AUTO]


def choose_backend(
    fmt: LayerFormat, device: str, requested: str = AUTO, spec: LayerSpec | None = None
) -> BackendChoice:
    """The backend for a layer. Raises ConfigError for an unknown one, UnsupportedError when none can run it."""
    device = device.split(":")[0]
    rejected: list[str] = []
    missing: list[Backend] = []
    for backend in requested_rows(requested):
        reason = backend.unsupported_reason(fmt, device, spec)
        if reason is None:
            return BackendChoice(backend, tuple(rejected), tuple(missing))
        rejected.append(f"{backend.name}: {reason}")
        if not backend.instead and backend.missing_requirement() and backend.mismatch(fmt, device, spec) is None:
            missing.append(backend)
    stored = f"{fmt.scheme.bits}-bit weights of packing {fmt.packing} on {device!r} ({'; '.join(rejected)})"
    if AUTO in _split_names(requested):
        raise UnsupportedError(f"no backend runs {stored}; choose another device or quantize with another format")
    install = f"{install_command(missing[0].requirements)}, or " if missing else ""
    raise UnsupportedError(f"backend {requested!r} does not run {stored}; {install}use backend='auto'")


def usable(backend: Backend, here: tuple[str, ...]) -> tuple[bool, str]:
    """Whether a backend can be used on a machine with the devices `here`, and on which, or why not."""
    found = [device for device in backend.devices if device in here]
    if not found and not backend.instead:
        return False, f"no {' or '.join(backend.devices)} here"
    problem = backend.unmet()
    return (True, f"on {', '.join(found)}") if problem is None else (False, problem)


def choose_backends(
    layers: Mapping[str, tuple[LayerFormat, LayerSpec]], device: str, requested: str = AUTO
) -> dict[str, BackendChoice]:
    """The backend of each layer: the requested, or that of `auto` with a warning. Raises as `choose_backend`."""
    rows = requested_rows(requested)
    kinds: dict[tuple[LayerFormat, LayerSpec], list[str]] = {}
    for name, kind in layers.items():
        kinds.setdefault(kind, []).append(name)
    found: dict[tuple[LayerFormat, LayerSpec], BackendChoice] = {}
    errors: dict[tuple[LayerFormat, LayerSpec], UnsupportedError] = {}
    for kind in kinds:
        try:
            found[kind] = choose_backend(kind[0], device, requested, kind[1])
        except UnsupportedError as error:
            errors[kind] = error
    if errors and not found:
        raise next(iter(errors.values()))
    fallbacks: dict[tuple[str, str], list[str]] = {}
    for kind in errors:
        try:
            found[kind] = choose_backend(kind[0], device, AUTO, kind[1])
        except UnsupportedError as error:
            raise UnsupportedError(f"{kinds[kind][0]}: {error}") from error
        reason = str(rows[0].unsupported_reason(kind[0], device, kind[1]))
        fallbacks.setdefault((reason, found[kind].backend.name), []).extend(kinds[kind])
    chosen = {name: found[kind] for name, kind in layers.items()}
    for reason in next(iter(chosen.values())).rejected if chosen else ():
        logger.debug("backend not chosen: %s", reason)
    if fallbacks:
        parts = [
            f"{len(names)} such as {names[0]} run with {instead} (it {reason})"
            for (reason, instead), names in sorted(fallbacks.items(), key=lambda item: -len(item[1]))
        ]
        runs = len(layers) - sum(map(len, fallbacks.values()))
        logger.warning("backend %r runs %d of %d layers; %s", requested, runs, len(layers), "; ".join(parts))
    wanted: Counter[Backend] = Counter(choice.missing[0] for choice in chosen.values() if choice.missing)
    for backend, count in wanted.most_common(1):
        logger.info(
            "%d of %d layers could run faster on %s with backend %s%s: %s", count, len(chosen), device, backend.name,
            f" ({backend.gain})" if backend.gain else "", install_command(backend.requirements),
        )  # fmt: skip
    return chosen
