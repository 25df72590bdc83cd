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
from auto_round.report.run_report import BlockRecord
from auto_round.run.block_layers import activation_of, input_quantizers, layer_task
from auto_round.run.blocks import RunState, write_unit
from auto_round.run.journal_files import Unit
from auto_round.run.plan import LayerPlan

_TOKENS = 2048  # tokens of one Hessian update
_HELD_OUT_TOKENS = 256  # held-out tokens whose predictions are compared
_ROWS = 32  # tokens whose KL divergence is computed at a time
_WEIGHTS = 1 << 24  # weights of the head in float32 at a time
_SMOKE_TOKENS = 64


@dataclass
class HeadInputs:
    """Inputs z of the head, float32: the sum of z z^T over the tuning tokens in the quantized model [in, in], and
    held-out tokens in the quantized and the full-precision model [tokens, in]."""

    hessian: torch.Tensor
    quantized: torch.Tensor
    full: torch.Tensor


@torch.no_grad()
def head_inputs(state: RunState, name: str) -> HeadInputs:
    """Run both calibration streams from the last block to the input of a head. Raises NumericsError for NaN or Inf."""
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
    """Quantize the head in several ways and choose the least KL divergence on held-out tokens: (layer, divergence of
    round-to-nearest, divergence of that layer), in nats."""
    task.importance, searches = inputs.hessian.diagonal().contiguous(), task.codec.head_searches

    def others() -> Iterator[QuantizedLayer]:  # one at a time, since they are large
        if gptq is not None:
            yield gptq_layer(replace(task, input_hessians=[inputs.hessian]), optimized, scale_dtype, gptq.damping)
        if "descent" in searches:
            yield descend_layer(task, inputs.hessian, scale_dtype)
        if "plain" in searches and optimized:
            yield quantize_layer(task, False, scale_dtype)

    best = quantize_layer(task, optimized, scale_dtype)
    nearest = least = head_divergence(task, best, inputs)
    for other in others():
        divergence = head_divergence(task, other, inputs)
        if divergence < least:
            best, least = other, divergence
    return best, nearest, least


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
    """Logits, float32 [tokens, vocabulary], of the dense weight or of a quantized layer, in slices of words."""
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


def finish_non_block(state: RunState) -> float | None:
    """Quantize and write what is outside the blocks, if an interrupted run has not. Returns the smoke loss."""
    blocks = len(state.job.blocks)
    if state.journal.finished > blocks:
        loss = state.restore_unit(blocks).loss
        return None if state.smoke is None else loss
    unit, layers = Unit(), dict[str, QuantizedLayer]()
    for name, plan in state.job.quantized().items():
        if not name.startswith(tuple(f"{block}." for block in state.source.blocks)):
            layers |= {layer.name: layer for layer in _quantize_layer(name, plan, state, unit)}
    write_unit(state.source, None, layers, {}, state.outputs)
    unit.loss = smoke_loss(state, list(layers.values()))
    unit.numerics = state.numerics.state()
    state.add(unit)
    if layers:
        state.journal.add("non_block", unit, state.journal.checksum(state.source))
    return unit.loss


def _quantize_layer(name: str, plan: LayerPlan, state: RunState, unit: Unit) -> Sequence[QuantizedLayer]:
    """Quantize a layer outside the blocks on the inputs that it gets from the quantized blocks; () if `state.numerics`
    leaves it unquantized. A run that tunes also tunes the head, which `unit` records."""
    source, settings, started = state.source, state.settings, time.monotonic()
    scale_dtype, gptq = settings.scale_dtype, settings.gptq
    optimized, steps = settings.needs_data and settings.optimized_start, getattr(settings.algorithm, "iters", 0)
    feeds_back = (gptq is not None or optimized) and plan.codec.uses_feedback(gptq is not None)
    tuned = steps > 0 and state.inputs is not None and source.model.get_submodule(name) is output_head(source.model)
    fault: NumericsError | None = None
    inputs, importance, extremes, input_hessians = None, None, MinMaxObserver(), None
    try:
        inputs = head_inputs(state, name) if tuned else None
        if plan.scheme.calibrated or (inputs is None and (optimized or feeds_back)):
            importance, extremes, input_hessians = _observe_inputs(state, name, inputs is None and feeds_back)
    except NumericsError as error:
        fault = error
    source.load(name, state.device)
    task = layer_task(source, plan)
    if fault is not None:
        made = state.numerics.fall_back(name, [task], fault).layers
    else:
        task.activation = activation_of(plan.scheme, name, extremes, source.dtype)
        if inputs is not None:
            layer, before, after = quantize_head(task, inputs, scale_dtype, optimized, gptq)
            unit.records.append(BlockRecord(name, before, after, steps, time.monotonic() - started))
        else:
            task.importance = importance if optimized else (state.importance or {}).get(name)
            task.input_hessians = input_hessians
            damping = DAMPING if gptq is None else gptq.damping
            layer = gptq_layer(task, task.importance is not None, scale_dtype, damping)
        made = [layer]
    for layer in made:
        state.numerics.count(task, layer)
    source.release(name)
    return made


def _observe_inputs(
    state: RunState, name: str, paired: bool
) -> tuple[torch.Tensor | None, MinMaxObserver, list[torch.Tensor] | None]:
    """Second moments [in] and range of a layer's inputs, and with `paired` their Hessians."""
    stream, moments, extremes = state.inputs, SecondMomentObserver(), MinMaxObserver()
    if stream is None:
        return None, extremes, None
    input_hessians = InputHessian(passes=stream.hidden.shape[0])
    with torch.no_grad(), non_block_loaded(state.source, state.device):
        for sample in range(stream.hidden.shape[0]):
            hidden = stream.hidden[sample : sample + 1].to(state.device)
            inputs = stream.captured.run_head(state.source, hidden, [sample], stop_at=name)
            for observer in (moments, extremes, *([input_hessians] if paired else ())):
                observer.mask = stream.captured.loss_mask[sample : sample + 1]
                observer.add(name, inputs)
    moments.check()
    input_hessians.close()
    return moments[name], extremes, input_hessians.of(name)


@torch.no_grad()
def smoke_loss(state: RunState, layers: Sequence[QuantizedLayer]) -> float | None:
    """Mean next-token loss, in nats, of the quantized model on the smoke sample; None without one, or when it is NaN
    and the policy is not to fail. `layers`: outside the blocks."""
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
        if state.settings.on_nan == "fail":
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
    or without a tokenizer some ids."""
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
