"""Tuning a block that is larger than the memory: first what is around its experts, then every expert by itself.

1. The block runs in full precision, one expert in memory at a time; what the experts give is recorded.
2. The other layers are tuned on the block's loss, with that record in place of the experts.
3. With those quantized the block runs up to its experts; what they are fed, and by which routing, is recorded.
4. Each expert is a task of its own: its tokens of step 3 against what it makes of them in full precision, both times
   the routing's weight, so that a token counts as it does in the block. Its codes go to a file.

No result depends on how many experts would fit. docs/adr/0018 has the reasons and the price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch

from auto_round.algorithms.quantization.block_task import BlockQuantizer, BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.sign_round.passes import Passes
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.calibration.expert_rows import (
    FedExperts,
    GatheredRows,
    RecordedExperts,
    Routing,
    Rows,
    TokenRows,
    experts_inside,
    in_place_of,
    most_tokens,
    outputs_recorded,
    room_like,
    rows_of,
)
from auto_round.calibration.inputs import CapturedInputs
from auto_round.calibration.products import input_products
from auto_round.calibration.spill import Spill
from auto_round.compressors.block_dtype import in_dtype
from auto_round.compressors.global_scales import share_global_scales
from auto_round.compressors.install import drop_copies, install, loaded
from auto_round.compressors.layers_by_expert import StoredLayer, StoredLayers
from auto_round.compressors.streams import samples_in_pass
from auto_round.data_type.activation import quantized_inputs
from auto_round.modeling.one_expert import OneExpert, expert_of
from auto_round.quantized_layer import QuantizedLayer

FEWEST = 32  # tokens of an expert that is tuned: of fewer, a sixteenth kept aside is one or none, which judges nothing
_SEED_STEP = 1_000_003


def expert_seed(block_seed: int, number: int) -> int:
    """Of the order in which the rows of an expert are seen."""
    return block_seed + _SEED_STEP * (number + 1)


@dataclass
class ExpertRooms:
    """What the blocks of a walk use one after the other.

    Attributes:
        codes: file for the codes of a block's experts.
        start: makes the layers of experts that too few tokens reach.
        fed: [N * T, H], what the experts of the block give, and later what they are fed.
        targets: [most, H], what one of them should give.
    """

    codes: Spill
    start: BlockQuantizer
    fed: Rows | None = None
    targets: Rows | None = None

    def room(self, which: str, like: Rows, shape: tuple[int, int], dtype: torch.dtype) -> Rows:
        """`fed` or `targets` of this shape, kept where `like` is: that of the block before, if it is alike."""
        rows: Rows | None = getattr(self, which)
        if rows is None or (tuple(rows.shape), rows.dtype) != (shape, dtype):
            rows = room_like(like, shape, dtype)
            setattr(self, which, rows)
        return rows

    def offload(self) -> bool:
        """Move the rows off the device. False when none are there."""
        moved = False
        for which in ("fed", "targets"):
            rows = getattr(self, which)
            if isinstance(rows, torch.Tensor) and rows.device.type != "cpu":
                setattr(self, which, rows.cpu())
                moved = True
        return moved


class ExpertByExpert:
    """A quantizer of one block whose experts are read one at a time.

    Args:
        inner: tunes the other layers, and each expert.
        rooms: of the walk.
        experts: of the block.
        captured: the samples.
        hidden: their hidden states [N, T, H], of which only the shape and the place count.
        batch: samples in one pass without gradients.
        weighs: importance, and products of input channels, come from calibration data.
        done: is told of each layer while its weight is there.
        between: called when much memory has become free.
    """

    needs_targets = True

    def __init__(
        self, inner: SignRoundQuantizer, rooms: ExpertRooms, experts: OneExpert, captured: CapturedInputs,
        hidden: Rows, batch: int, weighs: bool, done: Callable[[LayerTask, QuantizedLayer], None],
        between: Callable[[], None],
    ) -> None:  # fmt: skip
        self.name, self.needs_importance = inner.name, inner.needs_importance
        self._inner, self._rooms, self._experts, self._captured = inner, rooms, experts, captured
        self._batch, self._weighs, self._done, self._between = batch, weighs, done, between
        block = experts.source.model.get_submodule(experts.block)
        ((self._inside, self._module),) = experts_inside(block).items()
        self._samples, self._tokens = int(hidden.shape[0]), int(hidden.shape[1])
        assert experts.dtype is not None
        rooms.room("fed", hidden, (self._samples * self._tokens, self._module.hidden_dim), experts.dtype)

    def needs_products(self, layer: LayerTask) -> bool:
        """Of experts they are gathered from the tokens that they are tuned on."""
        return expert_of(layer.name) is None and self._inner.needs_products(layer)

    def recording(self) -> AbstractContextManager[None]:
        """While this is open, what the experts give is recorded."""
        return outputs_recorded(self._module, self._record())

    def quantize_block(self, task: BlockTask) -> BlockResult:
        rest = replace(task, layers=[layer for layer in task.layers if expert_of(layer.name) is None])
        rest.offload = partial(self._offload, task.offload)
        made = BlockResult()
        if rest.layers:
            with in_place_of(task.block, self._inside, RecordedExperts(self._record())):
                made = self._inner.quantize_block(rest)
        rest.targets = None
        for layer_task, layer in zip(rest.layers, made.layers, strict=True):
            self._done(layer_task, layer)
            install(layer_task, layer)
        self._between()
        fed = self._feed(rest)
        rest.inputs = None
        tokens, counted = self._samples * self._tokens, task.loss_mask
        assert fed.index is not None and fed.weights is not None
        most = most_tokens(tokens, fed.index.shape[1], self._module.num_experts)
        routing = Routing.of(
            fed.index, fed.weights, None if counted is None else counted.reshape(-1), self._module.num_experts
        )
        del fed
        self._rooms.room("targets", self._fed(), (most, self._module.hidden_dim), task.compute_dtype)
        tokens = tokens if counted is None else int(counted.sum())
        before, after = made.loss_before or 0.0, made.loss_after or 0.0
        stored: dict[str, StoredLayer] = {}
        for number in range(self._module.num_experts):
            name = f"{self._experts.block}.{self._inside}.{number}"
            own = [layer for layer in task.layers if expert_of(layer.name) == name]
            if own:
                one = replace(rest, name=name, layers=own, loss_mask=None, seed=expert_seed(task.seed, number))
                result = self._quantize(number, one, *routing.expert(number, most))
                stored |= {layer.name: StoredLayer.of(layer, self._rooms.codes) for layer in result.layers}
                share = routing.count(number) / max(1, tokens)
                before += share * (result.loss_before or 0.0)
                after += share * (result.loss_after or 0.0)
                del one, result
                self._between()
        held = {layer.name: layer for layer in made.layers}
        layers = StoredLayers([layer.name for layer in task.layers], held, stored, self._experts.device)
        return BlockResult(layers, before, after, self._inner.config.iters)

    def _record(self) -> TokenRows:
        return TokenRows(self._fed, self._tokens, lambda: self._captured.running)

    def _fed(self) -> Rows:
        assert self._rooms.fed is not None
        return self._rooms.fed

    def _offload(self, streams: Callable[[BlockTask], bool], task: BlockTask) -> bool:
        """Move the rows and the hidden states off the device."""
        moved = self._rooms.offload()
        return streams(task) or moved

    @torch.no_grad()
    def _feed(self, task: BlockTask) -> FedExperts:
        """Run the block up to its experts."""
        fed, device = FedExperts(self._record()), self._experts.device
        steps = {layer.module: layer.activation for layer in task.layers if layer.activation is not None}
        with quantized_inputs(steps), in_place_of(task.block, self._inside, fed):
            Passes(task, (), self._batch, device).run(partial(self._run_all, task))
        return fed

    def _run_all(self, task: BlockTask, at_once: int) -> None:
        """Call the block on all samples."""
        assert task.inputs is not None
        for at in range(0, self._samples, at_once):
            samples = list(range(at, min(at + at_once, self._samples)))
            task.run(task.inputs[samples].to(self._experts.device, task.compute_dtype), samples)

    def _quantize(self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor) -> BlockResult:
        """One expert. `tokens`: int64 [n], its rows of what the experts are fed; `weights`: float32 [n]."""
        source = self._experts.source
        task.block = source.load(task.name, self._experts.device)
        try:
            task.layers = [loaded(layer) for layer in task.layers]
            share_global_scales(task.layers)
            if tokens.numel() < FEWEST:
                result = self._rooms.start.quantize_block(task)
            else:
                with in_dtype(task.block, source.dtype, task.compute_dtype):
                    result = self._tune(number, task, tokens, weights)
            for layer_task, layer in zip(task.layers, result.layers, strict=True):
                self._done(layer_task, layer)
        finally:
            source.release(task.name)
        return result

    def _tune(self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor) -> BlockResult:
        """As many pieces as there are samples: a step then sees as much of the data as a step of a block does."""
        each = -(-tokens.numel() // self._samples)
        places = torch.arange(tokens.numel())
        shares = torch.zeros(-(-tokens.numel() // each) * each)
        shares[: tokens.numel()] = weights
        shares = shares.view(-1, each, 1)

        def place(task: BlockTask) -> None:
            rooms = self._rooms
            assert rooms.fed is not None and rooms.targets is not None
            task.inputs, task.targets = GatheredRows(rooms.fed, tokens, each), GatheredRows(rooms.targets, places, each)

        everything = task.offload

        def offload(task: BlockTask) -> bool:
            moved = everything(task)
            place(task)
            return moved

        def run(hidden: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:
            made = self._module.run_expert(number, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
            return made * shares[list(pieces)].to(made.device)

        place(task)
        assert isinstance(task.inputs, GatheredRows)
        task.loss_mask, task.run, task.offload = task.inputs.present, run, offload
        at_once = samples_in_pass(self._batch, each, self._experts.device)
        Passes(task, (), at_once).run(partial(self._target, number, task, tokens, weights, each))
        drop_copies(task.layers)
        return self._inner.quantize_block(task)

    @torch.no_grad()
    def _target(
        self, number: int, task: BlockTask, tokens: torch.Tensor, weights: torch.Tensor, each: int, at_once: int
    ) -> None:
        """What the expert makes of its tokens in full precision, `at_once` pieces in one pass."""
        rooms, device, step = self._rooms, self._experts.device, at_once * each
        assert rooms.fed is not None and rooms.targets is not None
        inner = {layer.name: layer.name.removeprefix(f"{task.name}.") for layer in task.layers}
        paired = [inner[layer.name] for layer in task.layers if self._weighs and self._inner.needs_products(layer)]
        with input_products(task.block, paired, -(-tokens.numel() // step)) as products:
            for at in range(0, tokens.numel(), step):
                part = slice(at, min(at + step, tokens.numel()))
                hidden = rows_of(rooms.fed, tokens[part]).to(device, task.compute_dtype)
                made = self._module.run_expert(number, hidden) * weights[part, None].to(device)
                rooms.targets[part] = made.to(rooms.targets.device, rooms.targets.dtype)
        for layer in task.layers:
            layer.products = products.of(inner[layer.name])
