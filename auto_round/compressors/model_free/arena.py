"""Memory for tensors that are read, used again by the next unit: fresh pages cost more than reading into them."""

from __future__ import annotations

import threading

import torch

_SMALL = 1 << 16
_KEPT = 256 << 20


class Arena(threading.local):
    """What one worker reads into. Each thread has its own; what was given is valid until the thread's next `reset`."""

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._next = 0

    def reset(self) -> None:
        """A new unit begins: all memory is free again. Very large pieces are given back to the system."""
        self._next = 0
        self._slots = [slot for slot in self._slots if slot.numel() <= _KEPT]

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size], uninitialised."""
        if size < _SMALL:
            return torch.empty(size, dtype=torch.uint8)
        if self._next == len(self._slots):
            self._slots.append(torch.empty(0, dtype=torch.uint8))
        if self._slots[self._next].numel() < size:
            self._slots[self._next] = torch.empty(size, dtype=torch.uint8)
        self._next += 1
        return self._slots[self._next - 1][:size]
