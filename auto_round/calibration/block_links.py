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
    DATA_FREE_ADVICE,
    ArgumentPath,
    BlockCall,
    entries_of,
    flatten,
    make_container,
    unflatten,
)
from auto_round.calibration.disk_store import ActivationTensor, DiskTensor, empty_beside
from auto_round.errors import UnsupportedError


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
        return hidden if self.plain else hidden.movedim((self.batch, self.tokens), (0, 1)).flatten(2)

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert rows [B, T, width] to hidden states of the blocks; a copy unless the layout is plain."""
        if self.plain:
            return rows
        return rows.unflatten(2, self.rest).movedim((0, 1), (self.batch, self.tokens)).contiguous()


def batch_dim(tensor: torch.Tensor) -> int | None:
    """The batch dimension of a tensor of one sample: the first dimension of size one."""
    return next((d for d in range(tensor.dim()) if tensor.shape[d] == 1), None)


@dataclass(frozen=True)
class SharedSlot:
    """One tensor that a block produces for a later one.

    Attributes:
        writer: index of the block.
        number, key: the shared object and its entry that hold the tensor; None when the block returns it.
        leaf: position among the tensors of that entry, or of the block's output.
        batch: the batch dimension.
    """

    writer: int
    number: int | None
    key: Any
    leaf: int
    batch: int

    def find(self, output: Any, objects: Mapping[int, Any]) -> torch.Tensor | None:
        """The tensor in a block's output and shared objects; None when the block made none."""
        if self.number is None:
            leaves = flatten(output)[2]
        else:
            entries = entries_of(objects[self.number]) if self.number in objects else {}
            leaves = flatten(entries[self.key])[2] if self.key in entries else []
        return leaves[self.leaf] if self.leaf < len(leaves) else None


@dataclass(frozen=True)
class ObjectEntry:
    """An entry that a block writes to a shared object: a nested value whose tensors are slots."""

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
        objects: numbers of the objects that blocks write to, by path in its arguments. Blocks that get the same object
            have the same number.
        entries: what earlier blocks have written to these objects.
        writes: slots that it fills and later blocks read.
    """

    leaves: Mapping[int, SharedSlot] = field(default_factory=dict)
    objects: Mapping[ArgumentPath, int] = field(default_factory=dict)
    entries: tuple[ObjectEntry, ...] = ()
    writes: tuple[SharedSlot, ...] = ()

    @property
    def reads(self) -> set[SharedSlot]:
        """Slots that the block reads."""
        return {*self.leaves.values(), *(slot for entry in self.entries for slot in entry.slots)}

    def arguments(
        self, call: BlockCall, leaves: Sequence[torch.Tensor], take: Callable[[SharedSlot], torch.Tensor]
    ) -> tuple[Any, dict[int, Any]]:
        """Rebuild the arguments of a call from its tensors and from what earlier blocks produced.

        Returns (arguments, shared objects that the block may write to, by number).
        """
        leaves = [take(self.leaves[i]) if i in self.leaves else leaf for i, leaf in enumerate(leaves)]
        objects: dict[int, Any] = {}

        def make_shared(kind: type, number: int, own: dict[Any, Any]) -> Any:
            if number not in objects:
                given = [entry for entry in self.entries if entry.number == number]
                values = {e.key: unflatten(e.spec, e.consts, [take(slot) for slot in e.slots]) for e in given}
                objects[number] = make_container(kind, own | values)
            return objects[number]

        return unflatten(call.spec, call.consts, leaves, make_shared), objects


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

    def slots_needed_from(self, index: int) -> list[SharedSlot]:
        """Slots that are filled before this block and read by it or a later one, in order."""
        needed = {slot for block in self.blocks[index:] for slot in block.reads}
        return [slot for block in self.blocks[:index] for slot in block.writes if slot in needed]


class SharedState:
    """The values of slots for all samples of one stream.

    Args:
        hidden: hidden states [N, T, H] of the stream; values are stored on the same device or in the same file.
    """

    def __init__(self, hidden: ActivationTensor) -> None:
        self._count = int(hidden.shape[0])
        self._beside = hidden if isinstance(hidden, DiskTensor) else hidden.new_empty(0)
        self.values: dict[SharedSlot, ActivationTensor] = {}

    def offload(self) -> None:
        """Move all values to the CPU, and store later ones there."""
        self._beside = self._beside if isinstance(self._beside, DiskTensor) else self._beside.cpu()
        self.values = {slot: v if isinstance(v, DiskTensor) else v.cpu() for slot, v in self.values.items()}

    def restore(self, slot: SharedSlot, value: torch.Tensor) -> None:
        """Set the values of a slot for all samples [N, ...], for a resumed run."""
        self.values[slot] = empty_beside(self._beside, tuple(value.shape), value.dtype)
        self.values[slot][:] = value

    def take(self, slot: SharedSlot, samples: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """The values of some samples in the shape that the block expects, on the device of `like`."""
        return self.values[slot][list(samples)].to(like.device).movedim(0, slot.batch)

    def put(self, slot: SharedSlot, samples: Sequence[int], tensor: torch.Tensor, block: str) -> None:
        """Store what a block produced for some samples. Raises UnsupportedError without a batch dimension."""
        if tensor.dim() <= slot.batch or tensor.shape[slot.batch] != len(samples):
            raise UnsupportedError(
                f"block {block!r} passes on a tensor of shape {list(tensor.shape)} without a batch dimension for "
                f"{len(samples)} samples, so its blocks cannot run one at a time; {DATA_FREE_ADVICE}"
            )
        rows = tensor.detach().movedim(slot.batch, 0)
        if slot not in self.values:
            self.values[slot] = empty_beside(self._beside, (self._count, *rows.shape[1:]), rows.dtype)
        stored = self.values[slot]
        stored[list(samples)] = rows.to(stored.device, stored.dtype)

    def keep_only(self, slots: Sequence[SharedSlot]) -> None:
        """Drop the values of all other slots."""
        self.values = {slot: value for slot, value in self.values.items() if slot in slots}
