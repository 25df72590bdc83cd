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
    """The arguments of one call of a block beside the hidden states.

    Attributes:
        spec: nested structure with the places of tensors and constants; hashable.
        consts: everything that is not a tensor, in the order of the structure.
        leaves: the tensors, in the order of the structure.
    """

    spec: Hashable
    consts: tuple[Any, ...]
    leaves: tuple[torch.Tensor | DiskTensor, ...]

    @property
    def structure(self) -> Hashable:
        """Equal for two calls that differ in nothing but tensors of equal shape."""
        return self.spec, tuple(map(_const_key, self.consts)), tuple((tuple(t.shape), t.dtype) for t in self.leaves)


UNSHARED = -1  # a mapping that no block fills


@dataclass(frozen=True)
class SharedObject:
    """The place of an object that blocks fill: which one of the model's it is, and its class.

    Attributes:
        number: counts such objects; blocks that are handed the same one have the same number.
        kind: its class.
    """

    number: int
    kind: type

    def make(self, entries: Mapping[Any, Any]) -> Any:
        """A new object of the class with these entries."""
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
    """What an object that blocks may fill holds now: entries, members by index, or attributes."""
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
    """Structure, constants and tensors of nested dicts, lists and tuples. Key-value caches become None.

    Args:
        value: to take apart.
        held: objects inside that blocks fill, by their path.
        filled: given such an object's number, the entries that blocks have put there, which are left out.
    """
    consts: list[Any] = []
    leaves: list[torch.Tensor] = []

    def walk(item: Any, path: ArgumentPath) -> Hashable:
        if isinstance(item, torch.Tensor):
            leaves.append(item)
            return "tensor"
        if held is not None and path in held:
            own = {k: v for k, v in entries_of(item).items() if k not in filled(held[path].number)}
            return ("held", held[path], tuple((key, walk(entry, (*path, key))) for key, entry in own.items()))
        if isinstance(item, dict) and type(item) is dict:
            return ("dict", tuple((key, walk(entry, (*path, key))) for key, entry in item.items()))
        if isinstance(item, MutableMapping):
            entries = tuple((key, walk(entry, (*path, key))) for key, entry in item.items())
            return ("held", SharedObject(UNSHARED, type(item)), entries)
        if isinstance(item, (list, tuple)):
            return (type(item), tuple(walk(entry, (*path, index)) for index, entry in enumerate(item)))
        # A cache would grow every time that the block runs again.
        consts.append(None if hasattr(item, "get_seq_length") else item)
        return "const"

    spec = walk(value, ())
    return spec, consts, leaves


def unflatten(
    spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor],
    fill: Callable[[SharedObject, dict[Any, Any]], Any] = lambda held, entries: held.make(entries),
) -> Any:  # fmt: skip
    """The nested value that `flatten` took apart, with other tensors. `fill` makes the objects that blocks fill, of
    the entries that they had before."""
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
    """The objects in nested arguments that a block could change, by their path."""
    found: dict[ArgumentPath, Any] = {}

    def walk(item: Any, path: ArgumentPath) -> None:
        if item is None or isinstance(item, (torch.Tensor, str, bytes, int, float, type, torch.dtype, torch.device)):
            return
        if isinstance(item, (MutableMapping, list)):
            found[path] = item
        if isinstance(item, (Mapping, list, tuple)):
            for key, entry in entries_of(item).items() if not isinstance(item, tuple) else enumerate(item):
                walk(entry, (*path, key))
        elif not callable(item) and not hasattr(item, "get_seq_length") and hasattr(item, "__dict__"):
            found[path] = item

    for index, part in enumerate(value):
        walk(part, (index,))
    return {path: item for path, item in found.items() if len(path) > 1}


def load_tensor(leaf: torch.Tensor | DiskTensor) -> torch.Tensor:
    """The tensor, read where it lies in a file."""
    return leaf.read() if isinstance(leaf, DiskTensor) else leaf


def split_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, Any], str | None]:
    """The hidden states, the other (args, kwargs), and the keyword under which they came; None when positional."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], (args[1:], kwargs), None
    key = "hidden_states"
    if isinstance(kwargs.get(key), torch.Tensor):
        return kwargs[key], (args, {k: v for k, v in kwargs.items() if k != key}), key
    raise ModelError(f"a decoder block is called without hidden states (arguments: {', '.join(kwargs) or 'none'})")


def hidden_of(output: Any) -> Any:
    """The hidden states in what a block returns, alone or first in a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def extra_outputs(output: Any) -> tuple[Any, ...] | None:
    """What a block returns beside them; None where it returns them alone."""
    return tuple(output[1:]) if isinstance(output, (tuple, list)) else None


class TensorPool:
    """Tensors by content: the same rotary table of all blocks and samples is held once. With `disk_store`, large ones
    lie in
    that file."""

    def __init__(self, device: torch.device, disk_store: DiskStore | None = None) -> None:
        self.device, self.disk_store = device, disk_store
        self._by_content: dict[Hashable, torch.Tensor | DiskTensor] = {}
        self._by_object: dict[int, tuple[torch.Tensor, torch.Tensor | DiskTensor]] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor | DiskTensor:
        """A copy of `tensor` on the store's device, the same object for equal contents. The dtype is kept."""
        seen = self._by_object.get(id(tensor))
        if seen is not None:
            return seen[1]
        flat = tensor.detach().to("cpu").contiguous()
        digest = hashlib.blake2b(flat.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).digest()
        key = (digest, tuple(flat.shape), flat.dtype)
        if key not in self._by_content and self.disk_store is not None and flat.nbytes >= _MIN_DISK_BYTES:
            self._by_content[key] = self.disk_store.put(flat)
        elif key not in self._by_content:
            kept = flat.to(self.device)
            self._by_content[key] = kept.clone() if kept.data_ptr() == tensor.data_ptr() else kept
        self._by_object[id(tensor)] = (tensor, self._by_content[key])  # the reference keeps the id from being reused
        return self._by_content[key]

    def end_of_sample(self) -> None:
        """Forget which objects were seen; their contents stay."""
        self._by_object.clear()


def batch_dims(single: Sequence[torch.Tensor | DiskTensor], double: Sequence[torch.Tensor]) -> tuple[int | None, ...]:
    """For each tensor, the dimension that doubles with the batch; None for one that does not depend on the batch."""
    dims: list[int | None] = []
    for one, two in zip(single, double, strict=True):
        grown = [d for d in range(one.dim()) if two.dim() == one.dim() and two.shape[d] == 2 * one.shape[d] != 0]
        dims.append(grown[0] if grown else None)
    return tuple(dims)


def join(tensors: Sequence[torch.Tensor], dim: int | None) -> torch.Tensor:
    """Tensors of single samples as one batch. Equal ones become a view where the batch dimension allows."""
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
