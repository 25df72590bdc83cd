"""`max_memory`: how much a run may hold in RAM and on its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import ConfigError
from auto_round.export.shard_writer import parse_size

_HOST = ("cpu", "ram")


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes at most; None is no limit.

    Attributes:
        ram: resident memory of the process, libraries included.
        device: memory of tensors on the device that computes, where that is not the CPU.
    """

    ram: int | None = None
    device: int | None = None


def parse_budget(value: Any, device: torch.device) -> MemoryBudget | None:
    """A budget from `4_000_000_000`, "4GB" (RAM), "cpu=4GB,0=10GB" or {"cpu": "4GB", 0: "10GB"}; None for None.

    Raises ConfigError for no size, or a device that the run does not use.
    """
    if value is None:
        return None
    if isinstance(value, str) and "=" in value:
        pairs = [part.partition("=") for part in value.split(",")]
        value = {name.strip(): size.strip() for name, _, size in pairs}
    if not isinstance(value, Mapping):
        return MemoryBudget(ram=_size(value))
    found: dict[str, int] = {}
    own = {str(device), device.type, str(device.index or 0)} if device.type != "cpu" else set()
    for name, size in value.items():
        key = str(name).strip().lower()
        which = "ram" if key in _HOST else "device" if key in own else None
        if which is None:
            raise ConfigError(
                f"max_memory names {name!r}; this run uses {', '.join(sorted({'cpu', str(device)}))}: give such as "
                f'"cpu=4GB{"" if device.type == "cpu" else f",{device.index or 0}=10GB"}"'
            )
        if which in found:
            raise ConfigError(f"max_memory={value!r} gives {name!r} twice")
        found[which] = _size(size)
    return MemoryBudget(**found)


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"max_memory={value!r} is not a size; give bytes, or a text such as '4GB'")
    return parse_size(value, "max_memory")
