"""One sample through the whole model, block by block, to learn what blocks hand on and to see that they can be run
alone.

Calibration records what every block is called with and runs the blocks one at a time afterwards. That is right only
where a block depends on nothing else. So before any data is read each block is run twice here: as the model calls it,
and from what a recording would hold. Where the two differ the model is refused, by the block's name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from auto_round.calibration.layout import HiddenLayout, batch_dim
from auto_round.calibration.links import FLOW, BlockLinks, Entry, Links, Slot, filled_call
from auto_round.calibration.recording import (
    Call,
    Held,
    LeafStore,
    Path,
    entries_of,
    fillable,
    first_of,
    flatten,
    in_memory,
    rest_of,
    take_hidden,
)
from auto_round.calibration.side_effects import Attributes
from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.one_expert import OneExpert
from auto_round.modeling.outside import check_real, modules_outside
from auto_round.modeling.source import ModelSource

_TOLERANCE = 1e-3  # of the largest value; running the same block twice on one device differs by less


class Rehearsal:
    """Runs every block as it is called, and once more from what would be recorded.

    Args:
        source: the model.
        store: where arguments are kept to compare with.
        tokens: of the sample.
        one_expert: experts are read one at a time.
    """

    def __init__(self, source: ModelSource, store: LeafStore, tokens: int, one_expert: bool) -> None:
        self.source, self.store, self.tokens, self.one_expert = source, store, tokens, one_expert
        self.layout = HiddenLayout()
        self.calls: list[Call] = []
        self.blocks: list[BlockLinks] = []
        self.kinds: dict[type, tuple[Any, ...] | None] = {}
        self.changes_hidden = False
        self._output: torch.Tensor | None = None
        self._values: dict[Slot, torch.Tensor] = {}
        self._slots: dict[int, tuple[torch.Tensor, Slot]] = {}  # by identity of the tensor, which is kept alive
        self._objects: dict[int, tuple[Any, Held]] = {}
        self._entries: dict[tuple[int, Any], Entry] = {}
        self._attributes = Attributes()
        self._outside = list(modules_outside(source).values())

    def links(self) -> Links:
        """What was learned."""
        needed = {slot for block in self.blocks for slot in block.reads}
        kept = [
            BlockLinks(b.leaves, b.held, b.entries, tuple(slot for slot in b.writes if slot in needed))
            for b in self.blocks
        ]
        return Links(self.layout, tuple(kept), self.kinds, self.changes_hidden)

    def replacement(self, index: int, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            check_real((args, kwargs), self.source.blocks[index], self.source)
            if len(self.blocks) != index:
                raise ModelError(
                    f"block {self.source.blocks[index]!r} was not called exactly once, in its turn: "
                    f"{type(self.source.model).__name__} runs its blocks in a cycle, so they cannot be tuned one at a "
                    f"time; {FLOW}"
                )
            hidden, rest, key = take_hidden(args, kwargs)
            self._check_hidden(index, hidden)
            value = (*rest, key)
            before = {path: (item, entries_of(item)) for path, item in fillable(value).items()}
            versions = [(tensor, tensor._version) for tensor in flatten(value)[2]]
            with self._loaded(index, hidden.device):
                self._attributes.look_at([*self._outside, *block.modules()])
                given, version = hidden.clone(), hidden._version
                output = original(*args, **kwargs)
                self._attributes.note_changes()
                self.changes_hidden |= hidden._version != version
                if any(tensor._version != version for tensor, version in versions):
                    raise self._refusal(index, "changes one of its arguments in place")
                first = self._first_output(index, block, output, given)
                call, links = self._learn(index, value, before, output)
                replayed = self._replay(index, original, call, links, given)
            self._compare(index, first, replayed)
            self.calls.append(call)
            self.blocks.append(links)
            self.kinds.setdefault(type(block), poisoned(rest_of(output)))
            self._output = first
            return output

        return forward

    def finish(self) -> None:
        """Raise ModelError when not all blocks were called."""
        if len(self.blocks) != len(self.source.blocks):
            raise ModelError(
                f"{type(self.source.model).__name__} never called its block {self.source.blocks[len(self.blocks)]!r}; "
                f"{FLOW}"
            )

    def compare_recording(self, calls: list[Call]) -> None:
        """Raise UnsupportedError when what a pass without the blocks recorded for the same sample is not what the
        model gave them: an argument depends on what earlier blocks computed."""
        for index, (real, recorded) in enumerate(zip(self.calls, calls, strict=True)):
            linked = self.blocks[index].leaves
            same = real.spec == recorded.spec and len(real.leaves) == len(recorded.leaves)
            if not same or any(
                a is not b for i, (a, b) in enumerate(zip(real.leaves, recorded.leaves, strict=True)) if i not in linked
            ):
                raise self._refusal(index, "is called with values that depend on what the blocks before it computed")

    def _check_hidden(self, index: int, hidden: torch.Tensor) -> None:
        if index == 0:
            layout = HiddenLayout.of(hidden, self.tokens)
            if layout is None:
                raise ModelError(
                    f"{self.source.blocks[0]} is fed a tensor of shape {list(hidden.shape)}, in which samples and "
                    f"tokens cannot be told apart; {FLOW}"
                )
            self.layout = layout
        elif self._output is None or hidden.shape != self._output.shape or not _equal(hidden, self._output):
            raise UnsupportedError(
                f"{type(self.source.model).__name__} changes the hidden states between its blocks, before "
                f"{self.source.blocks[index]!r}; only models whose blocks follow each other directly can be walked; "
                f"{FLOW}"
            )

    def _first_output(self, index: int, block: nn.Module, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        first = first_of(output)
        if hasattr(type(output), "_fields"):  # its fields are asked for by name, and nothing else can stand for it
            raise self._refusal(index, f"returns a {type(output).__name__} of several values")
        if not isinstance(first, torch.Tensor) or first.shape != hidden.shape:
            raise ModelError(
                f"block {self.source.blocks[index]!r} ({type(block).__name__}) does not return hidden states of the "
                f"shape it is given; {FLOW}"
            )
        return first

    def _learn(
        self, index: int, value: Any, before: dict[Path, tuple[Any, dict[Any, Any]]], output: Any
    ) -> tuple[Call, BlockLinks]:
        """The call as it would be recorded, and what the block takes and leaves."""
        entered: list[tuple[Held, Any, Any]] = []
        for item, old in before.values():
            now = entries_of(item)
            changed = [key for key in now if key not in old or now[key] is not old[key]]
            if changed and id(item) not in self._objects:
                self._objects[id(item)] = (item, Held(len(self._objects), type(item)))
            entered += [(self._objects[id(item)][1], key, now[key]) for key in changed]
        held = {path: self._objects[id(item)][1] for path, (item, _) in before.items() if id(item) in self._objects}
        numbers = {one.number for one in held.values()}
        given = tuple(entry for (number, _), entry in self._entries.items() if number in numbers)
        filled = {(entry.number, entry.key) for entry in given} | {(one.number, key) for one, key, _ in entered}
        spec, consts, leaves = flatten(value, held, lambda number: {key for n, key in filled if n == number})
        linked = {i: self._slots[id(leaf)][1] for i, leaf in enumerate(leaves) if id(leaf) in self._slots}
        kept = tuple(self.store.put(leaf) for leaf in leaves)
        writes = self._outputs(index, output)
        for one, key, entry in entered:
            slots = self._entry(index, one, key, entry)
            writes += [slot for slot in slots if slot not in writes]
        return Call(spec, tuple(consts), kept), BlockLinks(linked, held, given, tuple(writes))

    def _outputs(self, index: int, output: Any) -> list[Slot]:
        found = [self._slot(index, first_of(output), ("hidden",))]
        rest = flatten(rest_of(output))[2]
        return [s for s in (*found, *(self._slot(index, t, ("output", i)) for i, t in enumerate(rest))) if s]

    def _entry(self, index: int, held: Held, key: Any, entry: Any) -> list[Slot]:
        spec, consts, leaves = flatten(entry)
        slots = [self._slot(index, leaf, ("held", held.number, key, i)) for i, leaf in enumerate(leaves)]
        found = [slot for slot in slots if slot is not None]
        if len(found) != len(slots):
            raise self._refusal(index, "leaves a tensor behind in which samples cannot be told apart")
        self._entries[held.number, key] = Entry(held.number, key, spec, tuple(consts), tuple(found))
        return found

    def _slot(self, index: int, tensor: torch.Tensor, place: tuple[Any, ...]) -> Slot | None:
        """The slot of a tensor that a block made; the one it has already, where it is handed on."""
        if id(tensor) in self._slots:
            return self._slots[id(tensor)][1]
        batch = self.layout.batch if place == ("hidden",) else batch_dim(tensor)
        if batch is None:
            return None
        slot = Slot(index, place, batch)
        self._slots[id(tensor)] = (tensor, slot)
        self._values[slot] = tensor.detach().clone()
        return slot

    def _replay(
        self, index: int, run: Callable[..., Any], call: Call, links: BlockLinks, hidden: torch.Tensor
    ) -> torch.Tensor | None:
        leaves = [in_memory(leaf).to(hidden.device) for leaf in call.leaves]
        given = self.layout.hidden(self.layout.rows(hidden).clone())
        try:
            (args, kwargs, key), _ = filled_call(
                links, call.spec, call.consts, leaves, lambda slot: self._values[slot].clone()
            )
            with self._attributes.as_before():
                output = run(given, *args, **kwargs) if key is None else run(*args, **{key: given}, **kwargs)
        except (torch.OutOfMemoryError, ModelError):
            raise
        except Exception as error:  # what a block does without what it misses is its own
            raise self._refusal(index, f"cannot be run alone ({type(error).__name__}: {error})") from error
        return first_of(output)

    def _compare(self, index: int, real: torch.Tensor, replayed: torch.Tensor | None) -> None:
        if replayed is None or replayed.shape != real.shape:
            raise self._refusal(index, "gives something else when it is run alone")
        if _equal(real, replayed):
            return
        a, b = real.float(), replayed.float()
        size = float(a.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(a, b, rtol=0, atol=_TOLERANCE * size, equal_nan=True):
            off = float((a - b).abs().max())
            raise self._refusal(index, f"gives something else when it is run alone (by {off:.3g} of {size:.3g})")

    def _refusal(self, index: int, what: str) -> UnsupportedError:
        name = type(self.source.model).__name__
        return UnsupportedError(
            f"block {self.source.blocks[index]!r} of {name} {what}, so its blocks cannot be tuned one at a time; {FLOW}"
        )

    @contextmanager
    def _loaded(self, index: int, device: torch.device) -> Any:
        """The block with its weights."""
        name = self.source.blocks[index]
        experts = OneExpert(self.source, name, device) if self.one_expert else None
        try:
            if experts is None:
                self.source.load(name, device)
            else:
                experts.load_others()
            with nullcontext() if experts is None else experts.running():
                yield
        finally:
            self.source.release(name)


def poisoned(rest: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """What stands for a block's further outputs where the block is not run: NaN and zeros, so that nothing is mistaken
    for a value."""

    def stand_in(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.full_like(value, float("nan")) if value.is_floating_point() else torch.zeros_like(value)
        if isinstance(value, (list, tuple)):
            items = [stand_in(entry) for entry in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return None if rest is None else tuple(stand_in(entry) for entry in rest)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or torch.equal(a, b)
