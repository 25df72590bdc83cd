"""From weights that are written to a folder that is shown: the files beside them, the check, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from auto_round.compressors.blockwise import Walk
from auto_round.compressors.file_layout import FileLayout
from auto_round.compressors.finish import config_values, write_config, write_records, write_side_files
from auto_round.compressors.job import Job
from auto_round.compressors.planning import with_cache_scales
from auto_round.compressors.resume.run_journal import RunJournal
from auto_round.compressors.settings import Settings
from auto_round.compressors.sinks import FolderSink
from auto_round.compressors.streamed_experts import streams_experts
from auto_round.compressors.tensor_joiner import read_pieces
from auto_round.compressors.tokenizer_check import check_tokenizer
from auto_round.compressors.verify import Expected, verify_folder
from auto_round.errors import VerifyError
from auto_round.export.formats import OutputFormat
from auto_round.export.staging import Staging
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource
from auto_round.modeling.tensor_files import TensorFiles
from auto_round.quantized_layer import QuantizedLayer

if TYPE_CHECKING:
    from auto_round.compressors.gguf_sink import GgufSink


@dataclass
class Finished:
    """What a walk left behind: layers kept in memory (if any), the records, and the probe's loss."""

    walk: Walk
    outside: list[QuantizedLayer]
    loss: float | None
    probe: list[dict[str, torch.Tensor]] | None
    data: str | None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Delivery:
    """What the folders of one walk have in common."""

    source: ModelSource
    settings: Settings
    tokenizer: Any
    job: Job
    finished: Finished
    made_from: Mapping[str, str] | None = None


def deliver(
    made: Delivery, sink: FolderSink | GgufSink, stage: Staging, journal: RunJournal | None, stale: Iterable[str] = ()
) -> None:
    """Complete one folder, check it, and only then show it, in the place of the `stale` files of an earlier run.

    Raises VerifyError when it is not what was meant; what was written is kept for a look.
    """
    try:
        verified = _complete_folder(made, sink) if isinstance(sink, FolderSink) else _complete_file(made, sink)
        finished = made.finished
        write_records(
            sink.folder, made.job, made.settings, sink.format, finished.walk.records, finished.seconds, sink.digests(),
            verified, finished.data, finished.walk.unreached, finished.walk.numbers,
            made.made_from,
        )  # fmt: skip
    except VerifyError:
        stage.keep = True
        raise
    files = stage.seal(sink.digests())
    if journal is not None:
        journal.complete(sink.format.name, files)
    stage.publish(files, stale)
    logger.info("saved %s", stage.folder)


def _complete_folder(made: Delivery, sink: FolderSink) -> Mapping[str, Any] | None:
    """The files beside the weights, and the check, if it is wanted."""
    folder, fmt, source, settings = sink.folder, sink.format, made.source, made.settings
    job, finished = made.job, made.finished
    write_side_files(folder, source, made.tokenizer, settings.trust_remote_code)
    write_config(folder, source, job, fmt, settings.trust_remote_code)
    if not settings.verify:
        return None
    started = time.monotonic()
    expected = Expected(
        with_cache_scales(sink.layout.tensors, fmt, job.cache), sink.expected, sink.dense, finished.probe,
        finished.loss if fmt.holds_activations or not finished.walk.activations else None,
        settings.device, finished.walk.dtype, settings.trust_remote_code,
        None if fmt.loads_here else _reader(job, fmt, sink.layout), fmt.rounds_weights, source.checks_finite,
        config_values(source, job, fmt, settings.trust_remote_code), streams_experts(job), source.bounded,
    )  # fmt: skip
    verified = verify_folder(folder, expected)
    origin = getattr(source, "folder", None)
    verified["tokenizer"] = check_tokenizer(folder, origin, made.tokenizer, settings.trust_remote_code)
    finished.seconds["verify"] = time.monotonic() - started
    loss = "" if verified["loss_reopened"] is None else f", probe loss {verified['loss_reopened']:.4f}"
    tensors, layers = len(expected.tensors), len(expected.digests)
    logger.info("verified %s: %d tensors, %d layers%s", folder.parent, tensors, layers, loss)
    return verified


def _complete_file(made: Delivery, sink: GgufSink) -> Mapping[str, Any] | None:
    """The check of one GGUF file, which holds its tokenizer itself."""
    if not made.settings.verify:
        return None
    from auto_round.compressors.gguf_verify import verify_file

    started = time.monotonic()
    verified = verify_file(sink, made.job, made.source)
    made.finished.seconds["verify"] = time.monotonic() - started
    logger.info("verified %s: %d tensors, %d layers", sink.path.name, verified["tensors"], verified["layers"])
    return verified


def _reader(job: Job, fmt: OutputFormat, layout: FileLayout) -> Callable[[str, TensorFiles], QuantizedLayer]:
    def read(name: str, files: TensorFiles) -> QuantizedLayer:
        plan = job.layers[name]
        specs = fmt.tensor_specs(name, plan.scheme, plan.in_features, plan.out_features)
        tensors = read_pieces(files, specs, layout)
        return fmt.read_layer(name, plan.scheme, tensors, plan.in_features, plan.out_features)

    return read
