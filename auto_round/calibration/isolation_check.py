"""Check on one sample that each decoder block can run alone, and learn which tensors blocks share.

Each block runs twice, before any data is read: as the model calls it, and from what a recording holds, with module
attributes restored. If the outputs differ, the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from auto_round.calibration import block_calls
from auto_round.calibration.block_calls import Arguments, BlockDependencies, NestedValue, SharedSlot, flatten
from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.blocks import output_head
from auto_round.modeling.partial_loading import block_loaded, non_block_modules
from auto_round.modeling.source import ModelSource

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) - {"_buffers"}
_TOLERANCE = 1e-3  # relative to the largest value; two runs of one block on one device differ by less


class _AttributeSnapshot:
    """Attributes of modules, and the entries of dicts, lists and objects among them, before a block changes them."""

    def __init__(self) -> None:
        self._seen: list[tuple[Any, Any]] = []
        # By id, a dict or list that a block has changed, and its entries before the first change.
        self._before: dict[int, tuple[Any, Any]] = {}

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Copy the current attributes of these modules."""
        containers: dict[int, Any] = {}
        for attributes in map(vars, modules):
            values = [value for name, value in attributes.items() if name not in _TORCH_ATTRIBUTES]
            inner = [v if isinstance(v, (dict, list)) else vars(v) for v in values if _is_mutable(v)]
            containers |= {id(container): container for container in (attributes, *inner)}
        self._seen = [(container, container.copy()) for container in containers.values()]

    def record_changes(self) -> None:
        """Remember the old entries of what has changed, unless older ones are known."""
        for container, old in self._seen:
            now, then = block_calls.entries_of(container), block_calls.entries_of(old)
            if now.keys() != then.keys() or any(now[key] is not then[key] for key in now):
                self._before.setdefault(id(container), (container, old))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set everything that changed to its first entries while the context is open."""
        changed = list(self._before.values())
        now = [(container, container.copy()) for container, _ in changed]
        try:
            _set_entries(changed)
            yield
        finally:
            _set_entries(now)


def _set_entries(values: list[tuple[Any, Any]]) -> None:
    for container, entries in values:
        container.clear()
        container.extend(entries) if isinstance(container, list) else container.update(entries)


def _is_mutable(value: Any) -> bool:
    """Whether a value can be filled in place: a mapping, a list, or an object that is not a configuration."""
    if isinstance(value, (dict, list)):
        return True
    if value is None or isinstance(value, (torch.Tensor, nn.Module, type, str, int, float)) or callable(value):
        return False
    return hasattr(value, "__dict__") and not hasattr(value, "to_dict")


class IsolationCheck:
    """Runs every block as the model calls it, and again from what would be recorded, with arguments in `store`."""

    def __init__(self, source: ModelSource, store: block_calls.TensorPool, stream_experts: bool) -> None:
        self.source, self.store, self.stream_experts = source, store, stream_experts
        self._layout = block_calls.HiddenLayout()
        self._calls: list[NestedValue] = []
        self._blocks: list[BlockDependencies] = []
        self._kinds: dict[type, tuple[Any, ...] | None] = {}
        self._changes_hidden = False
        self._tokens = 0
        self._output: torch.Tensor | None = None  # hidden states that the last block returned
        self._values: dict[SharedSlot, torch.Tensor] = {}
        self._slots: dict[int, tuple[torch.Tensor, SharedSlot]] = {}  # by id of the tensor, which is kept alive
        self._objects: dict[int, tuple[Any, int]] = {}  # by id: shared objects and their numbers
        self._entries: dict[tuple[int, Any], block_calls.ObjectEntry] = {}
        self._attributes = _AttributeSnapshot()
        self._non_block = list(non_block_modules(source).values())

    def run(self, sample: dict[str, torch.Tensor], device: torch.device) -> block_calls.ModelDependencies:
        """The dependencies between blocks. Raises ModelError or UnsupportedError when they cannot run one at a time."""
        self._tokens = sample["input_ids"].numel()
        # After the blocks only another call of a block would matter: no need to load the head.
        block_calls.run_model(self.source, [sample], device, self._forward, output_head(self.source.model))
        if len(self._blocks) != len(self.source.blocks):
            raise ModelError(
                f"{type(self.source.model).__name__} never called its block {self.source.blocks[len(self._blocks)]!r}; "
                f"{block_calls.DATA_FREE_ADVICE}"
            )
        self.store.end_of_sample()
        needed = {slot for block in self._blocks for slot in block.reads}
        blocks = tuple(replace(b, writes=tuple(slot for slot in b.writes if slot in needed)) for b in self._blocks)
        return block_calls.ModelDependencies(self._layout, blocks, self._kinds, self._changes_hidden)

    def compare_recording(self, calls: list[NestedValue]) -> None:
        """Raise UnsupportedError when a recorded argument depends on what earlier blocks computed."""
        for index, (real, recorded) in enumerate(zip(self._calls, calls, strict=True)):
            same = real.spec == recorded.spec and len(real.leaves) == len(recorded.leaves)
            pairs = enumerate(zip(real.leaves, recorded.leaves, strict=False))
            if not same or any(a is not b for i, (a, b) in pairs if i not in self._blocks[index].leaves):
                raise self._refusal(index, "is called with values that depend on what earlier blocks computed")

    def _forward(
        self, index: int, block: nn.Module, run: Callable[..., Any], hidden: torch.Tensor, arguments: Arguments
    ) -> Any:
        """Run a block, find what it shares with others, and run it again."""
        if len(self._blocks) != index:
            raise ModelError(
                f"block {self.source.blocks[index]!r} was not called exactly once, in order: "
                f"{type(self.source.model).__name__} runs its blocks in a cycle, so they cannot be tuned one at a "
                f"time; {block_calls.DATA_FREE_ADVICE}"
            )
        if index == 0:
            layout = block_calls.HiddenLayout.of(hidden, self._tokens)
            if layout is None:
                raise ModelError(
                    f"{self.source.blocks[0]} gets a tensor of shape {list(hidden.shape)} without separate dimensions "
                    f"for samples and tokens; {block_calls.DATA_FREE_ADVICE}"
                )
            self._layout = layout
        elif self._output is None or not (hidden is self._output or torch.equal(hidden, self._output)):
            raise block_calls.hidden_changed(self.source, index)
        objects = block_calls.mutable_objects(arguments)
        before = {path: (item, block_calls.entries_of(item)) for path, item in objects.items()}
        versions = [(tensor, tensor._version) for tensor in flatten(arguments).leaves]
        with block_loaded(self.source, self.source.blocks[index], hidden.device, self.stream_experts):
            self._attributes.take([*self._non_block, *block.modules()])
            given, version = hidden.clone(), hidden._version
            output = run(hidden, arguments)
            self._attributes.record_changes()
            self._changes_hidden |= hidden._version != version
            if any(tensor._version != version for tensor, version in versions):
                raise self._refusal(index, "changes one of its arguments in place")
            if hasattr(type(output), "_fields"):  # its fields are read by name, so it cannot be replaced
                raise self._refusal(index, f"returns a {type(output).__name__} of several values")
            self._output, rest = block_calls.checked_output(self.source, index, output, given)
            call, links = self._find_dependencies(index, arguments, before, output)
            self._replay(index, run, call, links, given)
        self._calls.append(call)
        self._blocks.append(links)
        extra = flatten(rest)  # for when the block does not run: NaN, and zeros for integers
        blank = [torch.full_like(t, torch.nan if t.is_floating_point() else 0) for t in extra.leaves]
        self._kinds.setdefault(type(block), extra.build(blank))
        return output

    def _find_dependencies(
        self, index: int, arguments: Arguments, before: dict[Any, tuple[Any, dict[Any, Any]]], output: Any
    ) -> tuple[NestedValue, BlockDependencies]:
        """The call as it would be recorded, and what the block reads and writes."""
        made: list[tuple[int | None, Any, Any]] = [(None, None, output)]  # (number of the object, key, value)
        for item, old in before.values():
            now = block_calls.entries_of(item)
            changed = [key for key in now if key not in old or now[key] is not old[key]]
            if changed:
                own = self._objects.setdefault(id(item), (item, len(self._objects)))[1]
                made += [(own, key, now[key]) for key in changed]
        objects = {path: self._objects[id(item)][1] for path, (item, _) in before.items() if id(item) in self._objects}
        entries = tuple(entry for entry in self._entries.values() if entry.number in objects.values())
        written = {(entry.number, entry.key) for entry in entries} | {(number, key) for number, key, _ in made}
        call = flatten(arguments, objects, lambda number: {key for n, key in written if n == number})
        linked = {i: self._slots[id(leaf)][1] for i, leaf in enumerate(call.leaves) if id(leaf) in self._slots}
        writes: dict[SharedSlot, None] = {}
        for number, key, value in made:
            nested = flatten(value)
            slots = [self._slot(index, number, key, position, leaf) for position, leaf in enumerate(nested.leaves)]
            found = tuple(slot for slot in slots if slot is not None)
            writes |= {slot: None for slot in found if slot.writer == index}
            if number is not None:
                if len(found) != len(slots):
                    raise self._refusal(index, "passes on a tensor without a batch dimension")
                self._entries[number, key] = block_calls.ObjectEntry(number, key, replace(nested, leaves=()), found)
        call = replace(call, leaves=tuple(self.store.put(leaf) for leaf in call.leaves))
        return call, BlockDependencies(linked, objects, entries, tuple(writes))

    def _slot(self, index: int, number: int | None, key: Any, leaf: int, tensor: torch.Tensor) -> SharedSlot | None:
        """The slot of a tensor that a block produced; its existing one if an earlier block produced it."""
        if id(tensor) in self._slots:
            return self._slots[id(tensor)][1]
        is_hidden = number is None and leaf == 0
        batch = self._layout.batch if is_hidden else block_calls.batch_dim(tensor)
        if batch is None:
            return None
        slot = SharedSlot(index, number, key, leaf, batch)
        self._slots[id(tensor)] = (tensor, slot)
        self._values[slot] = tensor.detach().clone()
        return slot

    def _replay(
        self, index: int, run: Callable[..., Any], call: NestedValue, links: BlockDependencies, hidden: torch.Tensor
    ) -> None:
        """Run a block from its recording. Raises UnsupportedError when it does not return `_output`."""
        leaves = [leaf.to(hidden.device) for leaf in call.leaves]
        given = self._layout.hidden(self._layout.rows(hidden).clone())
        try:
            arguments, _ = links.arguments(call, leaves, lambda slot: self._values[slot].clone())
            with self._attributes.restored():
                replayed = block_calls.split_output(run(given, arguments))[0]
        except (torch.OutOfMemoryError, ModelError):
            raise
        except Exception as error:  # a block without its dependencies can raise anything
            raise self._refusal(index, f"cannot be run alone ({type(error).__name__}: {error})") from error
        real = self._output
        assert real is not None
        if replayed is None or replayed.shape != real.shape:
            raise self._refusal(index, "has other outputs when it is run alone")
        a, b = real.float(), replayed.float()
        size = float(a.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(a, b, rtol=0, atol=_TOLERANCE * size, equal_nan=True):
            off = float((a - b).abs().max())
            raise self._refusal(index, f"has other outputs when it is run alone (by {off:.3g} of {size:.3g})")

    def _refusal(self, index: int, what: str) -> UnsupportedError:
        name = type(self.source.model).__name__
        return UnsupportedError(
            f"block {self.source.blocks[index]!r} of {name} {what}, so its blocks cannot be tuned one at a "
            f"time; {block_calls.DATA_FREE_ADVICE}"
        )
