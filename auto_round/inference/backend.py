"""Choose the inference backend of each layer: the table's best row that can run it, with the reasons.

`choose_backend` decides for one layer, `choose_backends` for a whole model; the latter also logs which layers a
requested backend cannot run, and which package would make the model faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import LayerSpec
from auto_round.inference.table import BACKENDS, Backend, available_devices, install_command, unmet_capability
from auto_round.logger import logger

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
class BackendChoice:
    """The backend of one layer.

    Attributes:
        rejected: "name: reason" of rows of higher or equal priority.
        missing: those of them that lack only what could be installed.
    """

    backend: Backend
    rejected: tuple[str, ...]
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
    wanted = _split_names(requested)
    for word in wanted:
        if word not in backend_names():
            short = dict.fromkeys([AUTO, *(b.group or b.name for b in BACKENDS)])
            raise ConfigError(
                f"unknown backend {word!r}{nearest(word, backend_names())} Known: {', '.join(short)}; auto-round list "
                "backend tells more"
            )
    rows = [b for b in BACKENDS if b.name in wanted or b.group in wanted or (AUTO in wanted and not b.by_name)]
    groups = {b.group for b in rows if b.runnable and b.group}
    chosen = [b for b in BACKENDS if b in rows or (b.runnable and b.group in groups)]
    return tuple(sorted(chosen, key=lambda b: -b.priority))


def _split_names(requested: str) -> list[str]:
    return [word.strip().lower() for word in requested.split(",") if word.strip()] or [AUTO]


def choose_backend(
    fmt: LayerFormat, device: str, requested: str = AUTO, spec: LayerSpec | None = None
) -> BackendChoice:
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
        reason = backend.unsupported_reason(fmt, device, spec)
        if reason is None:
            return BackendChoice(backend, tuple(passed), tuple(missing))
        passed.append(f"{backend.name}: {reason}")
        if (
            backend.runnable
            and backend.missing_requirement() is not None
            and backend.mismatch(fmt, device, spec) is None
        ):
            missing.append(backend)
    stored = f"{fmt.bits}-bit weights of packing {fmt.packing} on {device!r} ({'; '.join(passed)})"
    if AUTO in _split_names(requested):
        raise UnsupportedError(f"no backend runs {stored}; choose another device or quantize with another format")
    install = f"{install_command(missing[0].requirements)}, or " if missing else ""
    raise UnsupportedError(f"backend {requested!r} does not run {stored}; {install}use backend='auto'")


def list_backends() -> list[BackendRow]:
    """All rows, each with whether it can be used on this machine."""
    here = available_devices()
    return [
        BackendRow(b.name, b.devices, b.bits, b.dtypes, b.priority, b.packings, b.requirements, *usable(b, here))
        for b in BACKENDS
    ]


def usable(backend: Backend, here: tuple[str, ...]) -> tuple[bool, str]:
    """Whether a backend can be used on a machine with the devices `here`, and on which, or why not."""
    missing_requirement = backend.missing_requirement()
    found = [device for device in backend.devices if device in here]
    if not found and not backend.instead:
        return False, f"no {' or '.join(backend.devices)} here"
    if missing_requirement is None and backend.capability is not None:
        missing_requirement = unmet_capability(backend.capability)
    return (True, f"on {', '.join(found)}") if missing_requirement is None else (False, missing_requirement)


# The backend of every layer of a model, and what the user is told about it: what the backend that was asked for cannot
# run, and which package would make a model faster.

Layers = Mapping[str, tuple[LayerFormat, LayerSpec]]


def choose_backends(layers: Layers, device: str, requested: str = AUTO) -> dict[str, BackendChoice]:
    """The backend of each layer that will run on `device`.

    A backend that was asked for runs the layers that it can; the others get what `auto` gives them, and one warning
    says which and why.

    Args:
        layers: name -> how it is stored, and its sizes.
        requested: see `backend.requested_rows`.

    Raises:
        ConfigError: there is no such backend.
        UnsupportedError: the one asked for can run none of the layers, or nothing can run one of them.
    """
    rows = requested_rows(requested)
    found: dict[tuple[LayerFormat, LayerSpec], BackendChoice] = {}
    unsupported: dict[tuple[LayerFormat, LayerSpec], UnsupportedError] = {}
    for kind in dict.fromkeys(layers.values()):
        try:
            found[kind] = choose_backend(kind[0], device, requested, kind[1])
        except UnsupportedError as error:
            unsupported[kind] = error
    if unsupported and not found:
        raise next(iter(unsupported.values()))
    chosen: dict[str, BackendChoice] = {}
    fallbacks: dict[str, str] = {}
    for name, kind in layers.items():
        if kind in unsupported:
            fallbacks[name] = next(
                (r for b in rows if (r := b.unsupported_reason(kind[0], device, kind[1])) is not None),
                "refuses",
            )
            if kind not in found:
                found[kind] = _choose_auto(name, *kind, device)
        chosen[name] = found[kind]
    for reason in next(iter(chosen.values())).rejected if chosen else ():
        logger.debug("backend passed over: %s", reason)
    if fallbacks:
        _log_fallbacks(fallbacks, chosen, requested)
    _log_install_hint(chosen, device)
    return chosen


def _choose_auto(name: str, fmt: LayerFormat, spec: LayerSpec, device: str) -> BackendChoice:
    try:
        return choose_backend(fmt, device, AUTO, spec)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error


def _log_fallbacks(fallbacks: Mapping[str, str], chosen: Mapping[str, BackendChoice], requested: str) -> None:
    why = Counter((reason, chosen[name].backend.name) for name, reason in fallbacks.items())
    parts = []
    for (reason, instead), count in why.most_common():
        example = next(n for n, r in fallbacks.items() if (r, chosen[n].backend.name) == (reason, instead))
        parts.append(f"{count} such as {example} run with {instead} (it {reason})")
    logger.warning("backend %r runs %d of %d layers; %s", requested, len(chosen) - len(fallbacks), len(chosen),
                   "; ".join(parts))  # fmt: skip


def _log_install_hint(chosen: Mapping[str, BackendChoice], device: str) -> None:
    """One line about the package that would serve most layers, where one is missing."""
    wanted: Counter[Backend] = Counter(c.missing[0] for c in chosen.values() if c.missing)
    for backend, count in wanted.most_common(1):
        gain = f" ({backend.gain})" if backend.gain else ""
        logger.info(
            "%d of %d layers could run faster on %s with backend %s%s: %s", count, len(chosen), device, backend.name,
            gain, install_command(backend.requirements),
        )  # fmt: skip
