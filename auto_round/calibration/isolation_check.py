"""Check on one sample that each decoder block can run alone, and learn which tensors blocks share.

Calibration records the call of every block and runs the blocks one at a time afterwards. That is right only if a block
depends on nothing else. So each block runs twice here before any data is read: as the model calls it, and from what a
recording holds. If the outputs differ, the model is refused with the block's name. Module attributes that a block
changes are restored for the second run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from auto_round.calibration.block_calls import (
    ArgumentPath,
    BlockCall,
    SharedObject,
    TensorPool,
    call_block,
    entries_of,
    extra_outputs,
    flatten,
    hidden_of,
    load_tensor,
    mutable_objects,
    split_hidden_states,
)
from auto_round.calibration.block_links import (
    DATA_FREE_ADVICE,
    BlockDependencies,
    HiddenLayout,
    ModelDependencies,
    ObjectEntry,
    SharedSlot,
    batch_dim,
    resolve_call,
)
from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.partial_loading import block_loaded, check_not_meta, non_block_modules, output_head
from auto_round.modeling.source import ModelSource

_ABSENT = object()
_TORCH_ATTRIBUTES = frozenset({"training", "forward", *nn.Module().__dict__}) - {"_buffers"}
_TOLERANCE = 1e-3  # relative to the largest value; two runs of one block on one device differ by less
MakeForward = Callable[[int, nn.Module, Callable[..., Any]], Callable[..., Any]]


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


class AttributeSnapshot:
    """Attributes of modules at one time, to find those that a block changes and to restore them.

    Attributes:
        before: by owner's id and name, (owner, first value) of every attribute that changed.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self.before: dict[tuple[int, Any], tuple[Any, Any]] = {}

    def take_snapshot(self, modules: Iterable[nn.Module]) -> None:
        """Record the current attributes of these modules."""
        self._seen = {}
        for module in modules:
            self._seen[id(module)] = (module, _plain_attributes(vars(module)))
            for value in self._seen[id(module)][1].values():
                if _is_mutable(value):
                    self._seen[id(value)] = (value, dict(_items(value)))

    def record_changes(self) -> None:
        """Record the old values of attributes that changed, unless an earlier value is known."""
        for key, (owner, old) in self._seen.items():
            now = _plain_attributes(vars(owner)) if isinstance(owner, nn.Module) else dict(_items(owner))
            for name in {*old, *now}:
                if old.get(name, _ABSENT) is not now.get(name, _ABSENT):
                    self.before.setdefault((key, name), (owner, old.get(name, _ABSENT)))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set everything that changed to its first value while the context is open."""
        now = {key: (owner, _get(owner, key[1])) for key, (owner, _) in self.before.items()}
        try:
            for (_, name), (owner, value) in self.before.items():
                _set(owner, name, value)
            yield
        finally:
            for (_, name), (owner, value) in now.items():
                _set(owner, name, value)


def _plain_attributes(attributes: Mapping[str, Any]) -> dict[Any, Any]:
    return {k: v for k, v in attributes.items() if k not in _TORCH_ATTRIBUTES and not isinstance(v, nn.Module)}


def _is_mutable(value: Any) -> bool:
    """Whether a value can be filled in place: a mapping, a list, or an object that is not a configuration."""
    if isinstance(value, (dict, list)):
        return True
    if value is None or isinstance(value, (torch.Tensor, nn.Module, type, str, int, float)) or callable(value):
        return False
    return hasattr(value, "__dict__") and not hasattr(value, "to_dict")


def _items(store: Any) -> Mapping[Any, Any]:
    if isinstance(store, dict):
        return store
    return dict(enumerate(store)) if isinstance(store, list) else vars(store)


def _get(owner: Any, name: Any) -> Any:
    return (vars(owner) if isinstance(owner, nn.Module) else _items(owner)).get(name, _ABSENT)


def _set(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, list):
        if value is _ABSENT:
            del owner[name:]
        elif name < len(owner):
            owner[name] = value
        else:
            owner.append(value)
        return
    store = owner if isinstance(owner, dict) else vars(owner)
    if value is _ABSENT:
        store.pop(name, None)
    else:
        store[name] = value


class IsolationCheck:
    """Runs every block as the model calls it, and again from what would be recorded.

    Args:
        source: the model.
        store: where arguments are stored for the comparison.
        tokens: number of tokens of the sample.
        stream_experts: load one expert at a time.
    """

    def __init__(self, source: ModelSource, store: TensorPool, tokens: int, stream_experts: bool) -> None:
        self.source, self.store, self.tokens, self.stream_experts = source, store, tokens, stream_experts
        self.layout = HiddenLayout()
        self.calls: list[BlockCall] = []
        self.blocks: list[BlockDependencies] = []
        self.kinds: dict[type, tuple[Any, ...] | None] = {}
        self.changes_hidden = False
        self._output: torch.Tensor | None = None
        self._values: dict[SharedSlot, torch.Tensor] = {}
        self._slots: dict[int, tuple[torch.Tensor, SharedSlot]] = {}  # by id of the tensor, which is kept alive
        self._objects: dict[int, tuple[Any, SharedObject]] = {}
        self._entries: dict[tuple[int, Any], ObjectEntry] = {}
        self._attributes = AttributeSnapshot()
        self._non_block = list(non_block_modules(source).values())

    def links(self) -> ModelDependencies:
        """The dependencies between blocks that were found."""
        needed = {slot for block in self.blocks for slot in block.reads}
        blocks = tuple(replace(b, writes=tuple(slot for slot in b.writes if slot in needed)) for b in self.blocks)
        return ModelDependencies(self.layout, blocks, self.kinds, self.changes_hidden)

    def replacement(self, index: int, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that checks a block."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            check_not_meta((args, kwargs), self.source.blocks[index], self.source)
            if len(self.blocks) != index:
                raise ModelError(
                    f"block {self.source.blocks[index]!r} was not called exactly once, in order: "
                    f"{type(self.source.model).__name__} runs its blocks in a cycle, so they cannot be tuned one at a "
                    f"time; {DATA_FREE_ADVICE}"
                )
            hidden, rest, key = split_hidden_states(args, kwargs)
            self._check_hidden(index, hidden)
            value = (*rest, key)
            before = {path: (item, entries_of(item)) for path, item in mutable_objects(value).items()}
            versions = [(tensor, tensor._version) for tensor in flatten(value)[2]]
            with block_loaded(self.source, self.source.blocks[index], hidden.device, self.stream_experts):
                self._attributes.take_snapshot([*self._non_block, *block.modules()])
                given, version = hidden.clone(), hidden._version
                output = original(*args, **kwargs)
                self._attributes.record_changes()
                self.changes_hidden |= hidden._version != version
                if any(tensor._version != version for tensor, version in versions):
                    raise self._refusal(index, "changes one of its arguments in place")
                if hasattr(type(output), "_fields"):  # its fields are read by name, so it cannot be replaced
                    raise self._refusal(index, f"returns a {type(output).__name__} of several values")
                first = hidden_output(self.source, index, output, given)
                call, links = self._find_dependencies(index, value, before, output)
                replayed = self._replay(index, original, call, links, given)
            self._compare(index, first, replayed)
            self.calls.append(call)
            self.blocks.append(links)
            self.kinds.setdefault(type(block), nan_placeholders(extra_outputs(output)))
            self._output = first
            return output

        return forward

    def finish(self) -> None:
        """Raise ModelError when not all blocks were called."""
        if len(self.blocks) != len(self.source.blocks):
            raise ModelError(
                f"{type(self.source.model).__name__} never called its block {self.source.blocks[len(self.blocks)]!r}; "
                f"{DATA_FREE_ADVICE}"
            )

    def compare_recording(self, calls: list[BlockCall]) -> None:
        """Compare the calls of this sample with those recorded in a pass without the blocks.

        Raises UnsupportedError when an argument differs, because it depends on what earlier blocks computed.
        """
        for index, (real, recorded) in enumerate(zip(self.calls, calls, strict=True)):
            linked = self.blocks[index].leaves
            same = real.spec == recorded.spec and len(real.leaves) == len(recorded.leaves)
            if not same or any(
                a is not b for i, (a, b) in enumerate(zip(real.leaves, recorded.leaves, strict=True)) if i not in linked
            ):
                raise self._refusal(index, "is called with values that depend on what earlier blocks computed")

    def _check_hidden(self, index: int, hidden: torch.Tensor) -> None:
        if index == 0:
            layout = HiddenLayout.of(hidden, self.tokens)
            if layout is None:
                raise ModelError(
                    f"{self.source.blocks[0]} gets a tensor of shape {list(hidden.shape)} without separate dimensions "
                    f"for samples and tokens; {DATA_FREE_ADVICE}"
                )
            self.layout = layout
        elif self._output is None or hidden.shape != self._output.shape or not _equal(hidden, self._output):
            raise hidden_changed(self.source, index)

    def _find_dependencies(
        self, index: int, value: Any, before: dict[ArgumentPath, tuple[Any, dict[Any, Any]]], output: Any
    ) -> tuple[BlockCall, BlockDependencies]:
        """The call as it would be recorded, and what the block reads and writes."""
        entered: list[tuple[SharedObject, Any, Any]] = []
        for item, old in before.values():
            now = entries_of(item)
            changed = [key for key in now if key not in old or now[key] is not old[key]]
            if changed and id(item) not in self._objects:
                self._objects[id(item)] = (item, SharedObject(len(self._objects), type(item)))
            entered += [(self._objects[id(item)][1], key, now[key]) for key in changed]
        held = {path: self._objects[id(item)][1] for path, (item, _) in before.items() if id(item) in self._objects}
        numbers = {one.number for one in held.values()}
        given = tuple(entry for (number, _), entry in self._entries.items() if number in numbers)
        filled = {(entry.number, entry.key) for entry in given} | {(one.number, key) for one, key, _ in entered}
        spec, consts, leaves = flatten(value, held, lambda number: {key for n, key in filled if n == number})
        linked = {i: self._slots[id(leaf)][1] for i, leaf in enumerate(leaves) if id(leaf) in self._slots}
        stored = tuple(self.store.put(leaf) for leaf in leaves)
        writes = self._outputs(index, output)
        for one, key, entry in entered:
            slots = self._entry(index, one, key, entry)
            writes += [slot for slot in slots if slot not in writes]
        return BlockCall(spec, tuple(consts), stored), BlockDependencies(linked, held, given, tuple(writes))

    def _outputs(self, index: int, output: Any) -> list[SharedSlot]:
        found = [self._slot(index, hidden_of(output), ("hidden",))]
        rest = flatten(extra_outputs(output))[2]
        return [s for s in (*found, *(self._slot(index, t, ("output", i)) for i, t in enumerate(rest))) if s]

    def _entry(self, index: int, held: SharedObject, key: Any, entry: Any) -> list[SharedSlot]:
        spec, consts, leaves = flatten(entry)
        slots = [self._slot(index, leaf, ("held", held.number, key, i)) for i, leaf in enumerate(leaves)]
        found = [slot for slot in slots if slot is not None]
        if len(found) != len(slots):
            raise self._refusal(index, "passes on a tensor without a batch dimension")
        self._entries[held.number, key] = ObjectEntry(held.number, key, spec, tuple(consts), tuple(found))
        return found

    def _slot(self, index: int, tensor: torch.Tensor, place: tuple[Any, ...]) -> SharedSlot | None:
        """The slot of a tensor that a block produced; its existing one if an earlier block produced it."""
        if id(tensor) in self._slots:
            return self._slots[id(tensor)][1]
        batch = self.layout.batch if place == ("hidden",) else batch_dim(tensor)
        if batch is None:
            return None
        slot = SharedSlot(index, place, batch)
        self._slots[id(tensor)] = (tensor, slot)
        self._values[slot] = tensor.detach().clone()
        return slot

    def _replay(
        self, index: int, run: Callable[..., Any], call: BlockCall, links: BlockDependencies, hidden: torch.Tensor
    ) -> torch.Tensor | None:
        leaves = [load_tensor(leaf).to(hidden.device) for leaf in call.leaves]
        given = self.layout.hidden(self.layout.rows(hidden).clone())
        try:
            arguments, _ = resolve_call(links, call.spec, call.consts, leaves, lambda slot: self._values[slot].clone())
            with self._attributes.restored():
                output = call_block(run, given, arguments)
        except (torch.OutOfMemoryError, ModelError):
            raise
        except Exception as error:  # a block without its dependencies can raise anything
            raise self._refusal(index, f"cannot be run alone ({type(error).__name__}: {error})") from error
        return hidden_of(output)

    def _compare(self, index: int, real: torch.Tensor, replayed: torch.Tensor | None) -> None:
        if replayed is None or replayed.shape != real.shape:
            raise self._refusal(index, "has other outputs when it is run alone")
        if _equal(real, replayed):
            return
        a, b = real.float(), replayed.float()
        size = float(a.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(a, b, rtol=0, atol=_TOLERANCE * size, equal_nan=True):
            off = float((a - b).abs().max())
            raise self._refusal(index, f"has other outputs when it is run alone (by {off:.3g} of {size:.3g})")

    def _refusal(self, index: int, what: str) -> UnsupportedError:
        name = type(self.source.model).__name__
        return UnsupportedError(
            f"block {self.source.blocks[index]!r} of {name} {what}, so its blocks cannot be tuned one at a "
            f"time; {DATA_FREE_ADVICE}"
        )


def run_isolation_check(
    source: ModelSource, sample: dict[str, torch.Tensor], device: torch.device, store: TensorPool, stream_experts: bool
) -> IsolationCheck:
    """Run one sample through all blocks. Raises ModelError or UnsupportedError when they cannot run one at a time."""
    check = IsolationCheck(source, store, sample["input_ids"].numel(), stream_experts)
    head = output_head(source.model)
    # After the blocks, only the call of another block would matter, so the head need not be loaded.
    stop = None if head is None else head.register_forward_pre_hook(stop_with_input, prepend=True)
    try:
        with replaced_forwards(source, check.replacement), suppress(ForwardStopped):
            run_model(source.model, [sample], device)
    finally:
        if stop is not None:
            stop.remove()
    check.finish()
    store.end_of_sample()
    return check


def nan_placeholders(rest: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Placeholders for a block's further outputs when the block does not run: NaN, and zeros for integers."""

    def placeholder(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.full_like(value, float("nan")) if value.is_floating_point() else torch.zeros_like(value)
        if isinstance(value, (list, tuple)):
            items = [placeholder(entry) for entry in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return None if rest is None else tuple(placeholder(entry) for entry in rest)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or torch.equal(a, b)
