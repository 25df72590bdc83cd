"""Record the calls of a model's blocks: replace their forwards, and store the nested arguments of each call.

`flatten` and `unflatten` convert between nested arguments and (structure, constants, tensors). `TensorPool` stores
tensors by content, so a rotary table that all blocks share is held once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from auto_round.calibration.disk_store import ActivationTensor, DiskStore
from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.source import ModelSource

ArgumentPath = tuple[Any, ...]
MakeForward = Callable[[int, nn.Module, Callable[..., Any]], Callable[..., Any]]
DATA_FREE_ADVICE = (
    "use model_free=True (--model_free), or iters=0 with disable_opt_rtn=True, which round weights without data"
)
_MIN_DISK_BYTES = 1 << 16  # smaller tensors stay in memory


class ForwardStopped(Exception):
    """Ends a forward pass early; `value` is the tensor found there."""

    def __init__(self, value: torch.Tensor | None = None) -> None:
        super().__init__()
        self.value = value


def stop_with_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook that ends the pass with the module's input."""
    raise ForwardStopped(args[0])


@contextmanager
def replaced_forwards(source: ModelSource, make: MakeForward) -> Iterator[None]:
    """Replace every block's forward by `make(index, block, original)` while the context is open."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for index, name in enumerate(source.blocks):
            block = source.model.get_submodule(name)
            before.append((block, block.__dict__.get("forward")))
            block.__dict__["forward"] = make(index, block, block.forward)
        yield
    finally:
        for block, own in before:
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own


def run_model(model: nn.Module, samples: Sequence[dict[str, torch.Tensor]], device: torch.device) -> Any:
    """Run the whole model on a batch of samples without a key-value cache."""
    batch = {key: torch.stack([s[key] for s in samples]).to(device) for key in samples[0]}
    return model(**batch, use_cache=False, return_dict=True)


def split_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[tuple[Any, ...], dict[str, Any], str | None]]:
    """Split a block's arguments into its hidden states and (other args, other kwargs, keyword of the hidden states).

    The keyword is None when they are positional. Raises ModelError when there are none.
    """
    if args and isinstance(args[0], torch.Tensor):
        return args[0], (args[1:], kwargs, None)
    key = "hidden_states"
    if isinstance(kwargs.get(key), torch.Tensor):
        return kwargs[key], (args, {k: v for k, v in kwargs.items() if k != key}, key)
    raise ModelError(f"a decoder block is called without hidden states (arguments: {', '.join(kwargs) or 'none'})")


def call_block(block: Callable[..., Any], hidden: torch.Tensor, arguments: tuple[Any, Any, str | None]) -> Any:
    """Call a block with hidden states and the other arguments as `split_hidden_states` returns them."""
    args, kwargs, key = arguments
    return block(hidden, *args, **kwargs) if key is None else block(*args, **{key: hidden}, **kwargs)


def hidden_of(output: Any) -> Any:
    """The hidden states in the output of a block: the output itself, or the first entry of a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def extra_outputs(output: Any) -> tuple[Any, ...] | None:
    """The outputs of a block after the hidden states; None when it returns the hidden states alone."""
    return tuple(output[1:]) if isinstance(output, (tuple, list)) else None


def hidden_output(source: ModelSource, index: int, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The hidden states in a block's output. Raises ModelError when their shape differs from `hidden`."""
    first, name = hidden_of(output), source.blocks[index]
    if not isinstance(first, torch.Tensor) or first.shape != hidden.shape:
        raise ModelError(
            f"block {name!r} ({type(source.model.get_submodule(name)).__name__}) does not return hidden states of the "
            f"shape that it gets; {DATA_FREE_ADVICE}"
        )
    return first


def hidden_changed(source: ModelSource, index: int) -> UnsupportedError:
    """The error for a model that changes the hidden states before the block of this index."""
    return UnsupportedError(
        f"{type(source.model).__name__} changes the hidden states between its blocks, before "
        f"{source.blocks[index]!r}; only models whose blocks follow each other directly are supported; "
        f"{DATA_FREE_ADVICE}"
    )


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
    leaves: tuple[ActivationTensor, ...]

    @property
    def structure(self) -> Hashable:
        """Equal for two calls that differ only in the values of tensors of equal shape and dtype."""
        consts = tuple(c if isinstance(c, (type(None), bool, int, float, str)) else id(c) for c in self.consts)
        return self.spec, consts, tuple((tuple(t.shape), t.dtype) for t in self.leaves)


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
) -> tuple[Hashable, list[Any], list[torch.Tensor]]:  # fmt: skip
    """Split nested mappings, lists and tuples into structure, constants and tensors. Key-value caches become None.

    Args:
        value: the nested arguments.
        shared: numbers of the objects inside that blocks write to, by path. Such an object may be of any class.
        written: given such a number, the entries that blocks have written, which are left out.
    """
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
    return spec, consts, leaves


def unflatten(
    spec: Any, consts: Sequence[Any], leaves: Sequence[torch.Tensor],
    make_shared: Callable[[type, int, dict[Any, Any]], Any] | None = None,
) -> Any:  # fmt: skip
    """Rebuild the nested value of `flatten` with other tensors.

    `make_shared` creates the objects that blocks write to, from class, number and the entries that they had before.
    """
    rest_consts, rest_leaves = iter(consts), iter(leaves)

    def build(node: Any) -> Any:
        if node == "tensor":
            return next(rest_leaves)
        if node == "const":
            return next(rest_consts)
        kind, number, parts = node
        entries = {key: build(part) for key, part in parts}
        if number is None or make_shared is None:
            return make_container(kind, entries)
        return make_shared(kind, number, entries)

    return build(spec)


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
    """Stores tensors by content: a rotary table that all blocks and samples share is stored once.

    Large tensors are stored in `disk_store`, if there is one.
    """

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


def batch_dims(single: Sequence[ActivationTensor], double: Sequence[torch.Tensor]) -> tuple[int | None, ...]:
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
