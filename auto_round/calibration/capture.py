"""From calibration samples to the inputs of every block: the interface between data and the run.

docs/architecture.md says how a run uses `CapturedInputs`. Blocks of hybrid, sliding-window and local/global models get
different masks and rotary tables, so the arguments of each block are stored. A boolean mask stays boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from auto_round.calibration import block_calls
from auto_round.calibration.block_calls import Arguments, ModelDependencies, NestedValue, SharedState, flatten
from auto_round.calibration.disk_store import ActivationTensor, DiskStore, empty_beside
from auto_round.calibration.isolation_check import IsolationCheck
from auto_round.errors import DataError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.partial_loading import block_loaded, non_block_loaded
from auto_round.modeling.source import Device, ModelSource, is_finite

_MAX_CACHED_BYTES = 1 << 22  # larger arguments are moved for every call
_SHARED_PLACEHOLDER = torch.empty(0)  # placeholder of an argument that an earlier block produces


@dataclass
class CapturedInputs:
    """The calibration samples as seen by the blocks."""

    hidden: ActivationTensor  # [N, T, H], inputs of block 0; parallel streams are concatenated in the last dimension
    inputs: list[dict[str, torch.Tensor]]  # of the model, one dict per sample
    present: torch.Tensor  # bool [N, T]; False for padding
    loss_mask: torch.Tensor  # bool [N, T]; False for padding and labels of -100
    dtype: torch.dtype  # the model's
    links: ModelDependencies
    _calls: list[list[NestedValue]]  # by block and sample
    _dims: dict[Hashable, tuple[int | None, ...]]  # batch dimensions, by block and structure of a call
    _on_device: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def run(
        self, block_index: int, block: nn.Module, hidden: torch.Tensor, samples: Sequence[int],
        state: SharedState | None = None, store_state: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Run a block on `hidden` [B, T, H] of the samples with these indices; returns [B, T, H] with gradients.
        Samples whose arguments cannot share a batch (one has no mask, another has) run in separate calls. `state` has
        what earlier blocks produced for this one, and with `store_state` gets what it produces for later ones."""
        if hidden.shape[0] != len(samples):
            raise DataError(f"hidden holds {hidden.shape[0]} samples, but {len(samples)} sample indices were given")
        calls = self._calls[block_index]
        groups: dict[Hashable, list[int]] = {}
        for position, sample in enumerate(samples):
            call = calls[sample]
            pairs = zip(call.leaves, self._dims[block_index, call.structure], strict=True)
            unbatched = tuple(id(leaf) for leaf, dim in pairs if dim is None)
            groups.setdefault((call.structure, unbatched), []).append(position)
        outputs, order = [], []
        for group in groups.values():
            part, own = hidden if len(groups) == 1 else hidden[group], [samples[position] for position in group]
            outputs.append(self._run_group(block_index, block, part, own, state, store_state))
            order += group
        if len(groups) == 1:
            return outputs[0]
        return torch.cat(outputs)[torch.tensor(order, device=hidden.device).argsort()]

    def run_head(
        self, source: ModelSource, hidden: torch.Tensor, samples: Sequence[int], stop_at: str | None = None
    ) -> torch.Tensor:
        """Run the modules after the last block on its output `hidden` [B, T, H]; returns logits [B, T, vocabulary], or
        the input of the module `stop_at`. Open `non_block_loaded(source, device)` around many calls."""
        given = self.links.layout.hidden(hidden.to(self.dtype))

        def forward(index: int, block: nn.Module, _run: Any, own: torch.Tensor, _arguments: Any) -> Any:
            return self.links.output(block, given if index == len(source.blocks) - 1 else own)

        stop = None if stop_at is None else source._module(stop_at)
        with non_block_loaded(source, hidden.device):
            found = block_calls.run_model(source, [self.inputs[s] for s in samples], hidden.device, forward, stop)
        return found if isinstance(found, torch.Tensor) else found.logits

    def _run_group(
        self, block_index: int, block: nn.Module, hidden: torch.Tensor, samples: list[int], state: SharedState | None,
        store_state: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Run a block on samples whose arguments can share a batch."""
        links = self.links.block(block_index)
        calls = [self._calls[block_index][sample] for sample in samples]

        def take(slot: block_calls.SharedSlot) -> torch.Tensor:
            if state is None:
                raise UnsupportedError(f"block {block_index} needs a tensor of an earlier block, which was not stored")
            return state.take(slot, samples, hidden)

        leaves = []
        for position, dim in enumerate(self._dims[block_index, calls[0].structure]):
            moved: dict[Hashable, torch.Tensor] = {}
            leaves.append(_join([self._moved(call.leaves[position], hidden, moved) for call in calls], dim))
        arguments, objects = links.arguments(calls[0], leaves, take)
        given = self.links.layout.hidden(hidden.clone() if self.links.changes_hidden else hidden)
        output = block_calls.call_block(block, given, arguments)
        for slot in links.writes if store_state else ():
            made = slot.find(output, objects)
            if made is not None and state is not None:
                state.put(slot, samples, made, str(block_index))
        return self.links.layout.rows(block_calls.split_output(output)[0])

    def _moved(self, leaf: ActivationTensor, hidden: torch.Tensor, moved: dict[Hashable, torch.Tensor]) -> torch.Tensor:
        """An argument on the device and in the dtype of `hidden`. `moved` holds the large ones of this call."""
        dtype = hidden.dtype if leaf.dtype == self.dtype else leaf.dtype
        if isinstance(leaf, torch.Tensor) and (leaf.device, leaf.dtype) == (hidden.device, dtype):
            return leaf
        cached = isinstance(leaf, torch.Tensor) and leaf.nbytes <= _MAX_CACHED_BYTES
        copies = self._on_device if cached else moved
        key = (id(leaf), hidden.device, dtype)
        if key not in copies:
            if len(self._on_device) > 256:  # limits the copies of per-sample masks
                self._on_device.clear()
            copies[key] = leaf.to(hidden.device, dtype)
        return copies[key]


def _join(tensors: Sequence[torch.Tensor], dim: int | None) -> torch.Tensor:
    """Concatenate tensors of single samples to a batch; equal ones become a view if the batch dimension is 1."""
    first = tensors[0]
    if dim is None or len(tensors) == 1:
        return first
    if all(t is first for t in tensors) and first.shape[dim] == 1:
        return first.expand([len(tensors) if d == dim else -1 for d in range(first.dim())])
    return torch.cat(list(tensors), dim=dim)


def capture_inputs(
    source: ModelSource, samples: list[dict[str, torch.Tensor]], device: Device | None = None,
    store_device: Device = "cpu", dtype: torch.dtype | None = None, disk_store: DiskStore | None = None,
    stream_experts: bool = False, links: ModelDependencies | None = None, check_isolation: bool = False,
) -> CapturedInputs:  # fmt: skip
    """Run everything before the blocks on each sample, and record the arguments of each block; only modules before the
    blocks are loaded, and briefly one block of each class. `samples`: "input_ids" int64 [T], and optionally
    "attention_mask" [T] and "labels" [T] (-100: no loss), all of one length. `device`: where to run; None: the CPU for
    a checkpoint, a live model's own. `check_isolation`: run the first sample through all blocks to find their
    dependencies, unless another capture gave `links`, and refuse a model whose blocks cannot run one at a time; always
    done if blocks pass on more than hidden states. Raises DataError for unusable samples, ModelError or
    UnsupportedError for blocks that do not follow each other or need more than their arguments, NumericsError for NaN
    or Inf before the first block."""
    inputs = _check_samples(samples)
    where = source.default_device if device is None else torch.device(device)
    if where is None:  # a live model runs where it is
        where = next((p.device for p in source.model.parameters()), torch.device("cpu"))
    store = block_calls.TensorPool(torch.device(store_device), disk_store)
    with torch.no_grad(), non_block_loaded(source, device):
        isolation = IsolationCheck(source, store, stream_experts)
        checked = check_isolation and links is None
        try:
            links = isolation.run(inputs[0], where) if checked else links
            recorder = _CallRecorder(source, store, dtype, stream_experts, links)
            recorder.record(inputs, where)
        except _ExtraBlockOutputs:
            checked = True
            recorder = _CallRecorder(source, store, dtype, stream_experts, isolation.run(inputs[0], where))
            recorder.record(inputs, where)
    if checked:
        isolation.compare_recording([calls[0] for calls in recorder.calls])
    assert recorder.hidden is not None and recorder.model_dtype is not None
    if "attention_mask" in inputs[0]:
        present = torch.stack([sample["attention_mask"].cpu() != 0 for sample in inputs])
    else:
        present = torch.ones(len(inputs), inputs[0]["input_ids"].numel(), dtype=torch.bool)
    loss_mask = present.clone()
    for counted, sample in zip(loss_mask, samples, strict=True):
        if isinstance(labels := sample.get("labels"), torch.Tensor):
            counted &= labels.reshape(-1).cpu() != -100
    return CapturedInputs(
        recorder.hidden, inputs, present, loss_mask, recorder.model_dtype, recorder.links, recorder.calls, recorder.dims
    )


class _ExtraBlockOutputs(Exception):
    """Blocks pass on more than hidden states [batch, tokens, width]; an isolation check must find out what."""


class _CallRecorder:
    """Records the arguments of the blocks, sample by sample. With `links` None it may raise `_ExtraBlockOutputs`."""

    def __init__(
        self, source: ModelSource, store: block_calls.TensorPool, dtype: torch.dtype | None, stream_experts: bool,
        links: ModelDependencies | None,
    ) -> None:  # fmt: skip
        self.source, self.store, self.dtype, self.stream_experts = source, store, dtype, stream_experts
        self.links_known = links is not None
        self.links = ModelDependencies() if links is None else replace(links, kinds=dict(links.kinds))
        self.model_dtype: torch.dtype | None = None
        self.hidden: ActivationTensor | None = None
        self.calls: list[list[NestedValue]] = [[] for _ in source.blocks]
        self.dims: dict[Hashable, tuple[int | None, ...]] = {}

    def record(self, samples: list[dict[str, torch.Tensor]], device: torch.device) -> None:
        """Run each sample, and as a batch of two when its arguments have a new shape, to find the batch dimensions."""
        self._count = len(samples)
        for index, sample in enumerate(samples):
            self._sample, self._doubled = index, False
            if block_calls.run_model(self.source, [sample], device, self._forward) is not None:
                name = type(self.source.model).__name__
                raise ModelError(f"{name} never called its last block {self.source.blocks[-1]!r}")
            if any((i, calls[index].structure) not in self.dims for i, calls in enumerate(self.calls)):
                self._doubled = True
                block_calls.run_model(self.source, [sample, sample], device, self._forward)
            self.store.end_of_sample()

    def _forward(
        self, index: int, block: nn.Module, run: Callable[..., Any], hidden: torch.Tensor, arguments: Arguments
    ) -> Any:
        """Record a block's arguments and return its hidden states unchanged."""
        if not self.links_known:
            plain = hidden.dim() == 3 and hidden.shape[0] <= 2
            objects = block_calls.mutable_objects(arguments).values()
            if not plain or not all(isinstance(item, (dict, list)) for item in objects):
                raise _ExtraBlockOutputs
        own, calls, name = self.links.block(index), self.calls[index], self.source.blocks[index]
        call = flatten(arguments, own.objects)
        leaves = [_SHARED_PLACEHOLDER if i in own.leaves else leaf for i, leaf in enumerate(call.leaves)]
        if self._doubled:
            single = calls[self._sample]
            pairs = zip(single.leaves, leaves, strict=True)
            self.dims[index, single.structure] = tuple(_batch_dim(one, two) for one, two in pairs)
        else:
            self._record_hidden(index, self.links.layout.rows(hidden))
            if len(calls) != self._sample:
                raise ModelError(f"block {name!r} was not called exactly once; it cannot be tuned alone")
            calls.append(replace(call, leaves=tuple(self.store.put(leaf) for leaf in leaves)))
        if type(block) not in self.links.kinds:
            with block_loaded(self.source, name, hidden.device, self.stream_experts):
                output = run(hidden, arguments)
            rest = block_calls.checked_output(self.source, index, output, hidden)[1]
            if not self.links_known and (flatten(rest).leaves or hasattr(type(output), "_fields")):
                raise _ExtraBlockOutputs
            self.links.kinds[type(block)] = rest
        if index == len(self.calls) - 1:
            raise block_calls.ForwardStopped
        return self.links.output(block, hidden)

    def _record_hidden(self, index: int, hidden: torch.Tensor) -> None:
        """Store the input [1, T, H] of block 0. Blocks return their input here, so each must get the same one."""
        if index == 0:
            if not is_finite(hidden):
                raise NumericsError(
                    f"NaN or Inf in the input of {self.source.blocks[0]} for calibration sample {self._sample}"
                )
            if self.hidden is None:
                self.model_dtype = hidden.dtype
                shape, dtype = (self._count, *hidden.shape[1:]), self.dtype or hidden.dtype
                if self.store.disk_store is not None:
                    self.hidden = self.store.disk_store.empty(shape, dtype)
                else:
                    self.hidden = empty_beside(torch.empty(0, device=self.store.device), shape, dtype)
            self.hidden[self._sample] = hidden[0]
        assert self.hidden is not None
        if self._sample == 0 and not torch.equal(hidden[0].to(self.hidden.device, self.hidden.dtype), self.hidden[0]):
            raise block_calls.hidden_changed(self.source, index)


def _batch_dim(single: ActivationTensor, double: torch.Tensor) -> int | None:
    """The dimension of a tensor that doubles with the batch size; None when it is independent of it."""
    if double.dim() != single.dim():
        return None
    return next((d for d in range(single.dim()) if double.shape[d] == 2 * single.shape[d] != 0), None)


def _check_samples(samples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Samples as arguments of the model: one-dimensional, of one length, without labels. Raises DataError."""
    if not samples:
        raise DataError("no calibration samples were given; at least one is needed")
    inputs: list[dict[str, torch.Tensor]] = []
    for index, sample in enumerate(samples):
        if not isinstance(sample.get("input_ids"), torch.Tensor):
            raise DataError(f"calibration sample {index} has no tensor 'input_ids'")
        clean = {k: v.reshape(-1) for k, v in sample.items() if k != "labels" and isinstance(v, torch.Tensor)}
        first = inputs[0] if inputs else clean
        if {k: v.shape for k, v in clean.items()} != {k: v.shape for k, v in first.items()}:
            raise DataError(
                f"calibration sample {index} differs from sample 0 in length or keys; pad or cut all to one length"
            )
        inputs.append(clean)
    if inputs[0]["input_ids"].numel() == 0:
        raise DataError("the calibration samples are empty")
    return inputs
