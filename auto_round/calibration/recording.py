"""What a block was called with: nested arguments as a structure and its tensors, kept once however often they occur."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.calibration.spill import Spill, SpilledTensor

_SPILLED = 1 << 16  # smaller tensors stay in memory


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of a block beside the hidden states.

    Attributes:
        spec: nested structure with the places of tensors and constants; hashable.
        consts: everything that is not a tensor, in the order of the structure.
        leaves: the tensors, in the order of the structure.
    """

    spec: Hashable
    consts: tuple[Any, ...]
    leaves: tuple[torch.Tensor | SpilledTensor, ...]

    @property
    def structure(self) -> Hashable:
        """Equal for two calls that differ in nothing but tensors of equal shape."""
        return self.spec, tuple(map(_const_key, self.consts)), tuple((tuple(t.shape), t.dtype) for t in self.leaves)


def flatten(value: Any) -> tuple[Hashable, list[Any], list[torch.Tensor]]:
    """Structure, constants and tensors of nested dicts, lists and tuples. Key-value caches become None."""
    consts: list[Any] = []
    leaves: list[torch.Tensor] = []

    def walk(item: Any) -> Hashable:
        if isinstance(item, torch.Tensor):
            leaves.append(item)
            return "tensor"
        if isinstance(item, dict) and type(item) is dict:
            return ("dict", tuple((key, walk(entry)) for key, entry in item.items()))
        if isinstance(item, (list, tuple)):
            return (type(item), tuple(walk(entry) for entry in item))
        # A cache would grow every time that the block runs again.
        consts.append(None if hasattr(item, "get_seq_length") else item)
        return "const"

    spec = walk(value)
    return spec, consts, leaves


def unflatten(spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor]) -> Any:
    """The nested value that `flatten` took apart, with other tensors."""
    rest_consts, rest_leaves = iter(consts), iter(leaves)

    def build(node: Any) -> Any:
        if node == "tensor":
            return next(rest_leaves)
        if node == "const":
            return next(rest_consts)
        kind, entries = node
        if kind == "dict":
            return {key: build(entry) for key, entry in entries}
        items = [build(entry) for entry in entries]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    return build(spec)


class LeafStore:
    """Tensors by content: the same rotary table of all blocks and samples is held once. With `spill`, large ones lie in
    that file."""

    def __init__(self, device: torch.device, spill: Spill | None = None) -> None:
        self.device, self.spill = device, spill
        self._by_content: dict[Hashable, torch.Tensor | SpilledTensor] = {}
        self._by_object: dict[int, tuple[torch.Tensor, torch.Tensor | SpilledTensor]] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor | SpilledTensor:
        """A copy of `tensor` on the store's device, the same object for equal contents. The dtype is kept."""
        seen = self._by_object.get(id(tensor))
        if seen is not None:
            return seen[1]
        flat = tensor.detach().to("cpu").contiguous()
        digest = hashlib.blake2b(flat.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).digest()
        key = (digest, tuple(flat.shape), flat.dtype)
        if key not in self._by_content and self.spill is not None and flat.nbytes >= _SPILLED:
            self._by_content[key] = self.spill.put(flat)
        elif key not in self._by_content:
            kept = flat.to(self.device)
            self._by_content[key] = kept.clone() if kept.data_ptr() == tensor.data_ptr() else kept
        self._by_object[id(tensor)] = (tensor, self._by_content[key])  # the reference keeps the id from being reused
        return self._by_content[key]

    def end_of_sample(self) -> None:
        """Forget which objects were seen; their contents stay."""
        self._by_object.clear()


def batch_dims(
    single: Sequence[torch.Tensor | SpilledTensor], double: Sequence[torch.Tensor]
) -> tuple[int | None, ...]:
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
