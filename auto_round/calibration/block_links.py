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

StateTensor = torch.Tensor | DiskTensor
DATA_FREE_ADVICE = (
    "use model_free=True (--model_free), or iters=0 with disable_opt_rtn=True, which round weights without data"
)


@dataclass(frozen=True)
class HiddenLayout:
    """Dimensions of the hidden states of a model's blocks.

    Attributes:
        batch, tokens: index of the batch and of the token dimension.
        rest: sizes of the other dimensions, in order.
    """

    batch: int = 0
    tokens: int = 1
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, hidden: torch.Tensor, tokens: int) -> HiddenLayout | None:
        """The layout of one sample's hidden states; None when the batch or the token dimension cannot be found."""
        if hidden.dim() == 3 and hidden.shape[0] == 1:
            return cls(rest=(int(hidden.shape[2]),))  # also if the model puts a prompt before the tokens
        batch = batch_dim(hidden)
        others = [d for d in range(hidden.dim()) if d != batch]
        token_dim = next((d for d in others if hidden.shape[d] == tokens), None)
        if batch is None or token_dim is None or hidden.dim() < 3:
            return None
        return cls(batch, token_dim, tuple(hidden.shape[d] for d in others if d != token_dim))

    @property
    def plain(self) -> bool:
        """Whether the hidden states are [batch, tokens, width], so that no conversion is needed."""
        return (self.batch, self.tokens) == (0, 1) and len(self.rest) < 2

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convert hidden states of the blocks to rows [B, T, width]."""
        if self.plain:
            return hidden
        others = [d for d in range(hidden.dim()) if d not in (self.batch, self.tokens)]
        return hidden.permute(self.batch, self.tokens, *others).flatten(2)

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert rows [B, T, width] to hidden states of the blocks; a copy unless the layout is plain."""
        if self.plain:
            return rows
        others = [d for d in range(2 + len(self.rest)) if d not in (self.batch, self.tokens)]
        back = torch.tensor([self.batch, self.tokens, *others]).argsort().tolist()
        return rows.reshape(*rows.shape[:2], *self.rest).permute(*back).contiguous()


def batch_dim(tensor: torch.Tensor) -> int | None:
    """The batch dimension of a tensor of one sample: the first dimension of size one."""
    return next((d for d in range(tensor.dim()) if tensor.shape[d] == 1), None)


@dataclass(frozen=True)
class SharedSlot:
    """One tensor that a block produces for a later one.

    Attributes:
        writer: index of the block.
        place: where it is found: ("hidden",), ("output", leaf), or ("held", number, key, leaf).
        batch: the batch dimension.
    """

    writer: int
    place: tuple[Any, ...]
    batch: int


@dataclass(frozen=True)
class ObjectEntry:
    """An entry that a block writes to an object: a nested value whose tensors are slots."""

    number: int
    key: Any
    spec: Hashable
    consts: tuple[Any, ...]
    slots: tuple[SharedSlot, ...]


@dataclass(frozen=True)
class BlockDependencies:
    """What one block reads from earlier blocks and writes for later ones.

    Attributes:
        leaves: by position among the tensors of its arguments, the slot that provides the value.
        held: objects that blocks write to, by path in its arguments.
        entries: what earlier blocks have written to these objects.
        writes: slots that it fills and later blocks read.
    """

    leaves: Mapping[int, SharedSlot] = field(default_factory=dict)
    held: Mapping[ArgumentPath, SharedObject] = field(default_factory=dict)
    entries: tuple[ObjectEntry, ...] = ()
    writes: tuple[SharedSlot, ...] = ()

    @property
    def reads(self) -> set[SharedSlot]:
        """Slots that the block reads."""
        return {*self.leaves.values(), *(slot for entry in self.entries for slot in entry.slots)}


@dataclass(frozen=True)
class ModelDependencies:
    """Dependencies between the blocks of a model.

    Attributes:
        layout: of its hidden states.
        blocks: dependencies of each block, in order.
        kinds: by class of block, its outputs after the hidden states; None when it returns the hidden states alone.
        changes_hidden: a block modifies its hidden states in place.
    """

    layout: HiddenLayout = HiddenLayout()
    blocks: tuple[BlockDependencies, ...] = ()
    kinds: Mapping[type, tuple[Any, ...] | None] = field(default_factory=dict)
    changes_hidden: bool = False

    def block(self, index: int) -> BlockDependencies:
        """Dependencies of one block; empty when none are known."""
        return self.blocks[index] if self.blocks else BlockDependencies()

    def alive(self, index: int) -> list[SharedSlot]:
        """Slots that are filled before this block and read by it or a later one, in order."""
        needed = {slot for block in self.blocks[index:] for slot in block.reads}
        return [slot for block in self.blocks[:index] for slot in block.writes if slot in needed]


class SharedState:
    """The values of slots for all samples of one stream.

    Args:
        hidden: hidden states [N, T, H] of the stream; values are stored on the same device or in the same file.
    """

    def __init__(self, hidden: StateTensor) -> None:
        self._count, self._device = int(hidden.shape[0]), hidden.device
        self._file = hidden if isinstance(hidden, DiskTensor) else None
        self.values: dict[SharedSlot, StateTensor] = {}

    def offload(self) -> None:
        """Move all values to the CPU, and store later ones there."""
        self._device = torch.device("cpu")
        self.values = {slot: v if isinstance(v, DiskTensor) else v.cpu() for slot, v in self.values.items()}

    def restore(self, slot: SharedSlot, value: torch.Tensor) -> None:
        """Set the values of a slot for all samples [N, ...], for a resumed run."""
        values = self.values[slot] = self._empty(tuple(value.shape), value.dtype)
        values[list(range(self._count))] = value.to(values.device)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> StateTensor:
        if self._file is not None:
            return self._file.new_empty(dtype, shape)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def take(self, slot: SharedSlot, samples: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """The values of some samples in the shape that the block expects, on the device of `like`."""
        value = self.values[slot][list(samples)].to(like.device)
        return value.movedim(0, slot.batch)

    def put(self, slot: SharedSlot, samples: Sequence[int], tensor: torch.Tensor, block: str) -> None:
        """Store what a block produced for some samples. Raises UnsupportedError without a batch dimension."""
        if tensor.dim() <= slot.batch or tensor.shape[slot.batch] != len(samples):
            raise UnsupportedError(
                f"block {block!r} passes on a tensor of shape {list(tensor.shape)} without a batch dimension for "
                f"{len(samples)} samples, so its blocks cannot run one at a time; {DATA_FREE_ADVICE}"
            )
        rows = tensor.detach().movedim(slot.batch, 0)
        if slot not in self.values:
            self.values[slot] = self._empty((self._count, *rows.shape[1:]), rows.dtype)
        stored = self.values[slot]
        stored[list(samples)] = rows.to(stored.device, stored.dtype)

    def forget(self, needed: Sequence[SharedSlot]) -> None:
        """Drop the values of all other slots."""
        self.values = {slot: value for slot, value in self.values.items() if slot in needed}


def resolve_call(
    links: BlockDependencies, spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor],
    take: Callable[[SharedSlot], torch.Tensor],
) -> tuple[Any, dict[int, Any]]:  # fmt: skip
    """Fill in what earlier blocks produced: (arguments, objects that the block may write to, by number)."""
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
    """The tensor that a block left in a slot; None when it left none."""
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
