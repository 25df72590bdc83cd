"""Which code runs a packed layer: the user guide's backends as a table, and a choice that can say why.

This version brings the PyTorch rows. The others are listed so that asking for one gets a plain answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.errors import ConfigError, DeviceError, UnsupportedError, nearest
from auto_round.inference.config_reader import INT8_BITS, LayerFormat
from auto_round.inference.kernels.kernel import LayerSpec, kernel_class

SCALED_MM = "auto_round:scaled_mm"
_HALF = ("bfloat16", "float16")
_ALL = ("float32", "float16", "bfloat16")
_GPTQ = ("gptq", "gptq_zp+-1")


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: as a user writes it in `AutoRoundConfig(backend=...)`.
        devices, bits, dtypes, packings: what it can run; packings are those of `LayerFormat.packing`.
        priority: the highest that can run a layer is chosen.
        capability: compute capability that a CUDA device must have at least.
        requirements: packages it needs.
        built: whether this version holds it.
        group: the name by which it can be asked for together with its siblings.
        kernel: "module:Class" of the kernel that runs the layer; empty for a module that does it itself.
    """

    name: str
    devices: tuple[str, ...]
    bits: tuple[int, ...]
    dtypes: tuple[str, ...]
    priority: int
    packings: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    built: bool = False
    group: str = ""
    capability: tuple[int, int] | None = None
    kernel: str = ""

    def refuses(self, fmt: LayerFormat, device: str, spec: LayerSpec | None = None) -> str | None:
        """None when it can run a layer of this format on this device, or the reason why not. `spec`: its sizes, where
        they are known."""
        if not self.built:
            return "not part of this version"
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not {device}"
        if fmt.bits not in self.bits:
            return f"runs {', '.join(map(str, self.bits))} bits, not {fmt.bits}"
        if fmt.packing not in self.packings:
            return f"reads packing {', '.join(self.packings)}, not {fmt.packing}"
        if self.capability is not None and not _has_capability(self.capability):
            return f"needs a device of compute capability {'.'.join(map(str, self.capability))}"
        if self.kernel and spec is not None:
            return kernel_class(self.kernel).refuses(spec)
        return None


_TORCH_DEVICES = ("cpu", "cuda", "xpu")
_BITS = (2, 3, 4, 8)
_GPTQMODEL, _ARK, _OLD = ("gptqmodel",), ("auto-round-lib", "torch>=2.8.0"), ("auto-gptq", "transformers<5.0.0")
_ARK_KERNEL = "auto_round.inference.kernels.ark:ArkKernel"

BACKENDS: tuple[Backend, ...] = (
    Backend("auto_round:torch_zp", _TORCH_DEVICES, _BITS, _ALL, 0, ("gptq_zp+-1",), built=True, group="torch"),
    Backend("auto_round:torch", _TORCH_DEVICES, _BITS, _ALL, 0, ("gptq",), built=True, group="torch"),
    Backend("auto_round:torch_awq", _TORCH_DEVICES, (4,), _ALL, 0, ("awq",), built=True, group="torch"),
    Backend("auto_round:torch_int8", _TORCH_DEVICES, INT8_BITS, _ALL, 0, ("int8",), built=True, group="torch"),
    Backend("auto_round:torch_mlx", _TORCH_DEVICES, (2, 3, 4, 5, 6, 8), _ALL, 0, ("mlx",), built=True, group="torch"),
    *(
        Backend(f"auto_round:torch_{name}", _TORCH_DEVICES, (bits,), _ALL, 0, packings, built=True, group="torch")
        for name, bits, packings in (
            ("mxfp4", 4, ("mxfp4",)),
            ("mxint4", 4, ("mxint4",)),
            ("nvfp4", 4, ("nvfp4",)),
            ("mxfp8", 8, ("mxfp8",)),
            ("fp8", 8, ("fp8", "fp8_block")),
            ("fp8_static", 8, ("fp8_static",)),
        )
    ),
    Backend(SCALED_MM, ("cuda",), (8,), _ALL, 4, ("fp8_static",), built=True, capability=(8, 9)),
    Backend(
        "auto_round:cpu",
        ("cpu",),
        _BITS,
        _ALL,
        7,
        (*_GPTQ, "awq"),
        built=True,
        kernel="auto_round.inference.kernels.cpu:CpuKernel",
    ),
    Backend(
        "auto_round:cpu_int4",
        ("cpu",),
        (2, 3, 4),
        ("bfloat16",),
        1,
        (*_GPTQ, "awq"),
        built=True,
        kernel="auto_round.inference.kernels.torch_packed:CpuInt4",
    ),
    Backend(
        "auto_round:cpu_int8",
        ("cpu",),
        (8,),
        ("bfloat16",),
        1,
        _GPTQ,
        built=True,
        kernel="auto_round.inference.kernels.torch_packed:CpuInt8",
    ),
    Backend("ark", ("cpu",), (2, 4, 8), _ALL, 6, (*_GPTQ, "awq"), _ARK, built=True, kernel=_ARK_KERNEL),
    Backend("ark:xpu", ("xpu",), (4, 8), _ALL, 6, (*_GPTQ, "awq"), _ARK, built=True, group="ark", kernel=_ARK_KERNEL),
    Backend("marlin", ("cuda",), (4, 8), _HALF, 6, _GPTQ, _GPTQMODEL),
    Backend("gptqmodel:exllamav2", ("cuda",), (4,), _HALF, 5, _GPTQ, _GPTQMODEL, group="exllamav2"),
    Backend("gptq:exllamav2", ("cuda",), (4,), ("float16",), 3, ("gptq_zp+-1",), _OLD, group="exllamav2"),
    Backend("gptq:cuda", ("cuda",), _BITS, ("float16",), 1, ("gptq_zp+-1",), _OLD),
    Backend("triton", ("xpu", "cuda"), (2, 4, 8), _HALF, 2, _GPTQ, ("auto-round",)),
    Backend("awq", ("cuda",), (4,), ("float16",), 5, ("awq",), ("auto-awq", "transformers<4.57.0")),
    Backend("gptqmodel:awq_exllamav2", ("cuda",), (4,), _HALF, 6, ("awq",), _GPTQMODEL, group="gptqmodel:awq"),
    Backend("gptqmodel:awq_marlin", ("cuda",), (4, 8), ("float16",), 5, ("awq",), _GPTQMODEL),
    Backend("gptqmodel:awq_gemm", ("cuda",), (4,), ("float16",), 3, ("awq",), _GPTQMODEL),
    Backend("gptqmodel:awq_torch", ("cuda", "cpu"), (4,), ("float16",), 2, ("awq",), _GPTQMODEL),
    Backend("hpu", ("hpu",), (4,), ("bfloat16",), 0, _GPTQ, ("auto-round",)),
)
AUTO = "auto"


@dataclass(frozen=True)
class BackendRow:
    """A row for display: the table's values, and whether the backend can be used here and why (not)."""

    name: str
    devices: tuple[str, ...]
    bits: tuple[int, ...]
    dtypes: tuple[str, ...]
    priority: int
    packing: tuple[str, ...]
    requirements: tuple[str, ...]
    usable: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The backend of one layer, and why rows of higher or equal priority were passed over."""

    backend: Backend
    passed_over: tuple[str, ...]


def backend_names() -> list[str]:
    """Every value that `backend` may have, "auto" first."""
    return list(dict.fromkeys([AUTO, *(b.group for b in BACKENDS if b.group), *(b.name for b in BACKENDS)]))


def choose_backend(fmt: LayerFormat, device: str, requested: str = AUTO, spec: LayerSpec | None = None) -> Choice:
    """The backend for a layer stored as `fmt` that will run on `device` ("cpu", "cuda", ...).

    Args:
        spec: the layer's sizes; without them only what holds for every size is known.
        requested: "auto", a row's name or a group's name ("torch" means whichever PyTorch row reads the packing).

    Raises:
        ConfigError: there is no such backend.
        UnsupportedError: the one asked for is not here, or none can run this layer.
    """
    device = device.split(":")[0]
    wanted = requested.strip().lower()
    if wanted not in backend_names():
        raise ConfigError(
            f"unknown backend {requested!r}{nearest(requested, backend_names())} Known: {', '.join(backend_names())}"
        )
    rows = [b for b in BACKENDS if wanted == AUTO or wanted in (b.name, b.group)]
    if wanted != AUTO and not any(b.built for b in rows):
        needs = " or ".join(dict.fromkeys(", ".join(b.requirements) for b in rows))
        raise UnsupportedError(
            f"backend {requested!r} (it needs {needs}) is not part of this version; use backend='torch' or 'auto'"
        )
    # A row of our own, by its exact name, stands for its siblings: the packing decides which of them reads the layer.
    groups = {b.group for b in rows if b.built and b.group}
    rows = [b for b in BACKENDS if b in rows or b.group in groups]
    passed: list[str] = []
    for backend in sorted(rows, key=lambda b: -b.priority):
        reason = backend.refuses(fmt, device, spec)
        if reason is None:
            return Choice(backend, tuple(passed))
        passed.append(f"{backend.name}: {reason}")
    raise UnsupportedError(
        f"no backend runs {fmt.bits}-bit weights of packing {fmt.packing} on {device!r} ({'; '.join(passed)}); "
        "choose another device or quantize with another format"
    )


def list_backends() -> list[BackendRow]:
    """All rows, each with whether it can be used on this machine."""
    here = _devices_here()
    return [
        BackendRow(b.name, b.devices, b.bits, b.dtypes, b.priority, b.packings, b.requirements, *_usable(b, here))
        for b in BACKENDS
    ]


def _has_capability(wanted: tuple[int, int]) -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= wanted


def _usable(backend: Backend, here: tuple[str, ...]) -> tuple[bool, str]:
    if not backend.built:
        return False, "not part of this version"
    if backend.capability is not None and not _has_capability(backend.capability):
        return False, f"no device of compute capability {'.'.join(map(str, backend.capability))} is here"
    found = [device for device in backend.devices if device in here]
    return (True, f"on {', '.join(found)}") if found else (False, f"none of {', '.join(backend.devices)} is here")


def _devices_here() -> tuple[str, ...]:
    import torch

    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.append(kind)
    return tuple(found)


def device_kind(device_map: object) -> str:
    """The kind of device, such as "cuda", on which layers placed by Transformers' `device_map` will run.

    A map over several devices counts as its first accelerator. Raises DeviceError for a value that is no device map.
    """
    import torch

    if device_map is None:
        return "cpu"
    if isinstance(device_map, dict):
        kinds = [device_kind(value) for value in device_map.values() if value not in ("disk", "meta")]
        return next((kind for kind in kinds if kind != "cpu"), "cpu")
    if isinstance(device_map, torch.device):
        return device_map.type
    here = _devices_here()
    if isinstance(device_map, bool) or not isinstance(device_map, (int, str)):
        raise DeviceError(f"device_map={device_map!r} is not a device, a number, 'auto' or a map of modules to devices")
    if isinstance(device_map, int) or str(device_map).isdigit():
        return next((kind for kind in here if kind != "cpu"), "cuda")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return next((kind for kind in here if kind != "cpu"), "cpu")
    return device_map.split(":")[0]
