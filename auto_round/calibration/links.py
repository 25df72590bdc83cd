"""What blocks hand on beside the hidden states: tensors that one block makes and a later one takes.

Gemma 4 shares keys and values of one layer with later ones through a dictionary, GLM's sparse attention hands the
selected positions from layer to layer, Zaya a second state. Each such tensor has a slot; a stream of samples keeps the
values of the slots that a later block still needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from auto_round.calibration.layout import HiddenLayout
from auto_round.calibration.recording import UNSHARED, Held, Path, entries_of, first_of, flatten, rest_of, unflatten
from auto_round.calibration.spill import SpilledTensor
from auto_round.errors import UnsupportedError

Kept = torch.Tensor | SpilledTensor
FLOW = "use model_free=True (--model_free), or iters=0 with disable_opt_rtn=True, which round weights without data"


@dataclass(frozen=True)
class Slot:
    """One tensor that a block makes.

    Attributes:
        writer: index of the block.
        place: where it leaves it: ("hidden",), ("output", leaf), or ("held", number, key, leaf).
        batch: the dimension that counts samples.
    """

    writer: int
    place: tuple[Any, ...]
    batch: int


@dataclass(frozen=True)
class Entry:
    """What a block puts into an object: a nested value whose tensors are slots."""

    number: int
    key: Any
    spec: Hashable
    consts: tuple[Any, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class BlockLinks:
    """Of one block.

    Attributes:
        leaves: by place among the tensors of its arguments, the slot that is taken from there.
        held: by path in its arguments, the object that blocks fill.
        entries: what other blocks have put there before.
        writes: the slots that it fills and later blocks need.
    """

    leaves: Mapping[int, Slot] = field(default_factory=dict)
    held: Mapping[Path, Held] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    writes: tuple[Slot, ...] = ()

    @property
    def reads(self) -> set[Slot]:
        return {*self.leaves.values(), *(slot for entry in self.entries for slot in entry.slots)}


@dataclass(frozen=True)
class Links:
    """Of a model.

    Attributes:
        layout: of its hidden states.
        blocks: in order.
        kinds: by class of block, what it returns beside the hidden states; None where it returns them alone.
        changes_hidden: a block writes into the hidden states that it is given.
    """

    layout: HiddenLayout = HiddenLayout()
    blocks: tuple[BlockLinks, ...] = ()
    kinds: Mapping[type, tuple[Any, ...] | None] = field(default_factory=dict)
    changes_hidden: bool = False

    def block(self, index: int) -> BlockLinks:
        return self.blocks[index] if self.blocks else BlockLinks()

    def alive(self, index: int) -> list[Slot]:
        """The slots that are filled before the block of this index and needed by it or a later one, in order."""
        needed = {slot for block in self.blocks[index:] for slot in block.reads}
        return [slot for block in self.blocks[:index] for slot in block.writes if slot in needed]


class SharedState:
    """The values of slots for all samples of one stream.

    Args:
        hidden: [N, T, H] of the stream; values are kept where it is kept.
    """

    def __init__(self, hidden: Kept) -> None:
        self._count, self._device = int(hidden.shape[0]), hidden.device
        self._file = hidden if isinstance(hidden, SpilledTensor) else None
        self.values: dict[Slot, Kept] = {}

    def offload(self) -> None:
        """Move all values off the device, and keep later ones on the CPU."""
        self._device = torch.device("cpu")
        self.values = {slot: v if isinstance(v, SpilledTensor) else v.cpu() for slot, v in self.values.items()}

    def restore(self, slot: Slot, value: torch.Tensor) -> None:
        """Take back the values of a slot for all samples [N, ...]."""
        room = self.values[slot] = self._room(tuple(value.shape), value.dtype)
        room[list(range(self._count))] = value.to(room.device)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Kept:
        if self._file is not None:
            return self._file.room(dtype, shape)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def take(self, slot: Slot, samples: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """The values of some samples, as the block takes them, where `like` is."""
        value = self.values[slot][list(samples)].to(like.device)
        return value.movedim(0, slot.batch)

    def put(self, slot: Slot, samples: Sequence[int], tensor: torch.Tensor, block: str) -> None:
        """Keep what a block made for some samples. Raises UnsupportedError when it does not tell them apart."""
        if tensor.dim() <= slot.batch or tensor.shape[slot.batch] != len(samples):
            raise UnsupportedError(
                f"block {block!r} hands on a tensor of shape {list(tensor.shape)} in which {len(samples)} samples "
                f"cannot be told apart, so its blocks cannot be run one at a time; {FLOW}"
            )
        rows = tensor.detach().movedim(slot.batch, 0)
        if slot not in self.values:
            self.values[slot] = self._room((self._count, *rows.shape[1:]), rows.dtype)
        kept = self.values[slot]
        kept[list(samples)] = rows.to(kept.device, kept.dtype)

    def forget(self, needed: Sequence[Slot]) -> None:
        """Drop all values but these."""
        self.values = {slot: value for slot, value in self.values.items() if slot in needed}


def filled_call(
    links: BlockLinks, spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor],
    take: Callable[[Slot], torch.Tensor],
) -> tuple[Any, dict[int, Any]]:  # fmt: skip
    """Arguments with what earlier blocks made, and the objects among them that the block may fill, by number."""
    leaves = [take(links.leaves[i]) if i in links.leaves else leaf for i, leaf in enumerate(leaves)]
    objects: dict[int, Any] = {}

    def fill(held: Held, own: dict[Any, Any]) -> Any:
        if held.number == UNSHARED:
            return held.make(own)
        if held.number not in objects:
            given = {e.key: unflatten(e.spec, e.consts, [take(s) for s in e.slots])
                     for e in links.entries if e.number == held.number}  # fmt: skip
            objects[held.number] = held.make(own | given)
        return objects[held.number]

    return unflatten(spec, consts, leaves, fill), objects


def made_by(slot: Slot, output: Any, objects: Mapping[int, Any]) -> torch.Tensor | None:
    """The tensor that a block left in a slot; None where it did not."""
    kind, *place = slot.place
    if kind == "hidden":
        return first_of(output)
    if kind == "output":
        leaves = flatten(rest_of(output))[2]
    else:
        number, key, *place = place
        entries = entries_of(objects[number]) if number in objects else {}
        leaves = flatten(entries[key])[2] if key in entries else []
    return leaves[place[0]] if place[0] < len(leaves) else None
