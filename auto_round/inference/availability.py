"""What is here: devices, and packages with their versions. Nothing is imported to find out but PyTorch."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from auto_round.errors import DeviceError
from auto_round.inference.kernels.compiled import find_compiler

# Module by which a package is found when it is on the path without having been installed.
_MODULES = {"auto-round-lib": "auto_round_kernel", "gptqmodel": "gptqmodel", "triton": "triton", "torch": "torch"}
# A requirement that is a program and not a package, and what finds it.
PROGRAMS = {"C compiler": find_compiler}
# How PyTorch's builds for a device call the package, where it is not the name itself.
_OTHER_NAMES = {"triton": ("pytorch-triton", "triton-xpu", "pytorch-triton-xpu", "triton-windows")}


def requirement_lack(requirement: str) -> str | None:
    """None when `requirement` is met, or what is missing.

    Args:
        requirement: of a package as pip writes it, such as "torch>=2.8.0", or a key of `PROGRAMS`.
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
        met = True  # a version of someone's own
    return None if met else f"needs {requirement}, and {wanted.name} {version} is installed"


def installed_version(package: str) -> str | None:
    """Version of a package; empty when it is there and has none, None when it is not there."""
    for name in (package, *_OTHER_NAMES.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    module = _MODULES.get(package)
    return "" if module is not None and importlib.util.find_spec(module) is not None else None


def install_command(requirements: tuple[str, ...]) -> str:
    """What to type to get those of `requirements` that are missing; empty when none is."""
    missing = [r for r in requirements if requirement_lack(r) is not None]
    packages = [f"'{r}'" if set("<>=") & set(r) else r for r in missing if r not in PROGRAMS]
    parts = [f"pip install {' '.join(packages)}"] if packages else []
    return " and ".join([*parts, *(f"install a {r}" for r in missing if r in PROGRAMS)])


def devices_here() -> tuple[str, ...]:
    """Kinds of device on this machine, "cpu" first."""
    import torch

    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.append(kind)
    if importlib.util.find_spec("habana_frameworks") is not None:
        found.append("hpu")
    return tuple(found)


def device_lack(capability: tuple[int, int]) -> str | None:
    """None when the CUDA device has this compute capability, or what is missing."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= capability:
        return None
    return f"needs a device of compute capability {'.'.join(map(str, capability))}"


def device_kind(device_map: object) -> str:
    """The kind of device, such as "cuda", on which layers placed by Transformers' `device_map` will run.

    A map over several devices counts as its first accelerator. Without a map a model is read into the CPU's memory; on
    a Gaudi machine it is moved from there, as its users do. Raises DeviceError for a value that is no device map.
    """
    import torch

    here = devices_here()
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
