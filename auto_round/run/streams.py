"""Hidden states of all samples between blocks (full precision, quantized, smoke sample), run in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from auto_round.algorithms.base import empty_device_cache, out_of_memory_error
from auto_round.calibration.block_calls import SharedState
from auto_round.calibration.capture import CapturedInputs
from auto_round.calibration.disk_store import ActivationTensor, DiskTensor, empty_beside
from auto_round.calibration.observers import InputObserver
from auto_round.modeling.source import is_finite
from auto_round.run.journal import Journal

_TOKENS = 1024  # tokens in one forward pass on a CPU: more of them are no faster and take memory
_MAX_COPIED_BYTES = 1 << 26  # of observer state that is copied before each batch


def samples_in_pass(batch: int, tokens: int, device: torch.device) -> int:
    """Samples of `tokens` each in one forward pass."""
    return batch if device.type != "cpu" else max(1, min(batch, _TOKENS // max(1, tokens)))


@dataclass
class Stream:
    """Hidden states [N, T, H] of all samples before a block, in memory or in a file; blocks run on `batch` samples.

    `others` are offloaded together with them; `before_offload` is called first.
    """

    captured: CapturedInputs
    hidden: ActivationTensor
    batch: int
    others: list[Stream] = field(default_factory=list)
    spare: ActivationTensor | None = None
    before_offload: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.state = SharedState(self.hidden)

    @classmethod
    def of(cls, captured: CapturedInputs, batch: int, device: torch.device, dtype: torch.dtype) -> Stream:
        """The stream before the first block, in `dtype`. Takes over the captured hidden states."""
        if isinstance(captured.hidden, torch.Tensor):
            captured.hidden = captured.hidden.to(dtype)
        return cls(captured, captured.hidden, samples_in_pass(batch, int(captured.hidden.shape[1]), device))

    def clone(self) -> Stream:
        """A second stream that starts with the same hidden states. Both are offloaded together."""
        made = Stream(self.captured, self.hidden.clone(), self.batch, [self])
        self.others.append(made)
        return made

    @torch.no_grad()
    def after(
        self, index: int, block: torch.nn.Module, device: torch.device, dtype: torch.dtype,
        observers: Sequence[InputObserver] = (), in_place: bool = False,
    ) -> ActivationTensor:  # fmt: skip
        """Run a block on all samples and return its output [N, T, H] in `dtype`; `observers` are active on it.

        When the device runs out of memory, the batch is halved; with one sample, the hidden states are offloaded.
        Raises DeviceError when that is not enough. `in_place`: overwrite the hidden states, which have that dtype.
        """
        self.state.keep_only(self.captured.links.slots_needed_from(index))
        masks: dict[bool, torch.Tensor | None] = {}
        for observer in observers:
            counted = self.captured.present if observer.every_token else self.captured.loss_mask
            masks[observer.every_token] = None if bool(counted.all()) else counted
        result = self.hidden if in_place else self._buffer(dtype)
        start, count = 0, self.hidden.shape[0]
        while start < count:
            rows = slice(start, min(start + self.batch, count))
            samples = list(range(rows.start, rows.stop))
            # Large sums are not copied for every batch: if the first batch fits, so do the others, always on a CPU.
            copied = start == 0 or (device.type != "cpu" and _observer_bytes(observers) < _MAX_COPIED_BYTES)
            states = ((vars(o), dict(o) if isinstance(o, dict) else {}) for o in observers)
            before = copy.deepcopy(list(states)) if copied else None
            for observer in observers:
                mask = masks[observer.every_token]
                observer.mask = None if mask is None else mask[rows]
            try:
                part = self.hidden[rows].to(device, dtype)
                result[rows] = self.captured.run(index, block, part, samples, self.state, True).to(result.device, dtype)
            except torch.OutOfMemoryError as error:
                if before is None:
                    raise out_of_memory_error("running a block", device) from error
                for observer, (attributes, items) in zip(observers, before, strict=True):
                    vars(observer).clear()
                    vars(observer).update(attributes)
                    if isinstance(observer, dict):
                        observer.clear()
                        observer.update(items)
                if self.batch > 1:
                    self.batch = self.batch // 2
                elif self.offload():
                    result = self.hidden if in_place else _on_cpu(result)
                else:
                    raise out_of_memory_error("running a block on one sample", device) from error
                empty_device_cache(device)
                continue
            start = rows.stop
        return result

    def advance_to(self, hidden: ActivationTensor) -> None:
        """Continue with the output of `after`; the old buffer is reused for the next output."""
        if hidden is not self.hidden:
            self.spare = self.hidden
        self.hidden = hidden

    def _buffer(self, dtype: torch.dtype) -> ActivationTensor:
        """An uninitialised tensor with the shape, device and storage of the hidden states."""
        spare, self.spare = self.spare, None
        if spare is not None and (spare.dtype, spare.device) == (dtype, self.hidden.device):
            return spare
        return empty_beside(self.hidden, tuple(self.hidden.shape), dtype)

    def offload(self) -> bool:
        """Move the hidden states of all streams off the device. Returns whether any were on it."""
        streams = [s for s in (self, *self.others) if s.hidden.device.type != "cpu"]
        if streams:
            self.before_offload()
        for stream in streams:
            stream.hidden, stream.spare = _on_cpu(stream.hidden), None
            stream.state.offload()
        return bool(streams)

    def runner(self, index: int, block: torch.nn.Module) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
        """A function that calls the block on some samples, with gradients."""
        return lambda hidden, samples: self.captured.run(index, block, hidden, samples, self.state)

    def saved(self, kind: str, index: int) -> dict[str, ActivationTensor]:
        """What to resume block `index` with: hidden states as `kind`, state that blocks share as `kind`-0, ..."""
        slots = self.captured.links.slots_needed_from(index)
        return {kind: self.hidden} | {f"{kind}-{n}": self.state.values[slot] for n, slot in enumerate(slots)}

    def restore_from(self, kind: str, index: int, journal: Journal) -> None:
        """Restore what was `saved` before block `index`."""
        stored = journal.stream(kind)
        for sample in range(self.hidden.shape[0]):
            self.hidden[sample] = stored.read("hidden", sample)
        for number, slot in enumerate(self.captured.links.slots_needed_from(index)):
            self.state.restore(slot, journal.stream(f"{kind}-{number}").read("hidden"))


def _on_cpu(hidden: ActivationTensor) -> ActivationTensor:
    return hidden if isinstance(hidden, DiskTensor) else hidden.cpu()


def _observer_bytes(observers: Sequence[InputObserver]) -> int:
    """Approximate bytes of the tensors that observers hold."""
    values: list[Any] = [*observers]
    total = 0
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif isinstance(value, list | tuple):
            values += value
        else:
            values += [*(value.values() if isinstance(value, dict) else ()), *getattr(value, "__dict__", {}).values()]
    return total


def first_non_finite(hidden: ActivationTensor) -> int | None:
    """Index of the first sample of hidden states [N, T, H] with NaN or Inf, or None."""
    return next((sample for sample in range(hidden.shape[0]) if not is_finite(hidden[sample])), None)
