"""Choose the inference backend of each layer: the row of highest priority in the table that can run it.

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
from auto_round.inference.table import BACKENDS, Backend, install_command, unmet_capability
from auto_round.logger import logger

AUTO = "auto"


@dataclass(frozen=True)
class BackendChoice:
    """The backend of one layer.

    Attributes:
        rejected: "name: reason" of the rows of higher or equal priority that cannot run the layer.
        missing: those of them that only need a package or program to be installed.
    """

    backend: Backend
    rejected: tuple[str, ...]
    missing: tuple[Backend, ...] = ()


def backend_names() -> list[str]:
    """Every allowed value of `backend`, "auto" first."""
    return list(dict.fromkeys([AUTO, *(b.group for b in BACKENDS if b.group), *(b.name for b in BACKENDS)]))


def requested_rows(requested: str) -> tuple[Backend, ...]:
    """The rows of a requested backend, the highest priority first. Raises ConfigError when there is no such backend.

    Args:
        requested: "auto", a row's name, a group's name, or several of them separated by commas. A row of a group also
            selects the others of its group: a layer's packing decides which of them runs it.
    """
    wanted = _split_names(requested)
    for word in wanted:
        if word not in backend_names():
            short = dict.fromkeys([AUTO, *(b.group or b.name for b in BACKENDS)])
            raise ConfigError(
                f"unknown backend {word!r}{nearest(word, backend_names())} Known: {', '.join(short)}; see auto-round "
                "list backend"
            )
    rows = [b for b in BACKENDS if b.name in wanted or b.group in wanted or (AUTO in wanted and not b.by_name)]
    groups = {b.group for b in rows if b.group and not b.instead}
    chosen = [b for b in BACKENDS if b in rows or (b.group in groups and not b.instead)]
    return tuple(sorted(chosen, key=lambda b: -b.priority))


def _split_names(requested: str) -> list[str]:
    return [word.strip().lower() for word in requested.split(",") if word.strip()] or [AUTO]


def choose_backend(
    fmt: LayerFormat, device: str, requested: str = AUTO, spec: LayerSpec | None = None
) -> BackendChoice:
    """The backend for a layer stored as `fmt` that will run on `device` ("cpu", "cuda", ...).

    Args:
        spec: the layer's sizes; without them, requirements on sizes are not checked.
        requested: see `requested_rows`.

    Raises:
        ConfigError: there is no such backend.
        UnsupportedError: no requested backend can run this layer.
    """
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
    problem = backend.missing_requirement()
    if problem is None and backend.capability is not None:
        problem = unmet_capability(backend.capability)
    return (True, f"on {', '.join(found)}") if problem is None else (False, problem)


Layers = Mapping[str, tuple[LayerFormat, LayerSpec]]


def choose_backends(layers: Layers, device: str, requested: str = AUTO) -> dict[str, BackendChoice]:
    """The backend of each layer that will run on `device`.

    Layers that the requested backend cannot run get the backend of `auto`, and one warning says which and why.

    Args:
        layers: name -> how it is stored, and its sizes.
        requested: see `requested_rows`.

    Raises:
        ConfigError: there is no such backend.
        UnsupportedError: the requested backend can run none of the layers, or no backend can run one of them.
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
    fallbacks: dict[tuple[str, str], list[str]] = {}
    for name, kind in layers.items():
        if kind not in found:
            try:
                found[kind] = choose_backend(kind[0], device, AUTO, kind[1])
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error}") from error
        chosen[name] = found[kind]
        if kind in unsupported:
            reason = rows[0].unsupported_reason(kind[0], device, kind[1])
            fallbacks.setdefault((str(reason), found[kind].backend.name), []).append(name)
    for reason in next(iter(chosen.values())).rejected if chosen else ():
        logger.debug("backend not chosen: %s", reason)
    if fallbacks:
        parts = [
            f"{len(names)} such as {names[0]} run with {instead} (it {reason})"
            for (reason, instead), names in sorted(fallbacks.items(), key=lambda item: -len(item[1]))
        ]
        runs = sum(kind not in unsupported for kind in layers.values())
        logger.warning("backend %r runs %d of %d layers; %s", requested, runs, len(layers), "; ".join(parts))
    wanted: Counter[Backend] = Counter(choice.missing[0] for choice in chosen.values() if choice.missing)
    for backend, count in wanted.most_common(1):
        logger.info(
            "%d of %d layers could run faster on %s with backend %s%s: %s", count, len(chosen), device, backend.name,
            f" ({backend.gain})" if backend.gain else "", install_command(backend.requirements),
        )  # fmt: skip
    return chosen
