"""Describe which tensors one decoder block passes to a later one, and store them per calibration sample.

Gemma 4 shares keys and values of one layer with later ones through a dictionary, GLM's sparse attention passes
the selected positions from layer to layer, Zaya passes a second state. Each such tensor has a slot;
`SharedState` stores the values of the slots that a later block still needs.

`HiddenLayout` describes the hidden states. Most models pass [batch, tokens, width]. Hyper-connections keep
several streams side by side ([batch, tokens, streams, width]), Gemma 3n stacks them in front ([streams, batch,
tokens, width]), and XLNet puts tokens first. Samples are stored as rows [batch, tokens, everything else] in all
cases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from auto_round.calibration.block_calls import (
    UNSHARED,
    ArgumentPath,
    SharedObject,
    entries_of,
    extra_outputs,
    flatten,
    hidden_of,
    unflatten,
)
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import UnsupportedError


@dataclass(frozen=True)
class HiddenLayout:
    """Attributes:
    batch, tokens: which dimensions of the blocks' tensor these are.
    rest: sizes of the other dimensions, in order.
    """

    batch: int = 0
    tokens: int = 1
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, hidden: torch.Tensor, tokens: int) -> HiddenLayout | None:
        """The layout of one sample's hidden states; None when no dimension is the batch, or none the tokens."""
        if hidden.dim() == 3 and hidden.shape[0] == 1:
            return cls(rest=(int(hidden.shape[2]),))  # also where a prompt of the model's own lies before the tokens
        batch = batch_dim(hidden)
        others = [d for d in range(hidden.dim()) if d != batch]
        place = next((d for d in others if hidden.shape[d] == tokens), None)
        if batch is None or place is None or hidden.dim() < 3:
            return None
        return cls(batch, place, tuple(hidden.shape[d] for d in others if d != place))

    @property
    def plain(self) -> bool:
        """Whether rows are the blocks' own tensor."""
        return (self.batch, self.tokens) == (0, 1) and len(self.rest) < 2

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, width] of the blocks' tensor."""
        if self.plain:
            return hidden
        others = [d for d in range(hidden.dim()) if d not in (self.batch, self.tokens)]
        return hidden.permute(self.batch, self.tokens, *others).flatten(2)

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """The blocks' tensor of rows [B, T, width], with memory of its own where it is not `rows` itself."""
        if self.plain:
            return rows
        others = [d for d in range(2 + len(self.rest)) if d not in (self.batch, self.tokens)]
        back = torch.tensor([self.batch, self.tokens, *others]).argsort().tolist()
        return rows.reshape(*rows.shape[:2], *self.rest).permute(*back).contiguous()


def batch_dim(tensor: torch.Tensor) -> int | None:
    """The dimension that counts samples, in a tensor of one sample: the first of size one."""
    return next((d for d in range(tensor.dim()) if tensor.shape[d] == 1), None)


# What blocks hand on beside the hidden states: tensors that one block makes and a later one takes.
#
# Gemma 4 shares keys and values of one layer with later ones through a dictionary, GLM's sparse attention hands the
# selected positions from layer to layer, Zaya a second state. Each such tensor has a slot; a stream of samples keeps
# the values of the slots that a later block still needs.

StateTensor = torch.Tensor | DiskTensor
DATA_FREE_ADVICE = (
    "use model_free=True (--model_free), or iters=0 with disable_opt_rtn=True, which round weights without data"
)


@dataclass(frozen=True)
class SharedSlot:
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
class ObjectEntry:
    """What a block puts into an object: a nested value whose tensors are slots."""

    number: int
    key: Any
    spec: Hashable
    consts: tuple[Any, ...]
    slots: tuple[SharedSlot, ...]


@dataclass(frozen=True)
class BlockDependencies:
    """Of one block.

    Attributes:
        leaves: by place among the tensors of its arguments, the slot that is taken from there.
        held: by path in its arguments, the object that blocks fill.
        entries: what other blocks have put there before.
        writes: the slots that it fills and later blocks need.
    """

    leaves: Mapping[int, SharedSlot] = field(default_factory=dict)
    held: Mapping[ArgumentPath, SharedObject] = field(default_factory=dict)
    entries: tuple[ObjectEntry, ...] = ()
    writes: tuple[SharedSlot, ...] = ()

    @property
    def reads(self) -> set[SharedSlot]:
        return {*self.leaves.values(), *(slot for entry in self.entries for slot in entry.slots)}


@dataclass(frozen=True)
class ModelDependencies:
    """Of a model.

    Attributes:
        layout: of its hidden states.
        blocks: in order.
        kinds: by class of block, what it returns beside the hidden states; None where it returns them alone.
        changes_hidden: a block writes into the hidden states that it is given.
    """

    layout: HiddenLayout = HiddenLayout()
    blocks: tuple[BlockDependencies, ...] = ()
    kinds: Mapping[type, tuple[Any, ...] | None] = field(default_factory=dict)
    changes_hidden: bool = False

    def block(self, index: int) -> BlockDependencies:
        return self.blocks[index] if self.blocks else BlockDependencies()

    def alive(self, index: int) -> list[SharedSlot]:
        """The slots that are filled before the block of this index and needed by it or a later one, in order."""
        needed = {slot for block in self.blocks[index:] for slot in block.reads}
        return [slot for block in self.blocks[:index] for slot in block.writes if slot in needed]


class SharedState:
    """The values of slots for all samples of one stream.

    Args:
        hidden: [N, T, H] of the stream; values are kept where it is kept.
    """

    def __init__(self, hidden: StateTensor) -> None:
        self._count, self._device = int(hidden.shape[0]), hidden.device
        self._file = hidden if isinstance(hidden, DiskTensor) else None
        self.values: dict[SharedSlot, StateTensor] = {}

    def offload(self) -> None:
        """Move all values off the device, and keep later ones on the CPU."""
        self._device = torch.device("cpu")
        self.values = {slot: v if isinstance(v, DiskTensor) else v.cpu() for slot, v in self.values.items()}

    def restore(self, slot: SharedSlot, value: torch.Tensor) -> None:
        """Take back the values of a slot for all samples [N, ...]."""
        new_empty = self.values[slot] = self._room(tuple(value.shape), value.dtype)
        new_empty[list(range(self._count))] = value.to(new_empty.device)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> StateTensor:
        if self._file is not None:
            return self._file.new_empty(dtype, shape)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def take(self, slot: SharedSlot, samples: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """The values of some samples, as the block takes them, where `like` is."""
        value = self.values[slot][list(samples)].to(like.device)
        return value.movedim(0, slot.batch)

    def put(self, slot: SharedSlot, samples: Sequence[int], tensor: torch.Tensor, block: str) -> None:
        """Keep what a block made for some samples. Raises UnsupportedError when it does not tell them apart."""
        if tensor.dim() <= slot.batch or tensor.shape[slot.batch] != len(samples):
            raise UnsupportedError(
                f"block {block!r} hands on a tensor of shape {list(tensor.shape)} in which {len(samples)} samples "
                f"cannot be told apart, so its blocks cannot be run one at a time; {DATA_FREE_ADVICE}"
            )
        rows = tensor.detach().movedim(slot.batch, 0)
        if slot not in self.values:
            self.values[slot] = self._room((self._count, *rows.shape[1:]), rows.dtype)
        kept = self.values[slot]
        kept[list(samples)] = rows.to(kept.device, kept.dtype)

    def forget(self, needed: Sequence[SharedSlot]) -> None:
        """Drop all values but these."""
        self.values = {slot: value for slot, value in self.values.items() if slot in needed}


def resolve_call(
    links: BlockDependencies, spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor],
    take: Callable[[SharedSlot], torch.Tensor],
) -> tuple[Any, dict[int, Any]]:  # fmt: skip
    """Arguments with what earlier blocks made, and the objects among them that the block may fill, by number."""
    leaves = [take(links.leaves[i]) if i in links.leaves else leaf for i, leaf in enumerate(leaves)]
    objects: dict[int, Any] = {}

    def fill(held: SharedObject, own: dict[Any, Any]) -> Any:
        if held.number == UNSHARED:
            return held.make(own)
        if held.number not in objects:
            given = {e.key: unflatten(e.spec, e.consts, [take(s) for s in e.slots])
                     for e in links.entries if e.number == held.number}  # fmt: skip
            objects[held.number] = held.make(own | given)
        return objects[held.number]

    return unflatten(spec, consts, leaves, fill), objects


def produced_tensor(slot: SharedSlot, output: Any, objects: Mapping[int, Any]) -> torch.Tensor | None:
    """The tensor that a block left in a slot; None where it did not."""
    kind, *place = slot.place
    if kind == "hidden":
        return hidden_of(output)
    if kind == "output":
        leaves = flatten(extra_outputs(output))[2]
    else:
        number, key, *place = place
        entries = entries_of(objects[number]) if number in objects else {}
        leaves = flatten(entries[key])[2] if key in entries else []
    return leaves[place[0]] if place[0] < len(leaves) else None
