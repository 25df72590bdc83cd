"""The device to tune on, from what users write for `device_map`."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.errors import DeviceError, UnsupportedError


def resolve_device(value: Any) -> torch.device:
    """One device.

    Args:
        value: a number (that accelerator, or the CPU on a machine without any), "auto", "cpu", "cuda", "cuda:1", "xpu",
            a torch.device, or a map or list that names one device only.

    Raises:
        DeviceError: no such device here.
        UnsupportedError: more than one device.
    """
    if value is None:
        value = 0
    if isinstance(value, dict):
        value = sorted({str(v) for v in value.values()})
    if isinstance(value, (list, tuple)):
        value = ",".join(str(v) for v in value)
    if isinstance(value, torch.device):
        value = str(value)
    text = str(value).strip().lower()
    if "," in text:
        parts = {part.strip() for part in text.split(",") if part.strip()}
        if len(parts) > 1:
            raise UnsupportedError(
                f"device_map={value!r} names several devices; this version tunes on one: give one, such as 'cuda:0'. "
                "A block at a time is on it, so it needs about ten times the memory of one block"
            )
        text = parts.pop()
    kind, count = _accelerator()
    if text in ("auto", "tp") or text == "0":
        return torch.device(kind, 0) if count else torch.device("cpu")
    if text == "cpu":
        return torch.device("cpu")
    name = f"{kind}:{text}" if text.isdigit() else text
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device_map={value!r} is no device; {_here(kind, count)}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != kind or not count or (device.index or 0) >= count:
        raise DeviceError(f"device_map={value!r} is not on this machine; {_here(kind, count)}")
    return torch.device(device.type, device.index or 0)


def _accelerator() -> tuple[str, int]:
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        return "xpu", int(xpu.device_count())
    return "cuda", 0


def _here(kind: str, count: int) -> str:
    found = ", ".join(["cpu", *(f"{kind}:{i}" for i in range(count))])
    return f"devices here: {found}"
