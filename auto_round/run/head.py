"""Quantize the layers outside the blocks (the head), write all non-block tensors, and compute the smoke loss."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.descent import descend_layer
from auto_round.algorithms.gptq import DAMPING, GPTQConfig, gptq_layer
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.algorithms.quantization.sign_round.loop import split_samples
from auto_round.calibration.data.sources import held_out_documents
from auto_round.calibration.observers import InputHessian, MinMaxObserver, SecondMomentObserver
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import NumericsError
from auto_round.eval.measures import token_nll
from auto_round.logger import logger
from auto_round.modeling.blocks import output_head
from auto_round.modeling.partial_loading import non_block_loaded
from auto_round.modeling.source import ModelSource
from auto_round.report.run_report import BlockRecord
from auto_round.run.block_layers import activation_of, input_quantizers, is_calibrated
from auto_round.run.blocks import RunState, layer_task, restore_unit
from auto_round.run.journal_files import Unit
from auto_round.run.writers import OutputWriter

_TOKENS = 2048  # tokens of one Hessian update
_HELD_OUT_TOKENS = 256  # held-out tokens whose predictions are compared
_ROWS = 32  # tokens whose KL divergence is computed at a time
_WEIGHTS = 1 << 24  # weights of the head in float32 at a time
_SMOKE_TOKENS = 64


@dataclass
class HeadInputs:
    """Inputs z of the head.

    Attributes:
        hessian: sum of z z^T over the tuning tokens in the quantized model, float32 [in, in].
        quantized: held-out tokens in the quantized model, float32 [tokens, in].
        full: the same in the full-precision model.
    """

    hessian: torch.Tensor
    quantized: torch.Tensor
    full: torch.Tensor


@torch.no_grad()
def head_inputs(state: RunState, name: str) -> HeadInputs:
    """Run both calibration streams from the last block to the input of the head `name`.

    Raises:
        NumericsError: NaN or Inf in its inputs.
    """
    source, quantized, full = state.source, state.inputs, state.full
    assert quantized is not None and full is not None
    tuned_on, held_out = split_samples(quantized.hidden.shape[0], state.settings.seed)
    hessian: torch.Tensor | None = None
    held_out_rows: list[tuple[torch.Tensor, ...]] = []
    each = max(1, _HELD_OUT_TOKENS // len(held_out))
    with non_block_loaded(source, state.device):
        for sample in sorted({*tuned_on, *held_out}):
            counted = quantized.captured.loss_mask[sample].to(state.device)
            rows = []
            for stream in (quantized, full) if sample in held_out else (quantized,):
                hidden = stream.hidden[sample : sample + 1].to(state.device)
                rows.append(stream.captured.run_head(source, hidden, [sample], stop_at=name)[0][counted].float())
            if sample in held_out:
                spread = torch.linspace(0, rows[0].shape[0] - 1, min(each, rows[0].shape[0])).long()
                held_out_rows.append(tuple(row[spread.to(row.device)] for row in rows))
            if sample in tuned_on:
                if hessian is None:
                    hessian = torch.zeros(rows[0].shape[-1], rows[0].shape[-1], device=rows[0].device)
                for part in rows[0].split(_TOKENS):
                    hessian.addmm_(part.t(), part)
    assert hessian is not None
    if not bool(torch.isfinite(hessian).all()):
        raise NumericsError(f"NaN or Inf in the inputs of layer {name!r}")
    return HeadInputs(hessian, torch.cat([j[0] for j in held_out_rows]), torch.cat([j[1] for j in held_out_rows]))


def quantize_head(
    task: LayerTask, inputs: HeadInputs, scale_dtype: torch.dtype, optimized: bool, gptq: GPTQConfig | None = None
) -> tuple[QuantizedLayer, float, float]:
    """Quantize the head in several ways and return the best on held-out tokens.

    They are compared by KL divergence, since squared error does not tell how the predictions change. Returns (layer, KL
    divergence of round-to-nearest, KL divergence of that layer), in nats.
    """
    task.importance = inputs.hessian.diagonal().contiguous()
    best = quantize_layer(task, optimized, scale_dtype)
    nearest = least = head_divergence(task, best, inputs)
    for other in _candidates(task, inputs.hessian, optimized, scale_dtype, gptq):
        divergence = head_divergence(task, other, inputs)
        if divergence < least:
            best, least = other, divergence
    return best, nearest, least


def _candidates(
    task: LayerTask, hessian: torch.Tensor, optimized: bool, scale_dtype: torch.dtype, gptq: GPTQConfig | None
) -> Iterator[QuantizedLayer]:
    """Other quantizations of the head, one at a time, since they are large."""
    if gptq is not None:
        yield gptq_layer(replace(task, input_hessians=[hessian]), optimized, scale_dtype, gptq.damping)
    searches = task.codec.head_searches
    if "descent" in searches:
        yield descend_layer(task, hessian, scale_dtype)
    if "plain" in searches and optimized:
        yield quantize_layer(task, False, scale_dtype)


@torch.no_grad()
def head_divergence(task: LayerTask, layer: QuantizedLayer, inputs: HeadInputs) -> float:
    """Mean KL(full || quantized) over the held-out tokens, nats."""
    quantized = inputs.quantized if task.activation is None else task.activation(inputs.quantized)
    full, found = _logits(task, None, inputs.full), _logits(task, layer, quantized)
    total = 0.0
    for x, z in zip(full.split(_ROWS), found.split(_ROWS), strict=True):
        wanted = x.log_softmax(-1)
        rows = (wanted.exp() * (wanted - z.log_softmax(-1))).sum(-1, dtype=torch.float64)
        total += sum(rows.tolist())
    return total / max(1, inputs.full.shape[0])


def _logits(task: LayerTask, layer: QuantizedLayer | None, inputs: torch.Tensor) -> torch.Tensor:
    """Logits, float32 [tokens, vocabulary], of the dense weight or of a quantized layer.

    Computed in slices of the vocabulary: a head in float32 may be the largest tensor of a run.
    """
    out, columns = task.weight.shape
    logits = torch.empty(inputs.shape[0], out, device=inputs.device)
    whole = layer is not None and isinstance(layer.scheme.group_size, tuple)
    step = out if whole else max(1, _WEIGHTS // columns)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        part = layer if layer is None or whole else layer.rows(rows)
        dense = task.weight[rows].float() if part is None else part.dequantize().to(inputs.device)
        logits[:, rows] = inputs @ dense.t()
    return logits if task.bias is None else logits.add_(task.bias.float())


def quantize_non_block(state: RunState) -> tuple[list[QuantizedLayer], list[BlockRecord]]:
    """Quantize the layers outside the blocks on the inputs that they get from the quantized blocks.

    A run that tunes also tunes the head; other layers get searched scales, or are rounded to nearest without
    calibration data. A layer that `state.numerics` leaves unquantized is left out.

    Returns (layers, records of the tuned ones).

    Raises:
        NumericsError: NaN or Inf in a weight, or in inputs when the policy is to fail.
    """
    source, settings, numerics = state.source, state.settings, state.numerics
    scale_dtype, gptq = settings.scale_dtype, settings.gptq
    steps = getattr(settings.algorithm, "iters", 0)
    optimized = settings.needs_data and settings.optimized_start
    head, blocks = output_head(source.model), tuple(f"{block}." for block in source.blocks)
    layers, records = [], []
    for name, plan in state.job.quantized().items():
        if name.startswith(blocks):
            continue
        started = time.monotonic()
        feeds_back = (gptq is not None or optimized) and plan.codec.uses_feedback(gptq is not None)
        tuned = steps > 0 and state.inputs is not None and source.model.get_submodule(name) is head
        fault: NumericsError | None = None
        inputs, importance, extremes, input_hessians = None, None, MinMaxObserver(), None
        try:
            inputs = head_inputs(state, name) if tuned else None
            if is_calibrated(plan.scheme) or (inputs is None and (optimized or feeds_back)):
                importance, extremes, input_hessians = _observe_inputs(state, name, inputs is None and feeds_back)
        except NumericsError as error:
            fault = error
        source.load(name, state.device)
        task = layer_task(source, plan)
        if fault is not None:
            made = list(numerics.fall_back(name, [task], fault).layers)
        else:
            task.activation = activation_of(plan.scheme, name, extremes, source.dtype)
            if inputs is not None:
                layer, before, after = quantize_head(task, inputs, scale_dtype, optimized, gptq)
                records.append(BlockRecord(name, before, after, steps, time.monotonic() - started))
            else:
                task.importance = importance if optimized else (state.importance or {}).get(name)
                task.input_hessians = input_hessians
                damping = DAMPING if gptq is None else gptq.damping
                layer = gptq_layer(task, task.importance is not None, scale_dtype, damping)
            made = [layer]
        for layer in made:
            numerics.count(task, layer)
        layers += made
        source.release(name)
    return layers, records


def _observe_inputs(
    state: RunState, name: str, paired: bool
) -> tuple[torch.Tensor | None, MinMaxObserver, list[torch.Tensor] | None]:
    """Second moments [in] and range of a layer's inputs, and with `paired` their Hessians."""
    stream, extremes = state.inputs, MinMaxObserver()
    if stream is None:
        return None, extremes, None
    moments, input_hessians = SecondMomentObserver(), InputHessian(passes=stream.hidden.shape[0])
    mask = stream.captured.loss_mask
    with torch.no_grad(), non_block_loaded(state.source, state.device):
        for sample in range(stream.hidden.shape[0]):
            hidden = stream.hidden[sample : sample + 1].to(state.device)
            inputs = stream.captured.run_head(state.source, hidden, [sample], stop_at=name)
            for observer in (moments, extremes, *([input_hessians] if paired else ())):
                observer.mask = mask[sample : sample + 1]
                observer.add(name, inputs)
    moments.check()
    input_hessians.close()
    return moments[name], extremes, input_hessians.of(name)


def finish_non_block(state: RunState) -> float | None:
    """Quantize the layers outside the blocks, and write all tensors outside the blocks, unless an interrupted run has
    done that. Returns the loss on the smoke sample."""
    blocks = len(state.job.blocks)
    if state.journal.finished > blocks:
        loss = restore_unit(state, blocks).loss
        return None if state.smoke is None else loss
    layers, records = quantize_non_block(state)
    write_non_block(state.source, layers, state.outputs)
    loss = smoke_loss(state, layers)
    unit = Unit(records=records, numerics=state.numerics.state(), loss=loss)
    state.add(unit)
    if layers:
        state.journal.add("non_block", unit, state.journal.checksum(state.source))
    return loss


def write_non_block(source: ModelSource, layers: Sequence[QuantizedLayer], outputs: Sequence[OutputWriter]) -> None:
    """Write every tensor outside the blocks: quantized layers, then the rest. A tied alias is written only if the
    tensor it is tied to was quantized."""
    replaced = {f"{layer.name}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    blocks = tuple(f"{block}." for block in source.blocks)
    tied = source.tied()
    rest = [
        name
        for name in source.tensor_names()
        if not name.startswith(blocks) and name not in replaced and (name not in tied or tied[name] in replaced)
    ]
    for output in outputs:
        for layer in layers:
            output.layer(layer)
        output.tensors(rest, source)
        output.spare()


@torch.no_grad()
def smoke_loss(state: RunState, layers: Sequence[QuantizedLayer]) -> float | None:
    """Mean next-token loss, in nats, of the quantized model on the smoke sample. `layers`: outside the blocks.

    None without a smoke sample, or when the loss is NaN and the policy is not to fail.

    Raises NumericsError when it is NaN and the policy is to fail.
    """
    if state.smoke is None:
        return None
    source, captured, hidden = state.source, state.smoke.captured, state.smoke.hidden.to(state.device)
    head = layers[0] if layers else None
    if head is None:
        logits = captured.run_head(source, hidden, [0])
    else:
        with non_block_loaded(source, state.device):
            before = captured.run_head(source, hidden, [0], stop_at=head.name)
        bias = None if head.bias is None else head.bias.to(before.device, torch.float32)
        for quantizer in input_quantizers(head):
            before = quantizer(before)
        logits = torch.nn.functional.linear(before.float(), head.dequantize().to(before.device), bias)
    ids = captured.inputs[0]["input_ids"].reshape(1, -1).to(logits.device)
    try:
        return mean_loss(logits, ids)
    except NumericsError:
        if state.numerics.policy == "fail":
            raise
        state.numerics.log_incident("the quantized model gives NaN on the smoke sample: no loss is compared")
        return None


def mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean over positions of the next-token loss in nats. Raises NumericsError when it is NaN."""
    loss = float(token_nll(logits.float(), ids).double().mean())
    if loss != loss:
        raise NumericsError("the quantized model's logits hold NaN; set --model_dtype float32, or check the weights")
    return loss


def smoke_samples(tokenizer: Any, vocab_size: int, max_length: int | None) -> list[dict[str, torch.Tensor]]:
    """One sample of at most 64 tokens that is run before and after saving: packaged text that is no calibration data,
    or a sequence of ids without a tokenizer.

    Args:
        tokenizer: the model's, or None.
        vocab_size: larger ids are dropped.
        max_length: positions the model has, None without a limit.
    """
    length = min(_SMOKE_TOKENS, max_length or _SMOKE_TOKENS)
    ids: list[int] = []
    if tokenizer is not None:
        text = held_out_documents()[0][: 16 * length]
        try:
            ids = [i for i in tokenizer(text)["input_ids"] if i < vocab_size][:length]
        except Exception as error:  # a tokenizer without its vocabulary may raise anything
            logger.warning("the tokenizer cannot read text (%s); the check after saving uses other tokens", error)
    if len(ids) < 2:  # any ids do: the same ones are compared before and after saving
        ids = [(7 * i + 3) % vocab_size for i in range(length)]
    tensor = torch.tensor(ids, dtype=torch.int64)
    return [{"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}]
