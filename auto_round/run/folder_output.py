"""Write one format's folder of safetensors files, and verify it by reopening it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.capture import capture_inputs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError, VerifyError
from auto_round.formats.base import OutputFormat, TensorSpecs, require_plan
from auto_round.inference.convert_model import convert_hf_model
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.blocks import weight_2d
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.experts import default_expert_names
from auto_round.modeling.files.folder import read_object
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.partial_loading import block_loader, non_block_loaded
from auto_round.modeling.source import ModelSource, check_finite
from auto_round.output import verify as check
from auto_round.output.staging import Staging
from auto_round.output.writer import Records, ShardWriter, header_entry_bytes
from auto_round.report.memory import trim_heap
from auto_round.run.block_layers import in_dtype
from auto_round.run.file_layout import FileLayout, TensorAssembler, plan_files, read_model_tensors
from auto_round.run.finalize import config_values, write_config, write_side_files
from auto_round.run.head import mean_loss
from auto_round.run.plan import Job
from auto_round.run.streams import Stream
from auto_round.run.writers import FileOutput, Mark, OutputContext

# Tolerance of the loss by dtype of the run: the arithmetic is the same, but not always in the same order.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 3e-2


class FolderWriter(FileOutput):
    """Packs layers in one format and writes them with the other tensors into a folder. `dense`: `dense_digest` by
    stored tensor."""

    writer: ShardWriter

    def __init__(self, job: Job, fmt: OutputFormat, stage: Staging, source: ModelSource, shard: int | str) -> None:
        super().__init__(job, fmt, stage, source, shard)
        self._unquantized: dict[str, str] = {}
        self._assembler = TensorAssembler(plan_files(fmt, job.layers, source), source.model)
        self._header = sum(header_entry_bytes(name, len(shape)) for name, (shape, _) in self.specs().items())

    @property
    def layout(self) -> FileLayout:
        return self._assembler.layout

    def specs(self) -> TensorSpecs:
        """Shape and dtype of every tensor in the files."""
        return self.layout.tensors | self.job.cache.specs(self.format)

    def layer(self, layer: QuantizedLayer) -> None:
        layer = self.format.normalize_for_format(layer)
        dtype = self.source.dtype
        self.expected[layer.name] = check.layer_digest(layer, self.format.casts_to_model_dtype, dtype)
        for name, tensor in self.format.pack(replace(layer, bias=None), model_dtype=dtype).items():
            self._add(name, tensor)
        if layer.bias is not None:
            self.tensors([f"{layer.name}.bias"], self.source)

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        for name in names:
            if name in self.layout.copies:
                self._copy(self.layout.copies[name])
                continue
            tensor = source.read_unquantized(name)
            if source.checks_finite:
                check_finite(name, tensor)
            self._add_dense(name, tensor)

    def spare(self) -> None:
        self._copy(self.layout.spare)

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        self._unquantized |= dict.fromkeys(names, reason)
        job = self.job.with_unquantized(self._unquantized)
        require_plan(self.format, job.export_plan(self.format))
        self._assembler.layout = plan_files(self.format, job.layers, self.source)

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        for name, scale in made.items():
            tail = self.format.cache_scale_tail or ()
            self._add_dense(name, scale.reshape(1) if scale.dim() == 0 else scale.reshape(-1, *tail))

    def mark(self) -> Mark:
        missing, open_tensors = self._assembler.state()
        late = {f"late.{name}": tensor for name, tensor in self.writer.take_late().items()}
        return {**super().mark()[0], "missing": missing}, late | open_tensors

    def _start(self) -> None:
        self.writer = ShardWriter(self.folder, self.shard, header=self._header)
        self._assembler = TensorAssembler(self.layout, self.source.model)

    def _restore(self, records: Records, marks: Sequence[Mark]) -> None:
        self._start()
        tensors = {name.removeprefix("late."): tensor for _, part in marks for name, tensor in part.items()}
        self.writer.restore(records, tensors)
        values, open_tensors = marks[-1]
        self._assembler.restore(values["missing"], open_tensors)

    def _copy(self, keys: Iterable[str]) -> None:
        """Copy checkpoint tensors unchanged, each once."""
        for key in (key for key in keys if key not in self.dense):
            tensor = self.source.read_stored(key)
            if self.source.checks_finite:
                check_finite(key, tensor)
            self.writer.add(key, tensor)
            self.dense[key] = check.dense_digest(tensor)

    def _add_dense(self, name: str, tensor: torch.Tensor) -> None:
        for stored, whole in self._add(name, tensor):
            self.dense[stored] = check.dense_digest(whole)

    def _add(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        complete = list(self._assembler.add(name, tensor))
        for stored, whole in complete:
            self.writer.add(stored, whole)
        return complete

    def write_beside(self, made: OutputContext) -> None:
        trusted = made.settings.trust_remote_code
        write_side_files(self.folder, self.source, made.tokenizer, trusted)
        write_config(self.folder, self.source, made.job, self.format, trusted)

    def verify(self, made: OutputContext) -> dict[str, Any]:
        verified = verify_folder(self.folder, self, made)
        trusted = made.settings.trust_remote_code
        compared = check.check_tokenizer(self.folder, self.source.folder, made.tokenizer, trusted)
        return {**verified, "tokenizer": compared}


def verify_folder(folder: Path, output: FolderWriter, made: OutputContext) -> dict[str, Any]:
    """Reopen a saved folder, and compare it with what `output` was given. Returns plain values for the report.

    Raises VerifyError when it cannot be opened, or its configuration, tensors, layers or the model's loss differ.
    """
    fmt, job, specs = output.format, made.job, output.specs()
    quantizes_inputs = any(plan.scheme.activations is not None for plan in job.quantized().values())
    wanted = made.finished.loss if fmt.stores_activation_scheme or not quantizes_inputs else None
    loss = None
    try:
        for name, planned in config_values(made.source, job, fmt, made.settings.trust_remote_code).items():
            check.compare_values(folder / name, planned, read_object(folder / name))
        files = TensorFiles.open(folder)
        found = {name: (stored.shape, stored.dtype) for name, stored in files.tensors.items()}
        check.compare_tensors(folder, specs, found)
        for name, digest in output.dense.items():
            if check.dense_digest(files.read(name)) != digest:
                raise check.mismatch_error(folder, f"tensor {name}")
        if fmt.loadable_here:
            loss = _reopen(folder, output, made, wanted)
        else:
            for name, digest in output.expected.items():
                plan = output.job.layers[name]
                shape = plan.in_features, plan.out_features
                names = fmt.tensor_specs(name, plan.scheme, *shape)
                tensors = read_model_tensors(files, names, output.layout)
                layer = fmt.unpack_layer(name, plan.scheme, tensors, *shape)
                if check.layer_digest(layer, False, torch.float32) != digest:
                    raise check.mismatch_error(folder, f"layer {name}")
    except (ModelError, ConfigError, NumericsError, UnsupportedError) as error:
        raise VerifyError(f"{folder} was written but does not open: {error}") from error
    return {
        "passed": True, "tensors": len(specs), "layers": len(output.expected), "loss_in_memory": wanted,
        "loss_reopened": loss,
    }  # fmt: skip


def _reopen(folder: Path, output: FolderWriter, made: OutputContext, wanted: float | None) -> float | None:
    """Open the folder as Transformers does, and compare its layers and its loss on the smoke sample with the `wanted`
    one. Returns it, or None when no forward pass is compared."""
    quantized, trusted = (folder / "quantization_config.json").exists(), made.settings.trust_remote_code
    source = CheckpointSource(folder, prepare=convert_hf_model if quantized else None, trust_remote_code=trusted)
    source.checks_finite, source.bounded = made.source.checks_finite, made.source.bounded
    modules = {name: name for name in output.expected}
    if quantized:
        usual = default_expert_names(source.model)  # experts may have the names of the files
        packed = (name for name, module in source.model.named_modules() if isinstance(module, PackedLinear))
        modules = {usual.get(name, name): name for name in packed}
    check.compare_names(folder, "quantized layers", output.expected, modules)
    loss = _check_blocks(folder, source, output, made, modules, wanted is not None)
    if loss is not None and wanted is not None:
        dtype = made.finished.state.dtype
        coarsest = source.dtype if output.format.casts_to_model_dtype else dtype
        allowed = _TOLERANCE.get(coarsest, _TOLERANCE_HALF) * (1 + abs(wanted))
        if not abs(loss - wanted) <= allowed:
            raise VerifyError(
                f"{folder}: the saved model's loss on the smoke sample is {loss:.5f}, the tuned model's was "
                f"{wanted:.5f}; do not use these files, and report this with report.json"
            )
    return loss


@torch.no_grad()
def _check_blocks(
    folder: Path, source: CheckpointSource, output: FolderWriter, made: OutputContext, modules: Mapping[str, str],
    runs: bool,
) -> float | None:  # fmt: skip
    """Load block by block, compare each quantized layer, and with `runs` run the smoke sample. `modules`: module name
    by the layer's name in the run."""
    device, dtype, samples = made.settings.device, made.finished.state.dtype, made.finished.smoke_sample
    alone, stream = made.job.memory_plan.streams_experts, None
    if samples is not None and runs:
        captured = capture_inputs(source, samples, device, stream_experts=alone)
        stream = Stream(captured, captured.hidden, 1)
    outside = dict(output.expected)
    for index, name in enumerate(source.blocks):
        block = block_loader(source, name, device, dtype, alone)
        module = block.load()
        for layer in [layer for layer in outside if layer.startswith(f"{name}.")]:
            with block.layer_loaded(modules[layer]) as loaded:
                _compare_layer(folder, layer, loaded, outside.pop(layer))
        if stream is not None:
            with in_dtype(module, source.dtype, dtype), block.running():
                stream.hidden = stream.after(index, module, device, dtype)
        block.release()
        trim_heap()
    head = next(reversed(outside), None)
    for layer, digest in outside.items():
        source.load(layer, device)
        _compare_layer(folder, layer, source.model.get_submodule(layer), digest)
        if layer != head:  # which the smoke sample needs
            source.release(layer)
    if stream is None or samples is None:
        return None
    hidden = stream.hidden.to(device)
    if head is None:
        logits = stream.captured.run_head(source, hidden, [0])
    else:
        with non_block_loaded(source, device):
            before = stream.captured.run_head(source, hidden, [0], stop_at=head)
        logits = source.model.get_submodule(head)(before)
    return mean_loss(logits, samples[0]["input_ids"].reshape(1, -1).to(logits.device))


def _compare_layer(folder: Path, name: str, module: torch.nn.Module, wanted: str) -> None:
    if isinstance(module, PackedLinear):
        found = check.layer_digest(module.layer(name), False, torch.float32)
    else:
        found = check.dense_digest(weight_2d(module))
    if found != wanted:
        raise check.mismatch_error(folder, f"layer {name}")
