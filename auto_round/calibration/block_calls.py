"""Calls of a model's blocks: replaced forwards, nested arguments, hidden states, and tensors that blocks share.

Gemma 4 shares keys and values of one layer with later ones through a dictionary, GLM's sparse attention passes the
selected positions from layer to layer, Zaya passes a second state. Each such tensor has a `SharedSlot`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from auto_round.calibration.disk_store import ActivationTensor, DiskStore, DiskTensor, empty_beside
from auto_round.errors import ModelError, UnsupportedError
from auto_round.files import bytes_of
from auto_round.modeling.partial_loading import check_not_meta
from auto_round.modeling.source import ModelSource

ArgumentPath = tuple[Any, ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any], str | None]
"""Arguments of a block beside its hidden states: positional and keyword ones, and the hidden states' own keyword."""
BlockForward = Callable[[int, nn.Module, Callable[..., Any], torch.Tensor, Arguments], Any]
"""What runs instead of a block: gets its index, itself, a function that runs it, hidden states, other arguments."""
DATA_FREE_ADVICE = (
    "use model_free=True (--model_free), or iters=0 with disable_opt_rtn=True, which round weights without data"
)
_MIN_DISK_BYTES = 1 << 16  # smaller tensors stay in memory


class ForwardStopped(Exception):
    """Ends a forward pass early; its argument, if any, is the tensor found there."""


def run_model(
    source: ModelSource, samples: Sequence[dict[str, torch.Tensor]], device: torch.device, forward: BlockForward,
    stop_at: nn.Module | None = None,
) -> Any:  # fmt: skip
    """Run the whole model on a batch of samples without a key-value cache, with `forward` instead of its blocks.
    Returns its output, or what `ForwardStopped` carried: the input of `stop_at` if that was reached, else None."""

    def replacement(index: int, name: str, block: nn.Module) -> Callable[..., Any]:
        own = partial(call_block, block.forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            check_not_meta((args, kwargs), name, source)
            if args and isinstance(args[0], torch.Tensor):
                return forward(index, block, own, args[0], (args[1:], kwargs, None))
            if isinstance(kwargs.get("hidden_states"), torch.Tensor):
                return forward(index, block, own, kwargs.pop("hidden_states"), (args, kwargs, "hidden_states"))
            raise ModelError(
                f"a decoder block is called without hidden states (arguments: {', '.join(kwargs) or 'none'})"
            )

        return run

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise ForwardStopped(args[0])

    with ExitStack() as stack:
        if stop_at is not None:
            stack.enter_context(stop_at.register_forward_pre_hook(stop, prepend=True))
        for index, name in enumerate(source.blocks):
            block = source.model.get_submodule(name)
            before = {key: value for key, value in vars(block).items() if key == "forward"}
            vars(block)["forward"] = replacement(index, name, block)
            stack.callback(vars(block).update, before)
            stack.callback(vars(block).pop, "forward")
        batch = {key: torch.stack([s[key] for s in samples]).to(device) for key in samples[0]}
        try:
            return source.model(**batch, use_cache=False, return_dict=True)
        except ForwardStopped as stopped:
            return stopped.args[0] if stopped.args else None


def call_block(block: Callable[..., Any], hidden: torch.Tensor, arguments: Arguments) -> Any:
    """Call a block with hidden states and the other arguments."""
    args, kwargs, key = arguments
    return block(hidden, *args, **kwargs) if key is None else block(*args, **{key: hidden}, **kwargs)


def split_output(output: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """A block's hidden states and the outputs after them; None when it returns the hidden states alone."""
    return (output[0], tuple(output[1:])) if isinstance(output, (tuple, list)) and output else (output, None)


def checked_output(
    source: ModelSource, index: int, output: Any, hidden: torch.Tensor
) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
    """`split_output`. Raises ModelError when the hidden states have another shape than those of the input."""
    first, rest = split_output(output)
    if not isinstance(first, torch.Tensor) or first.shape != hidden.shape:
        name = source.blocks[index]
        raise ModelError(
            f"block {name!r} ({type(source.model.get_submodule(name)).__name__}) does not return hidden states of the "
            f"shape that it gets; {DATA_FREE_ADVICE}"
        )
    return first, rest


def hidden_changed(source: ModelSource, index: int) -> UnsupportedError:
    """The error for a model that changes the hidden states before the block of this index."""
    return UnsupportedError(
        f"{type(source.model).__name__} changes the hidden states between its blocks, before "
        f"{source.blocks[index]!r}; only models whose blocks follow each other directly are supported; "
        f"{DATA_FREE_ADVICE}"
    )


@dataclass(frozen=True, eq=False)
class NestedValue:
    """A nested value, such as a block's arguments, in parts: structure, constants and tensors, each in order."""

    spec: Any  # hashable; has placeholders for tensors and constants
    consts: tuple[Any, ...]
    leaves: tuple[Any, ...]  # tensors, on disk once they are recorded

    @property
    def structure(self) -> Hashable:
        """Equal for two values that differ only in the values of tensors of equal shape and dtype."""
        consts = tuple(c if isinstance(c, (type(None), bool, int, float, str)) else id(c) for c in self.consts)
        return self.spec, consts, tuple((tuple(t.shape), t.dtype) for t in self.leaves)

    def build(
        self, leaves: Sequence[Any] | None = None,
        make_shared: Callable[[type, int, dict[Any, Any]], Any] | None = None,
    ) -> Any:  # fmt: skip
        """Rebuild the value, with other tensors if given; `make_shared` makes what blocks write to (class, number)."""
        rest_consts, rest_leaves = iter(self.consts), iter(self.leaves if leaves is None else leaves)

        def visit(node: Any) -> Any:
            if node == "tensor":
                return next(rest_leaves)
            if node == "const":
                return next(rest_consts)
            kind, number, parts = node
            entries = {key: visit(part) for key, part in parts}
            if number is None or make_shared is None:
                return make_container(kind, entries)
            return make_shared(kind, number, entries)

        return visit(self.spec)


def entries_of(container: Any) -> dict[Any, Any]:
    """Entries of a mapping by key, of a list or tuple by index, of any other object by attribute."""
    if isinstance(container, Mapping):
        return dict(container.items())
    return dict(enumerate(container)) if isinstance(container, (list, tuple)) else dict(vars(container))


def make_container(kind: type, entries: Mapping[Any, Any]) -> Any:
    """Create a container of this class with the entries of `entries_of`."""
    if issubclass(kind, MutableMapping):
        mapping = kind()
        mapping.update(entries)
        return mapping
    if issubclass(kind, (list, tuple)):
        items = [entries[key] for key in sorted(entries)]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    made: Any = kind.__new__(kind)
    made.__dict__.update(entries)
    return made


def flatten(
    value: Any, shared: Mapping[ArgumentPath, int] | None = None,
    written: Callable[[int], Collection[Any]] = lambda _: (),
) -> NestedValue:  # fmt: skip
    """Split nested containers into structure, constants and tensors; key-value caches become None. `shared` numbers the
    objects inside that blocks write to, by path; `written` gives the entries of such an object to leave out."""
    consts: list[Any] = []
    leaves: list[torch.Tensor] = []

    def visit(item: Any, path: ArgumentPath) -> Hashable:
        if isinstance(item, torch.Tensor):
            leaves.append(item)
            return "tensor"
        number = shared.get(path) if shared is not None else None
        if number is None and not isinstance(item, (MutableMapping, list, tuple)):
            # A key-value cache would grow whenever the block runs again.
            consts.append(None if hasattr(item, "get_seq_length") else item)
            return "const"
        left_out = () if number is None else written(number)
        entries = [(key, entry) for key, entry in entries_of(item).items() if key not in left_out]
        return type(item), number, tuple((key, visit(entry, (*path, key))) for key, entry in entries)

    spec = visit(value, ())
    return NestedValue(spec, tuple(consts), tuple(leaves))


def mutable_objects(value: Any) -> dict[ArgumentPath, Any]:
    """Objects in nested arguments that a block could change, by their path."""
    found: dict[ArgumentPath, Any] = {}

    def visit(item: Any, path: ArgumentPath) -> None:
        if item is None or isinstance(item, (torch.Tensor, str, bytes, int, float, type, torch.dtype, torch.device)):
            return
        if isinstance(item, (Mapping, list, tuple)):
            if isinstance(item, (MutableMapping, list)):
                found[path] = item
            for key, entry in entries_of(item).items():
                visit(entry, (*path, key))
        elif not callable(item) and not hasattr(item, "get_seq_length") and hasattr(item, "__dict__"):
            found[path] = item

    visit(value, ())
    return {path: item for path, item in found.items() if len(path) > 1}  # without the dict of all keyword arguments


class TensorPool:
    """Stores tensors by content, so that a table that all blocks share is stored once; large ones in `disk_store`."""

    def __init__(self, device: torch.device, disk_store: DiskStore | None = None) -> None:
        self.device, self.disk_store = device, disk_store
        self._by_content: dict[Hashable, ActivationTensor] = {}
        self._by_object: dict[int, tuple[torch.Tensor, ActivationTensor]] = {}

    def put(self, tensor: torch.Tensor) -> ActivationTensor:
        """Store a copy of `tensor` in its dtype; the same object is returned for equal contents."""
        seen = self._by_object.get(id(tensor))
        if seen is not None:
            return seen[1]
        flat = tensor.detach().to("cpu").contiguous()
        key = (hashlib.blake2b(bytes_of(flat), digest_size=16).digest(), tuple(flat.shape), flat.dtype)
        if key not in self._by_content and self.disk_store is not None and flat.nbytes >= _MIN_DISK_BYTES:
            self._by_content[key] = self.disk_store.put(flat)
        elif key not in self._by_content:
            copy = flat.to(self.device)
            self._by_content[key] = copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy
        self._by_object[id(tensor)] = (tensor, self._by_content[key])  # the reference prevents reuse of the id
        return self._by_content[key]

    def end_of_sample(self) -> None:
        self._by_object.clear()


@dataclass(frozen=True)
class HiddenLayout:
    """Dimensions of the hidden states of blocks, stored as rows [batch, tokens, all others]. Hyper-connections have
    several streams ([batch, tokens, streams, width]), Gemma 3n has them in front, XLNet has tokens first."""

    batch: int = 0
    tokens: int = 1
    rest: tuple[int, ...] = ()  # sizes of the other dimensions, in order

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
        return (self.batch, self.tokens) == (0, 1) and len(self.rest) < 2

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
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
    """One tensor that a block produces for a later one, in an entry of a shared object or in its output."""

    writer: int  # index of the block
    number: int | None  # the shared object; None for the block's output
    key: Any  # the entry
    leaf: int  # position among the tensors of that entry or output
    batch: int  # the batch dimension

    def find(self, output: Any, objects: Mapping[int, Any]) -> torch.Tensor | None:
        """The tensor in a block's output and shared objects; None when the block made none."""
        value = output
        if self.number is not None:
            value = entries_of(objects[self.number]).get(self.key) if self.number in objects else None
        leaves: Sequence[Any] = flatten(value).leaves
        return leaves[self.leaf] if self.leaf < len(leaves) else None


@dataclass(frozen=True)
class ObjectEntry:
    """An entry that a block writes to a shared object: a nested value whose tensors are slots."""

    number: int
    key: Any
    value: NestedValue
    slots: tuple[SharedSlot, ...]


@dataclass(frozen=True)
class BlockDependencies:
    """What one block reads from earlier blocks and writes for later ones."""

    # By position among the tensors of its arguments, the slot that provides the value.
    leaves: Mapping[int, SharedSlot] = field(default_factory=dict)
    # Numbers of the objects that blocks write to, by path in its arguments; an object has one number in all blocks.
    objects: Mapping[ArgumentPath, int] = field(default_factory=dict)
    entries: tuple[ObjectEntry, ...] = ()  # what earlier blocks have written to these objects
    writes: tuple[SharedSlot, ...] = ()  # slots that it fills and later blocks read

    @property
    def reads(self) -> set[SharedSlot]:
        return {*self.leaves.values(), *(slot for entry in self.entries for slot in entry.slots)}

    def arguments(
        self, call: NestedValue, leaves: Sequence[torch.Tensor], take: Callable[[SharedSlot], torch.Tensor]
    ) -> tuple[Any, dict[int, Any]]:
        """The arguments of a call, with what earlier blocks produced, and the shared objects in them by number."""
        leaves = [take(self.leaves[i]) if i in self.leaves else leaf for i, leaf in enumerate(leaves)]
        objects: dict[int, Any] = {}

        def make_shared(kind: type, number: int, own: dict[Any, Any]) -> Any:
            if number not in objects:
                given = [entry for entry in self.entries if entry.number == number]
                values = {entry.key: entry.value.build([take(slot) for slot in entry.slots]) for entry in given}
                objects[number] = make_container(kind, own | values)
            return objects[number]

        return call.build(leaves, make_shared), objects


@dataclass(frozen=True)
class ModelDependencies:
    """Dependencies between the blocks of a model."""

    layout: HiddenLayout = HiddenLayout()
    blocks: tuple[BlockDependencies, ...] = ()  # empty when none are known
    # By class of block, its outputs after the hidden states; None when it returns the hidden states alone.
    kinds: dict[type, tuple[Any, ...] | None] = field(default_factory=dict)
    changes_hidden: bool = False  # a block modifies its hidden states in place

    def block(self, index: int) -> BlockDependencies:
        return self.blocks[index] if self.blocks else BlockDependencies()

    def output(self, block: nn.Module, hidden: torch.Tensor) -> Any:
        """What a block returns with these hidden states when it does not run."""
        rest = self.kinds[type(block)]
        return hidden if rest is None else (hidden, *rest)

    def slots_needed_from(self, index: int) -> list[SharedSlot]:
        """Slots that are filled before this block and read by it or a later one, in order."""
        needed = {slot for block in self.blocks[index:] for slot in block.reads}
        return [slot for block in self.blocks[:index] for slot in block.writes if slot in needed]


class SharedState:
    """The values of slots for all samples of one stream, stored where its hidden states [N, T, H] are."""

    def __init__(self, hidden: ActivationTensor) -> None:
        self._count = int(hidden.shape[0])
        self._beside = hidden if isinstance(hidden, DiskTensor) else hidden.new_empty(0)
        self.values: dict[SharedSlot, ActivationTensor] = {}

    def offload(self) -> None:
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
        self.values = {slot: value for slot, value in self.values.items() if slot in slots}
