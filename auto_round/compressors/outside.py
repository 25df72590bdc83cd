"""Layers outside the blocks that are quantized too (the head), and all tensors that are not in a block."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from auto_round.algorithms.quantization.block_task import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import round_to_nearest
from auto_round.calibration.extremes import InputExtremes
from auto_round.calibration.products import InputProducts
from auto_round.calibration.statistics import SecondMoments
from auto_round.compressors.activations import activation_of, is_calibrated
from auto_round.compressors.blockwise import Walk, layer_task
from auto_round.compressors.head import head_inputs, quantize_head
from auto_round.compressors.install import install
from auto_round.compressors.job import Job
from auto_round.compressors.scale_limits import clamped_scales
from auto_round.compressors.sinks import Sink
from auto_round.errors import NumericsError
from auto_round.eval.loss import token_nll
from auto_round.modeling.outside import outside_loaded
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer
from auto_round.report.run_report import BlockRecord


def quantize_outside(
    job: Job, source: ModelSource, walk: Walk, optimized: bool, scale_dtype: torch.dtype, steps: int = 0,
    sinks: Sequence[Sink] = (),
) -> list[QuantizedLayer]:  # fmt: skip
    """Quantize the layers that are in no block, by the inputs that the quantized blocks give them: the head tuned when
    the blocks were (`steps` of them), others on searched scales, and plainly without calibration data. Their dense
    weights are put in place until the model's tail is released. A layer that `walk.numbers` keeps is left out, which
    the `sinks` are told.

    Raises:
        NumericsError: NaN or Inf in a weight, and in the inputs of a layer where `walk.numbers` is to fail of it.
    """
    results = []
    head = _head(source.model)
    for name, plan in job.quantized().items():
        if any(name.startswith(f"{block}.") for block in source.blocks):
            continue
        started = time.monotonic()
        tuned = steps > 0 and walk.last_inputs is not None and source.model.get_submodule(name) is head
        fault: NumericsError | None = None
        inputs, importance, extremes, products = None, None, InputExtremes(), None
        try:
            inputs = head_inputs(source, walk, name) if tuned else None
            if is_calibrated(plan.scheme) or (optimized and inputs is None):
                paired = optimized and inputs is None and plan.ggml is not None
                importance, extremes, products = _observed(source, walk, name, paired)
        except NumericsError as error:
            fault = error
        source.load(name, walk.device)
        task = layer_task(source, plan)
        if fault is not None:
            found = walk.numbers.fall_back(name, [task], fault, sinks, walk.fall).layers
            if not found:
                source.release(name)
                continue
            layer = found[0]
        else:
            task.activation = activation_of(plan.scheme, name, extremes, source.dtype)
            if inputs is not None:
                layer, before, after = quantize_head(task, inputs, scale_dtype, optimized)
                walk.records.append(BlockRecord(name, before, after, steps, time.monotonic() - started))
            else:
                task.importance = importance if optimized else (walk.importance or {}).get(name)
                task.products = products
                layer = round_to_nearest(task, task.importance is not None, scale_dtype)
        if task.activation is not None:
            walk.activations[name] = task.activation
        walk.numbers.count(task, clamped_scales(task, layer))
        if not source.lazy:
            _untie(source, task)
            install(task, layer)
        source.release(name)
        results.append(layer)
    return results


def _head(model: torch.nn.Module) -> torch.nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _untie(source: ModelSource, task: LayerTask) -> None:
    """Give a live model's head a weight of its own before it is changed."""
    weight = task.module.weight
    assert isinstance(weight, torch.nn.Parameter)
    task.module.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if source.tied():
        source.config.tie_word_embeddings = False


def _observed(
    source: ModelSource, walk: Walk, name: str, paired: bool
) -> tuple[torch.Tensor | None, InputExtremes, list[torch.Tensor] | None]:
    """The second moments and extremes of what the layer is fed, and if `paired` the products of its channels."""
    stream = walk.last_inputs
    extremes = InputExtremes()
    if stream is None:
        return None, extremes, None
    moments, products = SecondMoments(), InputProducts(passes=stream.hidden.shape[0])
    mask = stream.captured.loss_mask
    with torch.no_grad(), outside_loaded(source, walk.device):
        for sample in range(stream.hidden.shape[0]):
            hidden = stream.hidden[sample : sample + 1].to(walk.device)
            moments.mask = extremes.mask = products.mask = mask[sample : sample + 1]
            fed = stream.captured.finish(source, hidden, [sample], stop_at=name)
            moments.add(name, fed)
            extremes.add(name, fed)
            if paired:
                products.add(name, fed)
    moments.check()
    products.close()
    return moments[name], extremes, products.of(name)


def emit_outside(job: Job, source: ModelSource, layers: Sequence[QuantizedLayer], sinks: Sequence[Sink]) -> None:
    """Hand every tensor that is in no block to the sinks: quantized layers, then the rest. A tied alias is left out,
    unless the tensor it is tied to was quantized."""
    replaced = {f"{layer.name}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    blocks = tuple(f"{block}." for block in source.blocks)
    tied = source.tied()
    rest = [
        name
        for name in source.tensor_names()
        if not name.startswith(blocks) and name not in replaced and (name not in tied or tied[name] in replaced)
    ]
    for sink in sinks:
        for layer in layers:
            sink.layer(layer)
        sink.tensors(rest, source)
        sink.spare()


@torch.no_grad()
def probe_loss(source: ModelSource, walk: Walk, layers: Sequence[QuantizedLayer]) -> float | None:
    """Mean next-token loss, in nats, of the probe after the quantized blocks and head. None without a probe, and where
    it is NaN in a run that goes on from that.

    Raises NumericsError when it is NaN, where the policy is to fail.
    """
    try:
        return _probe_loss(source, walk, layers)
    except NumericsError:
        if walk.numbers.policy == "fail":
            raise
        walk.numbers.note("the quantized model gives NaN on the probe: no loss is compared after saving")
        return None


def _probe_loss(source: ModelSource, walk: Walk, layers: Sequence[QuantizedLayer]) -> float | None:
    if walk.probe is None or walk.probe_hidden is None:
        return None
    hidden = walk.probe_hidden.to(walk.device)
    head = next((layer for layer in layers if layer.codes is not None or layer.blocks is not None), None)
    if head is None:
        logits = walk.probe.finish(source, hidden, [0])
    else:
        with outside_loaded(source, walk.device):
            before = walk.probe.finish(source, hidden, [0], stop_at=head.name)
        bias = None if head.bias is None else head.bias.to(before.device, torch.float32)
        if head.name in walk.activations:
            before = walk.activations[head.name](before)
        logits = torch.nn.functional.linear(before.float(), head.dequantize().to(before.device), bias)
    ids = walk.probe._inputs[0]["input_ids"].reshape(1, -1).to(logits.device)
    return mean_loss(logits, ids)


def mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean over positions of the next-token loss in nats. Raises NumericsError when it is NaN."""
    loss = float(token_nll(logits.float(), ids).double().mean())
    if loss != loss:
        raise NumericsError("the quantized model's logits hold NaN; set --model_dtype float32, or check the weights")
    return loss
