"""Reopen a written folder and compare its tensors, layers and smoke loss with what was quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.capture import capture_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError, VerifyError
from auto_round.inference.convert_model import convert_hf_model
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.blocks import weight_2d
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.experts import default_expert_names
from auto_round.modeling.files.folder import read_object
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.partial_loading import block_loader, non_block_loaded
from auto_round.output.verify import dense_digest, layer_digest, shorten
from auto_round.report.memory import trim_heap
from auto_round.run.block_layers import in_dtype
from auto_round.run.head import mean_loss
from auto_round.run.streams import Stream

# Tolerance of the loss by dtype of the run: the arithmetic is the same, but not always in the same order.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 3e-2


@dataclass(frozen=True)
class Expected:
    """Expected contents of a saved folder.

    Attributes:
        tensors: shape and dtype of every tensor by name.
        digests: `layer_digest` by quantized layer.
        dense: `dense_digest` by other tensor.
        samples: the smoke sample; None when no forward pass is compared.
        loss: mean next-token loss of the tuned model in memory on it.
        device, dtype: of the matrix products.
        unpack_layer: reads a layer from the files, for formats that only other programs open; None opens the folder as
            Transformers does.
        casts_to_model_dtype: the files hold dequantized weights in the model's dtype; if that has 16 bits, the weights
            are rounded and the loss differs more.
        configs: expected values of the configuration files, by file name.
        finite: no tensor may hold NaN or Inf; False when those of the source were left unchanged.
        stream_experts: experts are read one at a time.
        bounded: memory is limited by max_memory.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    digests: Mapping[str, str]
    dense: Mapping[str, str]
    samples: list[dict[str, torch.Tensor]] | None
    loss: float | None
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    unpack_layer: Callable[[str, TensorFiles], QuantizedLayer] | None = None
    casts_to_model_dtype: bool = False
    finite: bool = True
    configs: Mapping[str, Any] = field(default_factory=dict)
    stream_experts: bool = False
    bounded: bool = False


def verify_folder(folder: Path, expected: Expected) -> dict[str, Any]:
    """Reopen a saved model and compare it with the expected contents.

    Returns plain values for the report.

    Raises:
        VerifyError: the folder cannot be opened; a tensor is missing, unplanned or of another shape or dtype; a layer's
            codes or another tensor's bytes differ; or the model's loss differs.
    """
    try:
        _check_configs(folder, expected.configs)
        files = _check_tensors(folder, expected)
        loss = None
        if expected.unpack_layer is None:
            loss = _reopen(folder, expected)
        else:
            for layer, digest in expected.digests.items():
                if layer_digest(expected.unpack_layer(layer, files), False, torch.float32) != digest:
                    raise _mismatch_error(folder, layer)
    except (ModelError, ConfigError, NumericsError, UnsupportedError) as error:
        raise VerifyError(f"{folder} was written but does not open: {error}") from error
    return {
        "passed": True, "tensors": len(expected.tensors), "layers": len(expected.digests),
        "loss_in_memory": expected.loss, "loss_reopened": loss,
    }  # fmt: skip


def _reopen(folder: Path, expected: Expected) -> float | None:
    """Open the folder, compare its layers, and return the loss on the smoke sample, if that is compared."""
    quantized = (folder / "quantization_config.json").exists()
    source = CheckpointSource(
        folder, prepare=_swap_quantized if quantized else None, trust_remote_code=expected.trust_remote_code
    )
    source.checks_finite, source.bounded = expected.finite, expected.bounded
    names = _quantized_modules(source.model) if quantized else {name: name for name in expected.digests}
    _compare_sets("quantized layers", folder, set(names), set(expected.digests))
    loss = _check_blocks(folder, source, expected, names)
    if loss is not None and expected.loss is not None:
        coarsest = source.dtype if expected.casts_to_model_dtype else expected.dtype
        allowed = _TOLERANCE.get(coarsest, _TOLERANCE_HALF) * (1 + abs(expected.loss))
        if not abs(loss - expected.loss) <= allowed:
            raise VerifyError(
                f"{folder}: the saved model's loss on the smoke sample is {loss:.5f}, the tuned model's was "
                f"{expected.loss:.5f}; do not use these files, and report this with report.json"
            )
    return loss


def _swap_quantized(model: torch.nn.Module) -> None:
    convert_hf_model(model, "cpu")


def _quantized_modules(model: torch.nn.Module) -> dict[str, str]:
    """Module names of packed layers by their names in the run; experts may have the names of the files."""
    usual = default_expert_names(model)
    return {usual.get(name, name): name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _check_configs(folder: Path, configs: Mapping[str, Any]) -> None:
    """Compare the configuration files, which decide how a reader interprets the weights."""
    for name, planned in configs.items():
        stored, wanted = read_object(folder / name), json.loads(json.dumps(planned))
        wrong = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
        if wrong:
            raise VerifyError(
                f"{folder / name}: {wrong[0]} is {shorten(json.dumps(stored.get(wrong[0])), 200)}, planned was "
                f"{shorten(json.dumps(wanted.get(wrong[0])), 200)}; do not use these files"
            )


def _check_tensors(folder: Path, expected: Expected) -> TensorFiles:
    files = TensorFiles.open(folder)
    stored = files.tensors
    _compare_sets("tensors", folder, set(stored), set(expected.tensors))
    for name, (shape, dtype) in expected.tensors.items():
        found = stored[name]
        if tuple(found.shape) != tuple(shape) or found.dtype != dtype:
            raise VerifyError(
                f"{folder}: tensor {name} is {found.dtype} {list(found.shape)}, planned was {dtype} {list(shape)}"
            )
    for name, digest in expected.dense.items():
        if dense_digest(files.read(name)) != digest:
            raise VerifyError(f"{folder}: tensor {name} has changed; do not use these files, and report this")
    return files


def _compare_sets(what: str, folder: Path, found: set[str], wanted: set[str]) -> None:
    for names, words in ((wanted - found, "missing"), (found - wanted, "not planned")):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise VerifyError(f"{folder}: {len(names)} {what} are {words}, such as {shown}")


@torch.no_grad()
def _check_blocks(
    folder: Path, source: CheckpointSource, expected: Expected, modules: Mapping[str, str]
) -> float | None:
    """Load block by block, compare each quantized layer, and run the smoke sample.

    `modules`: module name by the layer's name in the run.
    """
    captured = None
    if expected.samples is not None and expected.loss is not None:
        captured = capture_inputs(source, expected.samples, expected.device, stream_experts=expected.stream_experts)
    stream = None if captured is None else Stream(captured, captured.hidden, 1)
    inside: set[str] = set()
    for index, name in enumerate(source.blocks):
        block = block_loader(source, name, expected.device, expected.dtype, expected.stream_experts)
        module = block.load()
        for layer in [n for n in expected.digests if n.startswith(f"{name}.")]:
            with block.layer_loaded(modules[layer]) as loaded:
                _compare_layer(folder, layer, loaded, expected.digests[layer])
            inside.add(layer)
        if stream is not None:
            with in_dtype(module, source.dtype, expected.dtype), block.running():
                stream.hidden = stream.after(index, module, expected.device, expected.dtype)
        block.release()
        trim_heap()
    outside = [layer for layer in expected.digests if layer not in inside]
    for layer in outside:
        source.load(layer, expected.device)
        _compare_layer(folder, layer, source.model.get_submodule(layer), expected.digests[layer])
        if layer != outside[-1]:  # the last one is the head, which the smoke sample needs
            source.release(layer)
    if captured is None or stream is None or expected.samples is None:
        return None
    hidden = stream.hidden.to(expected.device)
    if outside:
        with non_block_loaded(source, expected.device):
            before = captured.run_head(source, hidden, [0], stop_at=outside[-1])
        logits = source.model.get_submodule(outside[-1])(before)
    else:
        logits = captured.run_head(source, hidden, [0])
    return mean_loss(logits, expected.samples[0]["input_ids"].reshape(1, -1).to(logits.device))


def _compare_layer(folder: Path, name: str, module: torch.nn.Module, wanted: str) -> None:
    if isinstance(module, PackedLinear):
        found = layer_digest(module.layer(name), False, torch.float32)
    else:
        found = dense_digest(weight_2d(module))
    if found != wanted:
        raise _mismatch_error(folder, name)


def _mismatch_error(folder: Path, name: str) -> VerifyError:
    return VerifyError(f"{folder}: layer {name} does not hold what was tuned; do not use these files, and report this")
