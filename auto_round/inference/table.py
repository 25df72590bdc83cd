"""The table of inference backends: one row per way to run packed layers, and what each row requires.

A row says which devices, bit widths, dtypes and packings it supports, which package it needs and which kernel
class runs the layer. Requirements are checked without importing anything but PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from auto_round.errors import ConfigError, DeviceError
from auto_round.inference.config import PACKINGS, LayerFormat, Packing
from auto_round.inference.kernels import LayerSpec, kernel_class
from auto_round.inference.kernels.compiled import find_compiler
from auto_round.layouts.base import Layout
from auto_round.layouts.mlx import MLX
from auto_round.layouts.packed_int import PLAIN_INT

# Modules that show that a package is there when it has no metadata.
_MODULES = {"auto-round-lib": "auto_round_kernel", "gptqmodel": "gptqmodel", "triton": "triton", "torch": "torch"}
# Requirements that are programs, and the function that finds each.
PROGRAMS = {"C compiler": find_compiler}
# Names of a package in PyTorch's builds for other devices.
_OTHER_NAMES = {"triton": ("pytorch-triton", "triton-xpu", "pytorch-triton-xpu", "triton-windows")}


def unmet_requirement(requirement: str) -> str | None:
    """None when `requirement` is met, or what is missing.

    Args:
        requirement: a pip requirement, such as "torch>=2.8.0", or a key of `PROGRAMS`.
    """
    if requirement in PROGRAMS:
        return None if PROGRAMS[requirement]() is not None else f"needs a {requirement}, and none was found"
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
    module = _MODULES.get(package)
    return "" if module is not None and importlib.util.find_spec(module) is not None else None


def install_command(requirements: tuple[str, ...]) -> str:
    """The command that installs those of `requirements` that are missing; empty when none is."""
    missing = [r for r in requirements if unmet_requirement(r) is not None]
    packages = [f"'{r}'" if set("<>=") & set(r) else r for r in missing if r not in PROGRAMS]
    parts = [f"pip install {' '.join(packages)}"] if packages else []
    return " and ".join([*parts, *(f"install a {r}" for r in missing if r in PROGRAMS)])


def available_devices() -> tuple[str, ...]:
    """Kinds of device on this machine, "cpu" first."""
    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.append(kind)
    if importlib.util.find_spec("habana_frameworks") is not None:
        found.append("hpu")
    return tuple(found)


def unmet_capability(capability: tuple[int, int]) -> str | None:
    """None when the CUDA device has this compute capability, or what is missing."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= capability:
        return None
    return f"needs a device of compute capability {'.'.join(map(str, capability))}"


def device_kind(device_map: object) -> str:
    """The kind of device, such as "cuda", on which layers placed by Transformers' `device_map` will run.

    Of several devices the first accelerator counts. Without a map it is the CPU, except on a Gaudi machine, where users
    move the loaded model to the accelerator. Raises DeviceError for a value that is not a device map.
    """
    here = available_devices()
    if device_map is None:
        return "hpu" if "hpu" in here else "cpu"
    if isinstance(device_map, dict):
        kinds = [device_kind(value) for value in device_map.values() if value not in ("disk", "meta")]
        return next((kind for kind in kinds if kind != "cpu"), "cpu")
    if isinstance(device_map, torch.device):
        return device_map.type
    if isinstance(device_map, bool) or not isinstance(device_map, (int, str)):
        raise DeviceError(f"device_map={device_map!r} is not a device, a number, 'auto' or a map of modules to devices")
    if isinstance(device_map, int) or str(device_map).isdigit():
        return next((kind for kind in here if kind != "cpu"), "cuda")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return next((kind for kind in here if kind != "cpu"), "cpu")
    return device_map.split(":")[0]


DTYPE_LABELS = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
SCALED_MM = "auto_round:scaled_mm"
OWN_CPU = "auto_round:cpu"
_FP16, _BF16, _HALF, _ALL = ("float16",), ("bfloat16",), ("bfloat16", "float16"), ("float32", "float16", "bfloat16")
_V1, _GPTQ = ("gptq_zp+-1",), ("gptq", "gptq_zp+-1")


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: as written in `AutoRoundConfig(backend=...)`.
        devices, bits, dtypes, packings: what it can run. Dtypes are those of the inputs, packings those of
            `LayerFormat.packing`.
        priority: the row of highest priority that can run a layer is chosen.
        requirements: pip requirements and keys of `PROGRAMS` that must be met.
        group: name that requests several rows together.
        capability: minimum compute capability of a CUDA device.
        kernel: "module:Class" of the kernel that runs the layer; without it the layer's module computes the product.
        instead: the row to use instead when the package cannot be installed together with this one.
        gain: measured speedup, for the hint to install it.
        by_name: chosen only when requested by name.
    """

    name: str
    devices: tuple[str, ...]
    bits: tuple[int, ...]
    dtypes: tuple[str, ...]
    priority: int
    packings: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    group: str = ""
    capability: tuple[int, int] | None = None
    kernel: str = ""
    instead: str = ""
    gain: str = ""
    by_name: bool = False

    @property
    def plain(self) -> bool:
        """Whether it runs without a kernel."""
        return not self.kernel and not self.instead

    def mismatch(self, fmt: LayerFormat, device: str, spec: LayerSpec | None = None) -> str | None:
        """None when the row supports such a layer, whatever is installed, or the reason why not."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not {device}"
        if fmt.scheme.bits not in self.bits:
            return f"runs {', '.join(map(str, self.bits))} bits, not {fmt.scheme.bits}"
        if fmt.packing not in self.packings:
            return f"reads packing {', '.join(self.packings)}, not {fmt.packing}"
        dtype = None if spec is None else str(spec.dtype).removeprefix("torch.")
        if dtype is not None and dtype not in self.dtypes and not self.plain:  # plain PyTorch takes any
            return f"computes in {', '.join(self.dtypes)}, not {dtype}"
        return None

    def missing_requirement(self) -> str | None:
        """None when everything that it needs is installed, or what is missing."""
        if self.instead:
            package = self.requirements[0]
            return f"{package} does not work with Transformers 5, which this package needs; use {self.instead}"
        return next((missing for r in self.requirements if (missing := unmet_requirement(r)) is not None), None)

    def unsupported_reason(self, fmt: LayerFormat, device: str, spec: LayerSpec | None = None) -> str | None:
        """None when it can run a layer of this format on this device, or the reason why not.

        Checked in this order: device, bits, packing, dtype, requirements, compute capability, the kernel's limits.
        `spec`: the layer's sizes, where they are known.
        """
        reason = self.mismatch(fmt, device, spec) or self.missing_requirement()
        if reason is None and self.capability is not None:
            reason = unmet_capability(self.capability)
        if reason is None and self.kernel and spec is not None:
            reason = kernel_class(self.kernel).unsupported_reason(spec)
        return reason


_TORCH_DEVICES = ("cpu", "cuda", "xpu")
_BITS = (2, 3, 4, 8)
_ARK = ("auto-round-lib", "torch>=2.8.0")
_GPTQMODEL = ("gptqmodel>=7.0.0",)
_OLD = ("auto-gptq", "transformers<5.0.0")
_KERNELS = "auto_round.inference.kernels"
# `auto-round generate` of SmolLM2-135M at 4 bits on one core; tokens/s: torch 2.1, ark 17.6, auto_round:cpu 22.0.
_CPU_GAIN = "about ten times as many tokens a second as plain PyTorch"
_ARK_GAIN = "about eight times as many tokens a second as plain PyTorch"
_ARK_KERNEL = f"{_KERNELS}.vendor:ArkKernel"
_ADAPTERS = f"{_KERNELS}.gptqmodel_linear"
_ALL_INT = (*_GPTQ, "awq")


def _torch(name: str, bits: tuple[int, ...], packings: tuple[str, ...]) -> Backend:
    return Backend(f"auto_round:{name}", _TORCH_DEVICES, bits, _ALL, 0, packings, group="torch")


# GPTQModel's kernels in plain PyTorch run by name only: on a CPU with two cores one row of inputs took 86 ms, `torch`
# 9 ms (2048 x 2048, bfloat16); 512 rows took 27 s and 37 ms. Its `aten` rows are fast (0.5 ms), but importing it takes
# 20 s, and `auto_round:cpu_int4` calls the same operation of PyTorch.
BACKENDS: list[Backend] = [
    Backend(OWN_CPU, ("cpu",), _BITS, _ALL, 7, _ALL_INT, ("C compiler",),
            kernel=f"{_KERNELS}.cpu:CpuKernel", gain=_CPU_GAIN),
    Backend("auto_round:cpu_int4", ("cpu",), (2, 3, 4), _BF16, 1, _ALL_INT, kernel=f"{_KERNELS}.vendor:CpuInt4"),
    Backend("auto_round:cpu_int8", ("cpu",), (8,), _BF16, 1, _GPTQ, kernel=f"{_KERNELS}.vendor:CpuInt8"),
    Backend("ark", ("cpu",), (2, 4, 8), _ALL, 6, _GPTQ, _ARK, group="ark", kernel=_ARK_KERNEL, gain=_ARK_GAIN),
    Backend("ark:awq", ("cpu",), (4,), _ALL, 6, ("awq",), _ARK, group="ark", kernel=_ARK_KERNEL, gain=_ARK_GAIN),
    Backend("ark:xpu", ("xpu",), (4, 8), _ALL, 6, _GPTQ, _ARK, group="ark", kernel=_ARK_KERNEL),
    Backend("ark:xpu_awq", ("xpu",), (4,), _ALL, 6, ("awq",), _ARK, group="ark", kernel=_ARK_KERNEL),
    Backend("marlin", ("cuda",), (4, 8), _HALF, 6, _GPTQ, _GPTQMODEL, kernel=f"{_ADAPTERS}:Marlin"),
    Backend("gptqmodel:exllamav2", ("cuda",), (4,), _HALF, 5, _GPTQ, _GPTQMODEL,
            group="exllamav2", kernel=f"{_ADAPTERS}:ExllamaV2"),
    Backend("gptq:exllamav2", ("cuda",), (4,), _FP16, 3, _V1, _OLD, group="exllamav2", instead="gptqmodel:exllamav2"),
    Backend("gptq:cuda", ("cuda",), _BITS, _FP16, 1, _V1, _OLD, instead="triton or torch"),
    Backend("triton", ("xpu", "cuda"), _BITS, _ALL, 2, _ALL_INT, ("triton",),
            kernel=f"{_KERNELS}.triton_linear:TritonLinear"),
    Backend("awq", ("cuda",), (4,), _FP16, 5, ("awq",), ("auto-awq", "transformers<4.57.0"), instead="gptqmodel:awq"),
    Backend("gptqmodel:awq_exllamav2", ("cuda",), (4,), _HALF, 6, ("awq",), _GPTQMODEL,
            group="gptqmodel:awq", kernel=f"{_ADAPTERS}:AwqExllamaV2"),
    Backend("gptqmodel:awq_marlin", ("cuda",), (4, 8), _FP16, 5, ("awq",), _GPTQMODEL, kernel=f"{_ADAPTERS}:AwqMarlin"),
    Backend("gptqmodel:awq_gemm", ("cuda",), (4,), _FP16, 3, ("awq",), _GPTQMODEL, kernel=f"{_ADAPTERS}:AwqGemm"),
    Backend("gptqmodel:awq_torch", ("cuda", "cpu"), (4,), _FP16, 2, ("awq",), _GPTQMODEL,
            kernel=f"{_ADAPTERS}:AwqTorch", by_name=True),
    Backend("gptqmodel:torch", ("cuda", "cpu"), _BITS, _HALF, 0, _GPTQ, _GPTQMODEL,
            kernel=f"{_ADAPTERS}:Torch", by_name=True),
    Backend("gptqmodel:torch_aten", ("cpu",), (4,), _BF16, 0, _GPTQ, _GPTQMODEL,
            group="gptqmodel:aten", kernel=f"{_ADAPTERS}:TorchAten", by_name=True),
    Backend("gptqmodel:awq_torch_aten", ("cpu",), (4,), _BF16, 0, ("awq",), _GPTQMODEL,
            group="gptqmodel:aten", kernel=f"{_ADAPTERS}:AwqTorchAten", by_name=True),
    Backend("hpu", ("hpu",), (4,), _BF16, 0, _GPTQ, kernel=f"{_KERNELS}.vendor:HpuLinear"),
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
    """Add a row to the table. Returns it. Raises ConfigError when another row has its name."""
    if any(row.name == backend.name and row != backend for row in BACKENDS):
        raise ConfigError(f"backend {backend.name!r} is already registered")
    if backend not in BACKENDS:
        BACKENDS.append(backend)
    return backend


def register_layout(packing_format: str, layout: Layout, bits: Sequence[int]) -> None:
    """Let Transformers open layers that a plugin's format wrote: in plain PyTorch, dequantized for each call.

    Args:
        packing_format: what the format's `quantization_config` says; `auto_round:NAME` by convention.
        layout: reads the layer from the tensors of the checkpoint.
        bits: widths that it reads.

    Raises:
        ConfigError: the packing is known already, or its codes have the name of a dense weight.
    """
    packing = Packing(packing_format, layout, (packing_format,), by_plugin=True)
    if PACKINGS.get(packing_format, packing) != packing:
        raise ConfigError(f"packing_format {packing_format!r} is already registered")
    if layout.leaves[0] in ("weight", "bias"):
        raise ConfigError(f"packing_format {packing_format!r}: codes in {layout.leaves[0]!r} look like a dense tensor")
    PACKINGS[packing_format] = packing
    register_backend(_torch(f"torch_{packing_format.rpartition(':')[2]}", tuple(bits), (packing_format,)))
