"""Record the arguments of a decoder block's call: their nested structure, and each distinct tensor once.

`flatten` and `unflatten` convert between nested arguments and (structure, constants, tensors). `TensorPool`
stores tensors by content, so a rotary table that all blocks share is held once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.calibration.disk_store import DiskStore, DiskTensor
from auto_round.errors import ModelError

ArgumentPath = tuple[Any, ...]
_MIN_DISK_BYTES = 1 << 16  # smaller tensors stay in memory


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of one call of a block, without the hidden states.

    Attributes:
        spec: nested structure with placeholders for tensors and constants; hashable.
        consts: everything that is not a tensor, in the order of the structure.
        leaves: the tensors, in the order of the structure.
    """

    spec: Hashable
    consts: tuple[Any, ...]
    leaves: tuple[torch.Tensor | DiskTensor, ...]

    @property
    def structure(self) -> Hashable:
        """Equal for two calls that differ only in the values of tensors of equal shape and dtype."""
        return self.spec, tuple(map(_const_key, self.consts)), tuple((tuple(t.shape), t.dtype) for t in self.leaves)


UNSHARED = -1  # number of a mapping that no block writes to


@dataclass(frozen=True)
class SharedObject:
    """Placeholder of an object that blocks write to.

    Attributes:
        number: identifies the object; blocks that get the same object have the same number.
        kind: its class.
    """

    number: int
    kind: type

    def make(self, entries: Mapping[Any, Any]) -> Any:
        """Create an object of the class with these entries."""
        if issubclass(self.kind, MutableMapping):
            mapping = self.kind()
            mapping.update(entries)
            return mapping
        if issubclass(self.kind, list):
            return self.kind(entries[key] for key in sorted(entries))
        kind: Any = self.kind
        made = kind.__new__(kind)
        made.__dict__.update(entries)
        return made


def entries_of(container: Any) -> dict[Any, Any]:
    """Current entries of an object: items of a mapping, members of a list by index, or attributes."""
    if isinstance(container, Mapping):
        return dict(container.items())
    if isinstance(container, list):
        return dict(enumerate(container))
    return dict(vars(container))


def flatten(
    value: Any,
    held: Mapping[ArgumentPath, SharedObject] | None = None,
    filled: Callable[[int], Collection[Any]] = lambda _: (),
) -> tuple[Hashable, list[Any], list[torch.Tensor]]:
    """Split nested dicts, lists and tuples into structure, constants and tensors. Key-value caches become None.

    Args:
        value: the nested arguments.
        held: objects inside that blocks write to, by their path.
        filled: given such an object's number, the entries that blocks have written, which are left out.
    """
    consts: list[Any] = []
    leaves: list[torch.Tensor] = []

    def visit(item: Any, path: ArgumentPath) -> Hashable:
        if isinstance(item, torch.Tensor):
            leaves.append(item)
            return "tensor"
        if held is not None and path in held:
            own = {k: v for k, v in entries_of(item).items() if k not in filled(held[path].number)}
            return ("held", held[path], tuple((key, visit(entry, (*path, key))) for key, entry in own.items()))
        if isinstance(item, dict) and type(item) is dict:
            return ("dict", tuple((key, visit(entry, (*path, key))) for key, entry in item.items()))
        if isinstance(item, MutableMapping):
            entries = tuple((key, visit(entry, (*path, key))) for key, entry in item.items())
            return ("held", SharedObject(UNSHARED, type(item)), entries)
        if isinstance(item, (list, tuple)):
            return (type(item), tuple(visit(entry, (*path, index)) for index, entry in enumerate(item)))
        # A key-value cache would grow whenever the block runs again.
        consts.append(None if hasattr(item, "get_seq_length") else item)
        return "const"

    spec = visit(value, ())
    return spec, consts, leaves


def unflatten(
    spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor],
    fill: Callable[[SharedObject, dict[Any, Any]], Any] = lambda held, entries: held.make(entries),
) -> Any:  # fmt: skip
    """Rebuild the nested value of `flatten` with other tensors.

    `fill` creates the objects that blocks write to, from the entries that they had before.
    """
    rest_consts, rest_leaves = iter(consts), iter(leaves)

    def build(node: Any) -> Any:
        if node == "tensor":
            return next(rest_leaves)
        if node == "const":
            return next(rest_consts)
        if node[0] == "held":
            return fill(node[1], {key: build(entry) for key, entry in node[2]})
        kind, entries = node
        if kind == "dict":
            return {key: build(entry) for key, entry in entries}
        items = [build(entry) for entry in entries]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    return build(spec)


def mutable_objects(value: Any) -> dict[ArgumentPath, Any]:
    """Objects in nested arguments that a block could change, by their path."""
    found: dict[ArgumentPath, Any] = {}

    def visit(item: Any, path: ArgumentPath) -> None:
        if item is None or isinstance(item, (torch.Tensor, str, bytes, int, float, type, torch.dtype, torch.device)):
            return
        if isinstance(item, (MutableMapping, list)):
            found[path] = item
        if isinstance(item, (Mapping, list, tuple)):
            for key, entry in enumerate(item) if isinstance(item, tuple) else entries_of(item).items():
                visit(entry, (*path, key))
        elif not callable(item) and not hasattr(item, "get_seq_length") and hasattr(item, "__dict__"):
            found[path] = item

    for index, part in enumerate(value):
        visit(part, (index,))
    return {path: item for path, item in found.items() if len(path) > 1}


def call_block(block: Callable[..., Any], hidden: torch.Tensor, arguments: tuple[Any, Any, str | None]) -> Any:
    """Call a block with hidden states and (args, kwargs, keyword of the hidden states, or None for positional)."""
    args, kwargs, key = arguments
    return block(hidden, *args, **kwargs) if key is None else block(*args, **{key: hidden}, **kwargs)


def load_tensor(leaf: torch.Tensor | DiskTensor) -> torch.Tensor:
    """Read a tensor from the disk store; a tensor in memory is returned unchanged."""
    return leaf.read() if isinstance(leaf, DiskTensor) else leaf


def split_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, Any], str | None]:
    """Split arguments into the hidden states, the other (args, kwargs), and the keyword of the hidden states.

    The keyword is None when they are positional. Raises ModelError when there are none.
    """
    if args and isinstance(args[0], torch.Tensor):
        return args[0], (args[1:], kwargs), None
    key = "hidden_states"
    if isinstance(kwargs.get(key), torch.Tensor):
        return kwargs[key], (args, {k: v for k, v in kwargs.items() if k != key}), key
    raise ModelError(f"a decoder block is called without hidden states (arguments: {', '.join(kwargs) or 'none'})")


def hidden_of(output: Any) -> Any:
    """The hidden states in the output of a block: the output itself, or the first entry of a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def extra_outputs(output: Any) -> tuple[Any, ...] | None:
    """The outputs of a block after the hidden states; None when it returns the hidden states alone."""
    return tuple(output[1:]) if isinstance(output, (tuple, list)) else None


class TensorPool:
    """Stores tensors by content: a rotary table that all blocks and samples share is stored once.

    Large tensors are stored in `disk_store`, if there is one.
    """

    def __init__(self, device: torch.device, disk_store: DiskStore | None = None) -> None:
        self.device, self.disk_store = device, disk_store
        self._by_content: dict[Hashable, torch.Tensor | DiskTensor] = {}
        self._by_object: dict[int, tuple[torch.Tensor, torch.Tensor | DiskTensor]] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor | DiskTensor:
        """Store a copy of `tensor` in its dtype; the same object is returned for equal contents."""
        seen = self._by_object.get(id(tensor))
        if seen is not None:
            return seen[1]
        flat = tensor.detach().to("cpu").contiguous()
        digest = hashlib.blake2b(flat.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).digest()
        key = (digest, tuple(flat.shape), flat.dtype)
        if key not in self._by_content and self.disk_store is not None and flat.nbytes >= _MIN_DISK_BYTES:
            self._by_content[key] = self.disk_store.put(flat)
        elif key not in self._by_content:
            copy = flat.to(self.device)
            self._by_content[key] = copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy
        self._by_object[id(tensor)] = (tensor, self._by_content[key])  # the reference prevents reuse of the id
        return self._by_content[key]

    def end_of_sample(self) -> None:
        """Forget the identities of the tensors seen; their contents stay."""
        self._by_object.clear()


def batch_dims(single: Sequence[torch.Tensor | DiskTensor], double: Sequence[torch.Tensor]) -> tuple[int | None, ...]:
    """For each tensor, the dimension that doubles with the batch size; None for a tensor independent of it."""
    dims: list[int | None] = []
    for one, two in zip(single, double, strict=True):
        grown = [d for d in range(one.dim()) if two.dim() == one.dim() and two.shape[d] == 2 * one.shape[d] != 0]
        dims.append(grown[0] if grown else None)
    return tuple(dims)


def join(tensors: Sequence[torch.Tensor], dim: int | None) -> torch.Tensor:
    """Concatenate tensors of single samples to a batch; equal ones become a view if the batch dimension is 1."""
    first = tensors[0]
    if dim is None or len(tensors) == 1:
        return first
    if all(t is first for t in tensors) and first.shape[dim] == 1:
        sizes = [-1] * first.dim()
        sizes[dim] = len(tensors)
        return first.expand(sizes)
    return torch.cat(list(tensors), dim=dim)


def _const_key(value: Any) -> Hashable:
    return value if isinstance(value, (type(None), bool, int, float, str)) else id(value)
