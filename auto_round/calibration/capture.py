"""Capture the inputs of the first decoder block and the call arguments of every block in one forward pass.

Blocks of hybrid, sliding-window and local/global models get different masks and rotary tables, so the arguments
of each block are stored. Masks keep their dtype: a boolean mask stays boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from auto_round.calibration.block_calls import (
    BlockCall,
    TensorPool,
    batch_dims,
    extra_outputs,
    flatten,
    hidden_of,
    join,
    load_tensor,
    mutable_objects,
    split_hidden_states,
    unflatten,
)
from auto_round.calibration.block_links import ModelDependencies, SharedSlot, SharedState, produced_tensor, resolve_call
from auto_round.calibration.disk_store import DiskStore, DiskTensor
from auto_round.calibration.isolation_check import IsolationCheck
from auto_round.errors import DataError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.files.safetensors import empty_mmap
from auto_round.modeling.partial_loading import ExpertStreamer, check_not_meta, non_block_loaded
from auto_round.modeling.source import Device, ModelSource, is_finite

_NON_MODEL_KEYS = ("labels",)
_MAX_CACHED_BYTES = 1 << 22  # larger arguments are moved anew for every call
# A block returns its hidden states alone, or first in a tuple: then what stands for the other entries.
_OutputKind = tuple[Any, ...] | None
_SHARED_PLACEHOLDER = torch.empty(0)  # the place of an argument that an earlier block makes


class _ExtraBlockOutputs(Exception):
    """Blocks hand on something else than hidden states [batch, tokens, width]: it has to be learned what."""


class _Stop(Exception):
    """Ends a forward pass that has gone far enough. Holds what was found there."""

    def __init__(self, value: torch.Tensor | None = None) -> None:
        super().__init__()
        self.value = value


@dataclass
class CapturedInputs:
    """The calibration samples as seen by the blocks.

    Attributes:
        hidden: [N, T, H], inputs of block 0, in the model's dtype unless another was asked for. Streams that the model
            keeps side by side lie behind each other in the last dimension.
        loss_mask: bool [N, T]; False where a position is padded or its label is -100.
        dtype: the model's.
        links: what blocks hand on, and how.
        running: the samples that the block is being called on.
    """

    hidden: torch.Tensor | DiskTensor
    loss_mask: torch.Tensor
    dtype: torch.dtype
    _inputs: list[dict[str, torch.Tensor]]
    _calls: list[list[BlockCall]]
    _dims: dict[Hashable, tuple[int | None, ...]]
    _kinds: dict[type[nn.Module], _OutputKind]
    links: ModelDependencies = ModelDependencies()
    _on_device: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = field(default_factory=dict)
    running: Sequence[int] = ()

    @property
    def present(self) -> torch.Tensor:
        """bool [N, T]: False where a position is padding."""
        length = self.loss_mask.shape[1]
        return torch.stack([_present(sample, length) for sample in self._inputs])

    def run(
        self, block_index: int, block: nn.Module, hidden: torch.Tensor, samples: Sequence[int],
        state: SharedState | None = None, store_state: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """The block's output [B, T, H] for `hidden` [B, T, H] of the samples with these indices; gradients flow.

        `state` holds what earlier blocks made for this one, where they do; with `store_state`, what this block makes
        for later
        ones is put there.

        Arguments go to the device of `hidden`. Floating-point ones recorded in the model's dtype follow the dtype of
        `hidden`; nothing else is cast. Samples whose arguments cannot share a batch (one has no mask, another has)
        run one after the other.
        """
        if hidden.shape[0] != len(samples):
            raise DataError(f"hidden holds {hidden.shape[0]} samples, but {len(samples)} sample indices were given")
        calls = self._calls[block_index]
        groups: dict[Hashable, list[int]] = {}
        for place, sample in enumerate(samples):
            groups.setdefault(self._group_key(block_index, calls[sample]), []).append(place)
        if len(groups) == 1:
            self.running = samples
            return self._run_group(block_index, block, hidden, [calls[s] for s in samples], state, store_state)
        outputs, places = [], []
        for group in groups.values():
            self.running = [samples[place] for place in group]
            own = [calls[samples[p]] for p in group]
            outputs.append(self._run_group(block_index, block, hidden[group], own, state, store_state))
            places.extend(group)
        back = torch.tensor(places, device=hidden.device).argsort()
        return torch.cat(outputs)[back]

    def finish(
        self, source: ModelSource, hidden: torch.Tensor, samples: Sequence[int], stop_at: str | None = None
    ) -> torch.Tensor:
        """The model's tail on `hidden` [B, T, H], the output of the last block: logits [B, T, vocabulary].

        With `stop_at`, the input of the module of that name instead, such as "lm_head". Modules of the tail that are
        not loaded are loaded for this call; open `non_block_loaded(source, device)` around many calls.
        """
        model, device = source.model, hidden.device
        given = self.links.layout.hidden(hidden.to(self.dtype))
        last = len(source.blocks) - 1

        def replacement(index: int, block: nn.Module, _original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                own, _, _ = split_hidden_states(args, kwargs)
                return _as_output(self._kinds[type(block)], given if index == last else own)

            return forward

        handles = []
        if stop_at is not None:
            handles.append(source._module(stop_at).register_forward_pre_hook(_stop_with_input))
        try:
            with non_block_loaded(source, device), _replaced_forwards(source, replacement):
                return _forward(model, _batch([self._inputs[s] for s in samples], device)).logits
        except _Stop as stop:
            assert stop.value is not None
            return stop.value
        finally:
            for handle in handles:
                handle.remove()

    def arguments(self, block_index: int, sample: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments recorded for one block and sample, without the hidden states."""
        call = self._calls[block_index][sample]
        args, kwargs, _ = unflatten(call.spec, call.consts, [load_tensor(leaf) for leaf in call.leaves])
        return args, kwargs

    def _group_key(self, block_index: int, call: BlockCall) -> Hashable:
        dims = self._dims[block_index, call.structure]
        return call.structure, tuple(id(t) for t, d in zip(call.leaves, dims, strict=True) if d is None)

    def _run_group(
        self,
        block_index: int,
        block: nn.Module,
        hidden: torch.Tensor,
        calls: list[BlockCall],
        state: SharedState | None,
        store_state: bool,
    ) -> torch.Tensor:
        first = calls[0]
        dims = self._dims[block_index, first.structure]
        read: dict[int, torch.Tensor] = {}
        leaves = [
            join([self._moved(call.leaves[i], hidden, read) for call in calls], dim) for i, dim in enumerate(dims)
        ]
        links, samples = self.links.block(block_index), list(self.running)

        def take(slot: SharedSlot) -> torch.Tensor:
            if state is None:
                raise UnsupportedError(f"block {block_index} needs what an earlier block makes, and nothing holds it")
            return state.take(slot, samples, hidden)

        (args, kwargs, key), objects = resolve_call(links, first.spec, first.consts, leaves, take)
        given = self.links.layout.hidden(hidden.clone() if self.links.changes_hidden else hidden)
        output = block(given, *args, **kwargs) if key is None else block(*args, **{key: given}, **kwargs)
        for slot in links.writes if store_state else ():
            made = produced_tensor(slot, output, objects)
            if made is not None and state is not None:
                state.put(slot, samples, made, str(block_index))
        return self.links.layout.rows(hidden_of(output))

    def _moved(
        self, leaf: torch.Tensor | DiskTensor, hidden: torch.Tensor, read: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """An argument where and as the block wants it. `read`: what this call has taken out of a file already."""
        dtype = hidden.dtype if leaf.dtype == self.dtype else leaf.dtype
        if isinstance(leaf, DiskTensor):
            if id(leaf) not in read:
                read[id(leaf)] = leaf.read().to(hidden.device, dtype)
            return read[id(leaf)]
        if leaf.device == hidden.device and leaf.dtype == dtype:
            return leaf
        if leaf.nbytes > _MAX_CACHED_BYTES:
            return leaf.to(hidden.device, dtype)
        key = (id(leaf), hidden.device, dtype)
        if key not in self._on_device:
            if len(self._on_device) > 256:  # per-sample masks of a large set are not kept twice
                self._on_device.clear()
            self._on_device[key] = leaf.to(hidden.device, dtype)
        return self._on_device[key]


def capture_inputs(
    source: ModelSource,
    samples: list[dict[str, torch.Tensor]],
    device: Device | None = None,
    store_device: Device = "cpu",
    dtype: torch.dtype | None = None,
    disk_store: DiskStore | None = None,
    stream_experts: bool = False,
    links: ModelDependencies | None = None,
    check_isolation: bool = False,
) -> CapturedInputs:
    """Run everything before the blocks on each sample, and record what each block is called with.

    Only modules before the blocks are loaded, and one block of each class for a moment (what it returns decides what
    the others hand on).

    Args:
        source: the model.
        samples: dicts with "input_ids" int64 [T], and optionally "attention_mask" [T] and "labels" [T] (-100: no loss).
            All of one length.
        device: where to run; None: CPU for a checkpoint, where it is for a live model.
        store_device: where hidden states and arguments are kept.
        dtype: in which hidden states are kept; None: the model's.
        spill: a file to keep them in instead, and large arguments.
        stream_experts: experts of the block that is loaded are read one at a time.
        links: what blocks hand on, where another capture of the same model has learned it.
        rehearse: learn it by running the first sample through all blocks, and refuse a model whose blocks cannot be run
            one at a time. It is done in any case where blocks hand on more than hidden states [batch, tokens, width].

    Raises:
        DataError: no samples, or of different lengths.
        ModelError: the model does not call its blocks as a decoder does.
        UnsupportedError: it changes the hidden states between two blocks, or a block depends on something that is not
            among its arguments.
        NumericsError: NaN or Inf before the first block.
    """
    inputs = _check_samples(samples)
    where = torch.device(device) if device is not None else _input_device(source)
    store = TensorPool(torch.device(store_device), disk_store)
    rehearsal: IsolationCheck | None = None
    with torch.no_grad(), non_block_loaded(source, device):
        if check_isolation and links is None:
            rehearsal = _run_isolation_check(source, inputs[0], where, store, stream_experts)
        try:
            recorder = _record_samples(
                source, inputs, where, store, dtype, disk_store, stream_experts, links, rehearsal
            )
        except _ExtraBlockOutputs:
            rehearsal = _run_isolation_check(source, inputs[0], where, store, stream_experts)
            recorder = _record_samples(
                source, inputs, where, store, dtype, disk_store, stream_experts, links, rehearsal
            )
    if rehearsal is not None:
        rehearsal.compare_recording([calls[0] for calls in recorder.calls])
    assert recorder.hidden is not None and recorder.model_dtype is not None
    masks = [_loss_mask(sample, inputs[i]["input_ids"].shape[-1]) for i, sample in enumerate(samples)]
    return CapturedInputs(
        recorder.hidden, torch.stack(masks), recorder.model_dtype, inputs, recorder.calls, recorder.dims,
        recorder.kinds, recorder.links or ModelDependencies(),
    )  # fmt: skip


def _run_isolation_check(
    source: ModelSource, sample: dict[str, torch.Tensor], device: torch.device, store: TensorPool, stream_experts: bool
) -> IsolationCheck:
    """One sample through all blocks. Raises ModelError or UnsupportedError when they cannot be run one at a time."""
    rehearsal = IsolationCheck(source, store, sample["input_ids"].numel(), stream_experts)
    get = getattr(source.model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    # Behind the blocks it is only to be seen that none is called again; the head need not be read for that.
    stop = None if head is None else head.register_forward_pre_hook(_stop_with_input, prepend=True)
    try:
        with _replaced_forwards(source, rehearsal.replacement):
            _forward(source.model, _batch([sample], device))
    except _Stop:
        pass
    finally:
        if stop is not None:
            stop.remove()
    rehearsal.finish()
    store.end_of_sample()
    return rehearsal


def _record_samples(
    source: ModelSource,
    inputs: list[dict[str, torch.Tensor]],
    device: torch.device,
    store: TensorPool,
    dtype: torch.dtype | None,
    disk_store: DiskStore | None,
    stream_experts: bool,
    links: ModelDependencies | None,
    rehearsal: IsolationCheck | None,
) -> _CallRecorder:
    known = links if rehearsal is None else rehearsal.links()
    recorder = _CallRecorder(source, store, len(inputs), dtype, disk_store, stream_experts, known)
    with _replaced_forwards(source, recorder.replacement):
        for index, sample in enumerate(inputs):
            recorder.record(index, sample, device)
    return recorder


class _CallRecorder:
    """Stands in for the blocks' forwards while the samples pass."""

    def __init__(
        self,
        source: ModelSource,
        store: TensorPool,
        count: int,
        dtype: torch.dtype | None,
        disk_store: DiskStore | None,
        stream_experts: bool,
        links: ModelDependencies | None,
    ) -> None:
        self.source, self.count, self.store, self.store_device = source, count, store, store.device
        self.links, self.layout = links, (links or ModelDependencies()).layout
        self.disk_store, self.dtype, self.stream_experts = disk_store, dtype, stream_experts
        self.model_dtype: torch.dtype | None = None
        self.hidden: torch.Tensor | DiskTensor | None = None
        self.calls: list[list[BlockCall]] = [[] for _ in source.blocks]
        self.dims: dict[Hashable, tuple[int | None, ...]] = {}
        self.kinds: dict[type[nn.Module], _OutputKind] = dict((links or ModelDependencies()).kinds)
        self._sample = 0
        self._probing = False

    def record(self, index: int, sample: dict[str, torch.Tensor], device: torch.device) -> None:
        """Pass one sample alone; when its arguments have a shape not seen yet, pass it twice as a batch too."""
        self._sample, self._probing = index, False
        self._pass(_batch([sample], device))
        if any((i, calls[index].structure) not in self.dims for i, calls in enumerate(self.calls)):
            self._probing = True
            self._pass(_batch([sample, sample], device))
        self.store.end_of_sample()

    def _pass(self, batch: dict[str, torch.Tensor]) -> None:
        try:
            _forward(self.source.model, batch)
        except _Stop:
            return
        raise ModelError(f"{type(self.source.model).__name__} never called its last block {self.source.blocks[-1]!r}")

    def replacement(self, index: int, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            check_not_meta((args, kwargs), self.source.blocks[index], self.source)
            hidden, rest, key = split_hidden_states(args, kwargs)
            own = (self.links or ModelDependencies()).block(index)
            spec, consts, leaves = flatten((*rest, key), own.held)
            if self.links is None and (not _is_plain(hidden) or _has_mutable_arguments((*rest, key))):
                raise _ExtraBlockOutputs
            leaves = [_SHARED_PLACEHOLDER if place in own.leaves else leaf for place, leaf in enumerate(leaves)]
            if self._probing:
                single = self.calls[index][self._sample]
                self.dims[index, single.structure] = batch_dims(single.leaves, leaves)
            else:
                if index == 0:
                    self._store_hidden(self.layout.rows(hidden))
                self._check_stream(index, self.layout.rows(hidden))
                if len(self.calls[index]) != self._sample:
                    raise ModelError(
                        f"block {self.source.blocks[index]!r} was not called exactly once; it cannot be tuned alone"
                    )
                self.calls[index].append(BlockCall(spec, tuple(consts), tuple(self.store.put(leaf) for leaf in leaves)))
            if type(block) not in self.kinds:
                self._learn_output_kind(index, block, original, args, kwargs, hidden)
            if index == len(self.calls) - 1:
                raise _Stop
            return _as_output(self.kinds[type(block)], hidden)

        return forward

    def _store_hidden(self, hidden: torch.Tensor) -> None:
        if not is_finite(hidden):
            raise NumericsError(
                f"NaN or Inf in the input of {self.source.blocks[0]} for calibration sample {self._sample}"
            )
        if self.hidden is None:
            self.model_dtype = hidden.dtype
            shape, dtype = (self.count, *hidden.shape[1:]), self.dtype or hidden.dtype
            if self.disk_store is not None:
                self.hidden = self.disk_store.empty(shape, dtype)
            elif self.store_device.type == "cpu":
                self.hidden = empty_mmap(shape, dtype)
            else:
                self.hidden = torch.empty(shape, dtype=dtype, device=self.store_device)
        self.hidden[self._sample] = hidden[0]

    def _check_stream(self, index: int, hidden: torch.Tensor) -> None:
        """Blocks hand their input on unchanged here, so that each must get what block 0 got."""
        assert self.hidden is not None
        if self._sample == 0 and not torch.equal(hidden[0].to(self.hidden.device, self.hidden.dtype), self.hidden[0]):
            raise UnsupportedError(
                f"{type(self.source.model).__name__} changes the hidden states between its blocks, before "
                f"{self.source.blocks[index]!r}; only models whose blocks follow each other directly can be walked"
            )

    def _learn_output_kind(
        self, index: int, block: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any, hidden: torch.Tensor
    ) -> None:
        name = self.source.blocks[index]
        experts = ExpertStreamer(self.source, name, hidden.device) if self.stream_experts else None
        try:
            if experts is None:
                self.source.load(name, hidden.device)
                output = original(*args, **kwargs)
            else:
                experts.load_non_experts()
                with experts.running():
                    output = original(*args, **kwargs)
        finally:
            self.source.release(name)
        first, rest = hidden_of(output), extra_outputs(output)
        if not isinstance(first, torch.Tensor) or first.shape != hidden.shape:
            raise ModelError(
                f"block {name!r} ({type(block).__name__}) does not return hidden states of the shape it is given"
            )
        if self.links is None and (flatten(rest)[2] or hasattr(type(output), "_fields")):
            raise _ExtraBlockOutputs
        self.kinds[type(block)] = rest


def _is_plain(hidden: torch.Tensor) -> bool:
    """Whether the hidden states are [batch, tokens, width]; a batch is one sample, or the same one twice."""
    return hidden.dim() == 3 and hidden.shape[0] <= 2


def _has_mutable_arguments(arguments: Any) -> bool:
    """Whether a block is given an object that it could fill for a later one."""
    return any(not isinstance(item, (dict, list)) for item in mutable_objects(arguments).values())


def _as_output(kind: _OutputKind, hidden: torch.Tensor) -> Any:
    return hidden if kind is None else (hidden, *kind)


@contextmanager
def _replaced_forwards(
    source: ModelSource, make: Callable[[int, nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Every block's forward is `make(index, block, original)` while this is open; restored whatever happens."""
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


def _stop_with_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Stop(args[0])


def _forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch, use_cache=False, return_dict=True)


def _batch(samples: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: torch.stack([s[key] for s in samples]).to(device) for key in samples[0]}


def _input_device(source: ModelSource) -> torch.device:
    """Where a live model takes its token ids."""
    if source.lazy:
        return torch.device("cpu")
    return next((p.device for p in source.model.parameters()), torch.device("cpu"))


def _check_samples(samples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Samples as the model takes them: one-dimensional, of one length, without labels. Raises DataError."""
    if not samples:
        raise DataError("no calibration samples were given; at least one is needed")
    inputs: list[dict[str, torch.Tensor]] = []
    for index, sample in enumerate(samples):
        if not isinstance(sample.get("input_ids"), torch.Tensor):
            raise DataError(f"calibration sample {index} has no tensor 'input_ids'")
        clean = {
            k: v.reshape(-1) for k, v in sample.items() if k not in _NON_MODEL_KEYS and isinstance(v, torch.Tensor)
        }
        first = inputs[0] if inputs else clean
        if {k: v.shape for k, v in clean.items()} != {k: v.shape for k, v in first.items()}:
            raise DataError(
                f"calibration sample {index} differs from sample 0 in length or keys; pad or cut all to one length"
            )
        inputs.append(clean)
    if inputs[0]["input_ids"].numel() == 0:
        raise DataError("the calibration samples are empty")
    return inputs


def _loss_mask(sample: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    mask = _present(sample, length)
    if isinstance(labels := sample.get("labels"), torch.Tensor):
        mask &= labels.reshape(-1).cpu() != -100
    return mask


def _present(sample: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    attention = sample.get("attention_mask")
    if not isinstance(attention, torch.Tensor):
        return torch.ones(length, dtype=torch.bool)
    return attention.reshape(-1).cpu() != 0
