"""Which code runs a packed layer: the choice among the table's rows, with the reasons for it."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.inference.availability import device_lack, devices_here, install_command
from auto_round.inference.backend_table import BACKENDS, Backend
from auto_round.inference.config_reader import LayerFormat
from auto_round.inference.kernels.kernel import LayerSpec

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
    """The backend of one layer.

    Attributes:
        passed_over: "name: reason" of rows of higher or equal priority.
        missing: those of them that lack only what could be installed.
    """

    backend: Backend
    passed_over: tuple[str, ...]
    missing: tuple[Backend, ...] = ()


def backend_names() -> list[str]:
    """Every value that `backend` may have, "auto" first."""
    return list(dict.fromkeys([AUTO, *(b.group for b in BACKENDS if b.group), *(b.name for b in BACKENDS)]))


def requested_rows(requested: str) -> tuple[Backend, ...]:
    """The rows that `requested` stands for, the highest priority first.

    Args:
        requested: "auto", a row's name, a group's name, or several of them with commas between. A row of a group
            stands for its siblings too: the packing decides which of them reads a layer.

    Raises:
        ConfigError: there is no such backend.
    """
    wanted = _words(requested)
    for word in wanted:
        if word not in backend_names():
            short = dict.fromkeys([AUTO, *(b.group or b.name for b in BACKENDS)])
            raise ConfigError(
                f"unknown backend {word!r}{nearest(word, backend_names())} Known: {', '.join(short)}; auto-round list "
                "backend tells more"
            )
    rows = [b for b in BACKENDS if b.name in wanted or b.group in wanted or (AUTO in wanted and not b.by_name)]
    groups = {b.group for b in rows if b.drivable and b.group}
    chosen = [b for b in BACKENDS if b in rows or (b.drivable and b.group in groups)]
    return tuple(sorted(chosen, key=lambda b: -b.priority))


def _words(requested: str) -> list[str]:
    return [word.strip().lower() for word in requested.split(",") if word.strip()] or [AUTO]


def choose_backend(fmt: LayerFormat, device: str, requested: str = AUTO, spec: LayerSpec | None = None) -> Choice:
    """The backend for a layer stored as `fmt` that will run on `device` ("cpu", "cuda", ...).

    Args:
        spec: the layer's sizes; without them only what holds for every size is known.
        requested: see `requested_rows`.

    Raises:
        ConfigError: there is no such backend.
        UnsupportedError: none of those asked for can run this layer.
    """
    device = device.split(":")[0]
    passed: list[str] = []
    missing: list[Backend] = []
    for backend in requested_rows(requested):
        reason = backend.refuses(fmt, device, spec)
        if reason is None:
            return Choice(backend, tuple(passed), tuple(missing))
        passed.append(f"{backend.name}: {reason}")
        if backend.drivable and backend.lack() is not None and backend.misfit(fmt, device, spec) is None:
            missing.append(backend)
    stored = f"{fmt.bits}-bit weights of packing {fmt.packing} on {device!r} ({'; '.join(passed)})"
    if AUTO in _words(requested):
        raise UnsupportedError(f"no backend runs {stored}; choose another device or quantize with another format")
    install = f"{install_command(missing[0].requirements)}, or " if missing else ""
    raise UnsupportedError(f"backend {requested!r} does not run {stored}; {install}use backend='auto'")


def list_backends() -> list[BackendRow]:
    """All rows, each with whether it can be used on this machine."""
    here = devices_here()
    return [
        BackendRow(b.name, b.devices, b.bits, b.dtypes, b.priority, b.packings, b.requirements, *usable(b, here))
        for b in BACKENDS
    ]


def usable(backend: Backend, here: tuple[str, ...]) -> tuple[bool, str]:
    """Whether a backend can be used on a machine with the devices `here`, and on which, or why not."""
    lack = backend.lack()
    found = [device for device in backend.devices if device in here]
    if not found and not backend.instead:
        return False, f"no {' or '.join(backend.devices)} here"
    if lack is None and backend.capability is not None:
        lack = device_lack(backend.capability)
    return (True, f"on {', '.join(found)}") if lack is None else (False, lack)
