"""Finish an output folder: config, tokenizer, model card and report; verify it, then publish it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from auto_round import envs
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import VerifyError
from auto_round.files import file_sha256, write_json, write_text
from auto_round.formats.base import OutputFormat
from auto_round.logger import logger
from auto_round.modeling.config import causal_class, source_config, untied, with_both_rope_spellings, with_dtype
from auto_round.modeling.files.folder import copy_side_files
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.source import ModelSource
from auto_round.output.staging import LOCK, sync_and_hash
from auto_round.output.verify import check_tokenizer
from auto_round.report.memory import peak_rss_bytes, peak_vram_bytes
from auto_round.report.model_card import ModelCard, display_name, write_model_card
from auto_round.report.run_report import FILE_NAME as REPORT
from auto_round.report.run_report import BlockRecord, LayerRecord, RunReport, plain, redact_paths, write_report
from auto_round.run.blocks import RunState
from auto_round.run.file_layout import FileLayout, read_model_tensors
from auto_round.run.journal import Journal
from auto_round.run.numerics import NumericsPolicy
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.recipe_file import write_recipe
from auto_round.run.reopen import Expected, verify_folder
from auto_round.run.settings import Settings
from auto_round.run.writers import FileOutput, FolderWriter


@dataclass
class RunResult:
    """Results of a run besides its layers: final state, and the loss on the smoke sample."""

    state: RunState
    loss: float | None
    smoke_sample: list[dict[str, torch.Tensor]] | None
    data: str | None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputContext:
    """Inputs that all output folders of a run have in common."""

    source: ModelSource
    settings: Settings
    tokenizer: Any
    job: Job
    finished: RunResult
    made_from: Mapping[str, str] | None = None
    shard: int | str = "5GB"


def finalize(made: OutputContext, output: FileOutput, journal: Journal, stale: Iterable[str] = ()) -> None:
    """Complete one folder, verify it, and publish it in place of the `stale` files of an earlier run.

    Raises VerifyError when the files differ from the quantized model; they then remain in the staging folder.
    """
    stage, digests = output.stage, output.writer.sha256
    try:
        verified = _complete_folder(made, output) if isinstance(output, FolderWriter) else _complete_file(made, output)
        finished, state = made.finished, made.finished.state
        write_recipe(output.folder, made.settings, made.job, made.shard)
        write_records(
            output.folder, made.job, made.settings, output.format, state.records, finished.seconds, digests,
            verified, finished.data, state.nearest | dict.fromkeys(state.unreached, _UNREACHED),
            state.numerics, made.made_from,
        )  # fmt: skip
    except VerifyError:
        stage.retain = True
        raise
    files = sync_and_hash(stage.path, digests)
    journal.complete(output.format.name, files)
    stage.publish(files, stale)
    logger.info("saved %s", stage.folder)


def _complete_folder(made: OutputContext, output: FolderWriter) -> Mapping[str, Any] | None:
    """Write the files beside the weights, and verify the folder if the settings ask for it."""
    folder, fmt, source, settings = output.folder, output.format, made.source, made.settings
    job, finished = made.job, made.finished
    write_side_files(folder, source, made.tokenizer, settings.trust_remote_code)
    write_config(folder, source, job, fmt, settings.trust_remote_code)
    if not settings.verify:
        return None
    started = time.monotonic()
    quantizes_inputs = any(plan.scheme.activations is not None for plan in job.quantized().values())
    expected = Expected(
        output.layout.tensors | job.cache.specs(fmt), output.expected, output.dense, finished.smoke_sample,
        finished.loss if fmt.stores_activation_scheme or not quantizes_inputs else None,
        settings.device, finished.state.dtype, settings.trust_remote_code,
        None if fmt.loadable_here else _reader(job, fmt, output.layout), fmt.casts_to_model_dtype, source.checks_finite,
        config_values(source, job, fmt, settings.trust_remote_code), job.memory_plan.streams_experts, source.bounded,
    )  # fmt: skip
    verified = verify_folder(folder, expected)
    origin = source.folder
    verified["tokenizer"] = check_tokenizer(folder, origin, made.tokenizer, settings.trust_remote_code)
    finished.seconds["verify"] = time.monotonic() - started
    loss = "" if verified["loss_reopened"] is None else f", smoke loss {verified['loss_reopened']:.4f}"
    tensors, layers = len(expected.tensors), len(expected.digests)
    logger.info("verified %s: %d tensors, %d layers%s", folder.parent, tensors, layers, loss)
    return verified


def _complete_file(made: OutputContext, output: FileOutput) -> Mapping[str, Any] | None:
    """Verify a GGUF file, which contains its tokenizer."""
    if not made.settings.verify:
        return None
    from auto_round.run.gguf_output import GgufFileWriter, verify_file

    assert isinstance(output, GgufFileWriter)

    started = time.monotonic()
    verified = verify_file(output, made.job, made.source)
    made.finished.seconds["verify"] = time.monotonic() - started
    logger.info("verified %s: %d tensors, %d layers", output.path.name, verified["tensors"], verified["layers"])
    return verified


def _reader(job: Job, fmt: OutputFormat, layout: FileLayout) -> Callable[[str, TensorFiles], QuantizedLayer]:
    """A function that reads one layer from the files of a format that this package does not load."""

    def read(name: str, files: TensorFiles) -> QuantizedLayer:
        plan = job.layers[name]
        specs = fmt.tensor_specs(name, plan.scheme, plan.in_features, plan.out_features)
        tensors = read_model_tensors(files, specs, layout)
        return fmt.unpack_layer(name, plan.scheme, tensors, plan.in_features, plan.out_features)

    return read


def write_config(folder: Path, source: ModelSource, job: Job, fmt: OutputFormat, trusted: bool) -> None:
    """Write the files of `config_values`; config.json keeps the key order of the source."""
    for name, values in config_values(source, job, fmt, trusted).items():
        if name == "config.json":
            write_text(folder / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        else:
            write_json(folder / name, values)


def config_values(source: ModelSource, job: Job, fmt: OutputFormat, trusted: bool) -> dict[str, Any]:
    """By file name: the source's config.json with the format's quantization_config, and the latter alone in each of the
    format's `config_files`. `trusted`: trust_remote_code, so that Python files are copied."""
    values = source_config(source.config, source.folder, trusted)
    values = with_both_rope_spellings(with_dtype(values, str(source.dtype).removeprefix("torch.")))
    if values.get("architectures") is None:
        own = type(source.model).__name__ if source.can_run else None
        name = own or causal_class(values)
        values |= {} if name is None else {"architectures": [name]}
    if any(not name.startswith(tuple(f"{b}." for b in job.blocks)) for name in job.quantized()):
        values = untied(values)
    plan = job.export_plan(fmt)
    quantization = fmt.file_config(plan)
    found: dict[str, Any] = {} if quantization is None else dict.fromkeys(fmt.config_files, quantization)
    return {**found, "config.json": fmt.model_config(values, plan)}


def write_side_files(folder: Path, source: ModelSource, tokenizer: Any, trust_remote_code: bool) -> None:
    """Copy tokenizer and other small files from the source folder, or save them from the objects."""
    origin = source.folder
    if origin is not None:
        copy_side_files(origin, folder, trust_remote_code)
    if tokenizer is not None and not (folder / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(folder)
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        write_text(folder / "generation_config.json", generation.to_json_string())


_UNREACHED = "no calibration token reached it: rounded by its weights alone"


def layer_records(
    job: Job, fmt: OutputFormat, reasons: Mapping[str, str] | None = None,
    numerics_policy: NumericsPolicy | None = None,
) -> tuple[LayerRecord, ...]:  # fmt: skip
    """Records of every linear layer of the job and every other matrix in its blocks, for the report.

    `reasons`: by layer, why it was rounded in another way than asked for.
    """
    rounded = {} if numerics_policy is None else numerics_policy.rounded
    records = []
    for name, plan in job.layers.items():
        bits = stored_bits(plan, fmt) if plan.scheme.quantizes_weights else None
        reason = (reasons or {}).get(name, plan.reason)
        if name in rounded:
            reason = f"rounded by its weights alone: {rounded[name]}"
        records.append(LayerRecord(name, plan.description, bits, reason))
    full = job.scheme.with_overrides({"bits": 16, "act_bits": 16}).describe()
    records += [LayerRecord(name.removesuffix(".weight"), full, None, reason) for name, reason in job.skipped.items()]
    return tuple(records)


def stored_bits(plan: LayerPlan, fmt: OutputFormat) -> float:
    """Bits per weight of a quantized layer in the format's files, scales and zero points included.

    Format `fake` stores dense weights; the value is that of packed codes with float16 scales.
    """
    scheme = plan.scheme
    if fmt.name == "fake":
        size = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else plan.in_features
        return float(scheme.bits + (16 + scheme.bits) / size)
    specs = fmt.tensor_specs(plan.name, scheme, plan.in_features, plan.out_features)
    stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    return stored * 8 / (plan.out_features * plan.in_features)


def bits_per_weight(job: Job, fmt: OutputFormat) -> float | None:
    """Average over the quantized layers, scales and zero points included."""
    total = count = 0.0
    for plan in job.quantized().values():
        weights = plan.out_features * plan.in_features
        total += weights * stored_bits(plan, fmt)
        count += weights
    return total / count if count else None


def write_records(
    folder: Path, job: Job, settings: Settings, fmt: OutputFormat, blocks: Sequence[BlockRecord],
    seconds: Mapping[str, float], files: Mapping[str, str], verify: Mapping[str, Any] | None, data: str | None,
    reasons: Mapping[str, str] | None = None, numerics_policy: NumericsPolicy | None = None,
    made_from: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write README.md and report.json, without any path of this machine."""
    given = settings.dataset if isinstance(settings.dataset, str) else ""
    known = [job.model, job.output_dir or "", str(folder), str(envs.work_space()), *re.split("[,:=]", given)]
    clean = partial(redact_paths, known=[path for path in known if path])
    model, data = display_name(job.model), clean(data)
    sizes = {name: (folder / name).stat().st_size for name in files}
    exceptions = {n: p.description for n, p in job.layers.items() if p.scheme != job.scheme}
    shown = {k: v for k, v in job.settings.items() if v is not None and k != "dataset"}
    if job.stored_as:
        shown = {"weights of the source": job.stored_as, **shown}
    card = ModelCard(
        base_model=model, scheme=f"{job.scheme_name} ({job.scheme.describe()})", format=fmt.name,
        bits_per_weight=bits_per_weight(job, fmt) if fmt.name != "fake" else None, size_bytes=sum(sizes.values()),
        settings=clean(plain(shown)), data=data, exceptions=exceptions, files=files,
    )  # fmt: skip
    write_model_card(folder, card)
    others = {*files, LOCK, REPORT, "README.md"}  # the last two are rewritten when the model is evaluated
    small = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    small = {name: path for name, path in small.items() if name not in others and not name.startswith(".")}
    report = RunReport(
        model=model, format=fmt.name, job=clean(plain(job.to_dict())) | {"model": model, "data": data},
        layers=tuple(replace(r, reason=clean(r.reason)) for r in layer_records(job, fmt, reasons, numerics_policy)),
        blocks=tuple(blocks), seconds=seconds, peak_rss_bytes=peak_rss_bytes(), peak_vram_bytes=peak_vram_bytes(),
        files=files, small_files={name: file_sha256(path) for name, path in small.items()}, sizes=sizes,
        verify=clean(verify), numerics=None if numerics_policy is None else clean(plain(numerics_policy.to_dict())),
        made_from=made_from,
    )  # fmt: skip
    write_report(folder, report)
