"""The backend of every layer of a model, and what the user is told about it: what the backend that was asked for cannot
run, and which package would make a model faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from auto_round.errors import UnsupportedError
from auto_round.inference.availability import install_command
from auto_round.inference.backend import AUTO, Choice, choose_backend, requested_rows
from auto_round.inference.backend_table import Backend
from auto_round.inference.config_reader import LayerFormat
from auto_round.inference.kernels.kernel import LayerSpec
from auto_round.logger import logger

Layers = Mapping[str, tuple[LayerFormat, LayerSpec]]


def choose_backends(layers: Layers, device: str, requested: str = AUTO) -> dict[str, Choice]:
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
    found: dict[tuple[LayerFormat, LayerSpec], Choice] = {}
    refused: dict[tuple[LayerFormat, LayerSpec], UnsupportedError] = {}
    for kind in dict.fromkeys(layers.values()):
        try:
            found[kind] = choose_backend(kind[0], device, requested, kind[1])
        except UnsupportedError as error:
            refused[kind] = error
    if refused and not found:
        raise next(iter(refused.values()))
    chosen: dict[str, Choice] = {}
    left: dict[str, str] = {}
    for name, kind in layers.items():
        if kind in refused:
            left[name] = next((r for b in rows if (r := b.refuses(kind[0], device, kind[1])) is not None), "refuses")
            if kind not in found:
                found[kind] = _automatic(name, *kind, device)
        chosen[name] = found[kind]
    for reason in next(iter(chosen.values())).passed_over if chosen else ():
        logger.debug("backend passed over: %s", reason)
    if left:
        _say_what_is_left(left, chosen, requested)
    _hint(chosen, device)
    return chosen


def _automatic(name: str, fmt: LayerFormat, spec: LayerSpec, device: str) -> Choice:
    try:
        return choose_backend(fmt, device, AUTO, spec)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error


def _say_what_is_left(left: Mapping[str, str], chosen: Mapping[str, Choice], requested: str) -> None:
    why = Counter((reason, chosen[name].backend.name) for name, reason in left.items())
    parts = []
    for (reason, instead), count in why.most_common():
        example = next(n for n, r in left.items() if (r, chosen[n].backend.name) == (reason, instead))
        parts.append(f"{count} such as {example} run with {instead} (it {reason})")
    logger.warning("backend %r runs %d of %d layers; %s", requested, len(chosen) - len(left), len(chosen),
                   "; ".join(parts))  # fmt: skip


def _hint(chosen: Mapping[str, Choice], device: str) -> None:
    """One line about the package that would serve most layers, where one is missing."""
    wanted: Counter[Backend] = Counter(c.missing[0] for c in chosen.values() if c.missing)
    for backend, count in wanted.most_common(1):
        gain = f" ({backend.gain})" if backend.gain else ""
        logger.info(
            "%d of %d layers could run faster on %s with backend %s%s: %s", count, len(chosen), device, backend.name,
            gain, install_command(backend.requirements),
        )  # fmt: skip
