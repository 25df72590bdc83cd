"""One run from settings and a source to a model in memory or to folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.quantization.block_task import BlockQuantizer
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.calib_dataset import CalibrationData, prepare_calibration
from auto_round.calibration.inputs import CapturedInputs, capture_inputs
from auto_round.calibration.spill import Spill
from auto_round.compressors.activations import attach
from auto_round.compressors.assemble import assemble_model
from auto_round.compressors.blockwise import Walk, walk_blocks
from auto_round.compressors.dense_experts import FusedTarget, read_pieces
from auto_round.compressors.finish import write_config, write_records, write_side_files
from auto_round.compressors.format_runs import folder_name
from auto_round.compressors.gguf_job import gguf_format
from auto_round.compressors.importance_files import given_importance, save_importance
from auto_round.compressors.job import Job
from auto_round.compressors.outside import emit_outside, probe_loss, quantize_outside
from auto_round.compressors.place import check_work_space
from auto_round.compressors.planning import compute_dtype, expert_joiner, header_bytes, make_job, planned_tensors
from auto_round.compressors.probe import probe_samples
from auto_round.compressors.settings import Settings
from auto_round.compressors.sinks import FolderSink, MemorySink, Sink
from auto_round.compressors.streamed_experts import streams_experts
from auto_round.compressors.verify import Expected, verify_folder
from auto_round.envs import work_space
from auto_round.errors import UnsupportedError
from auto_round.export.disk import check_disk, ensure_output_folder
from auto_round.export.formats import OutputFormat, get_format
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource
from auto_round.modeling.tensor_files import TensorFiles
from auto_round.quantized_layer import QuantizedLayer
from auto_round.report.memory import return_freed
from auto_round.report.progress import Progress, make_progress

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


class Run:
    """A source with settings. `tokenizer` may be None when no text has to be read."""

    def __init__(self, source: ModelSource, settings: Settings, tokenizer: Any) -> None:
        self.source, self.settings, self.tokenizer = source, settings, tokenizer

    def plan(
        self, formats: Sequence[OutputFormat], output_dir: str | None = None, fit: bool = True, kept: bool = False
    ) -> Job:
        """The job, without doing it. `fit`, `kept`: see `make_job`."""
        return make_job(self.settings, self.source, formats, output_dir, fit, self.tokenizer, kept)

    def memory_plan(self) -> Job:
        """The job of a model that is kept in memory. Layers that no packing takes stay as they are, so that it can be
        saved in any format later; a scheme that no packing takes at all leaves that to format fake."""
        name = self.settings.scheme_name.lower()
        try:
            return self.plan([get_format(name if name.startswith("gguf:") else "auto_round")], kept=True)
        except UnsupportedError:
            return self.plan([], kept=True)

    def to_memory(self) -> tuple[torch.nn.Module, dict[str, QuantizedLayer], Finished]:
        """Quantize and keep the layers: (model, layers by name, records)."""
        job = self.memory_plan()
        sink = MemorySink()
        finished = self._walk(job, [sink])
        return assemble_model(self.source, sink.layers), sink.layers, finished

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str
    ) -> list[Path]:
        """Quantize, writing every format as blocks finish. Returns the folders, one a format."""
        job, folders = self._prepare(output_dir, formats, overwrite)
        sinks = [self._sink(job, f, folder, shard) for f, folder in zip(formats, folders, strict=True)]
        with ExitStack() as stack:
            for sink in sinks:
                stack.enter_context(sink.writer)
            finished = self._walk(job, sinks)
        for sink in sinks:
            self._complete(job, sink, finished)
        return folders

    def _sink(self, job: Job, fmt: OutputFormat, folder: Path, shard: int | str) -> FolderSink | GgufSink:
        if job.gguf is not None and fmt is gguf_format([fmt]):
            from auto_round.compressors.gguf_sink import make_sink

            return make_sink(job, fmt, folder, self.source, self.settings)
        experts = expert_joiner(fmt, dict(job.layers), self.source)
        specs = planned_tensors(fmt, dict(job.layers), self.source, job.cache)
        return FolderSink(fmt, folder, self.source.dtype, shard, experts, header_bytes(specs))

    def save(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        layers: Mapping[str, QuantizedLayer], finished: Finished,
    ) -> list[Path]:  # fmt: skip
        """Write layers that are in memory already."""
        job, folders = self._prepare(output_dir, formats, overwrite, layers)
        for fmt, folder in zip(formats, folders, strict=True):
            sink = self._sink(job, fmt, folder, shard)
            with sink.writer:
                self._emit_saved(job, sink, layers, finished.walk.cache_scales)
            self._complete(job, sink, finished)
        return folders

    def _emit_saved(
        self,
        job: Job,
        sink: FolderSink | GgufSink,
        layers: Mapping[str, QuantizedLayer],
        scales: Mapping[str, torch.Tensor],
    ) -> None:
        tied = self.source.tied()
        for block in self.source.blocks:
            names = [n for n in self.source.tensor_names() if n.startswith(f"{block}.")]
            inside = [v for k, v in layers.items() if k.startswith(f"{block}.")]
            replaced = {f"{layer.name}.{leaf}" for layer in inside for leaf in ("weight", "bias")}
            for layer in inside:
                sink.layer(layer)
            sink.tensors([n for n in names if n not in replaced and n not in tied], self.source)
            sink.scales({key: scale for key, scale in scales.items() if key.startswith(f"{block}.")})
        blocks = tuple(f"{b}." for b in self.source.blocks)
        emit_outside(job, self.source, [v for k, v in layers.items() if not k.startswith(blocks)], [sink])

    def _prepare(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool,
        done: Mapping[str, QuantizedLayer] | None = None,
    ) -> tuple[Job, list[Path]]:  # fmt: skip
        """Everything that can be refused before work begins. `done`: the layers that are quantized already."""
        job = self.plan(formats, output_dir, fit=done is None)
        if done is not None:
            job = _as_done(job, self.memory_plan(), done)
        needed = sum(job.bytes_on_disk.values())
        check_disk(output_dir, int(needed * 1.02) + (1 << 20))
        if job.memory_plan is not None and job.memory_plan.spilled:
            check_work_space(job.memory_plan.spilled)
        root = ensure_output_folder(output_dir, overwrite)
        if len(formats) == 1:
            return job, [root]
        return job, [ensure_output_folder(root / folder_name(fmt), overwrite) for fmt in formats]

    def _quantizer(self) -> BlockQuantizer:
        settings = self.settings
        if isinstance(settings.algorithm, SignRoundConfig):
            return SignRoundQuantizer(
                settings.algorithm, settings.scale_dtype, settings.optimized_start, settings.enable_torch_compile
            )
        return RTNQuantizer(settings.algorithm, settings.scale_dtype)

    def _walk(self, job: Job, sinks: Sequence[Sink]) -> Finished:
        settings, source = self.settings, self.source
        started = time.monotonic()
        for note in job.notes:
            logger.warning("%s", note)
        kept_in = "ram" if job.memory_plan is None else job.memory_plan.streams
        store = settings.device if kept_in == "device" else torch.device("cpu")
        progress = make_progress(f"{settings.algorithm_name} {job.scheme_name}")
        stack = ExitStack()
        try:
            spill = stack.enter_context(Spill(work_space())) if kept_in == "file" else None
            importance = None if settings.imatrix is None else given_importance(settings.imatrix, job, source)
            progress.message("reading calibration data" if settings.needs_data else "capturing the probe")
            data = self._data()
            calibration = self._capture(data.samples, store, job, spill) if data is not None else None
            probe_ids = self._probe() if settings.verify else None
            probe = self._capture(probe_ids, store, job) if probe_ids is not None else None
            captured = time.monotonic()
            batch = settings.algorithm.batch_size if isinstance(settings.algorithm, SignRoundConfig) else 8
            walk = Walk(
                self._quantizer(), sinks, settings.device, compute_dtype(settings, source), settings.seed, calibration,
                probe, batch, getattr(settings.algorithm, "enable_quanted_input", True), job.cache,
                importance, settings.save_imatrix is not None,
            )  # fmt: skip
            with _deterministic(settings.deterministic):
                walk_blocks(job, source, walk, progress)
                outside = self._finish_outside(job, walk, sinks, progress)
                loss = probe_loss(source, walk, outside)
                if not source.lazy:
                    attach(source.model, walk.activations)
            if settings.save_imatrix is not None:
                save_importance(settings.save_imatrix, job, source, walk.sums, walk.tokens, settings.seqlen)
            if walk.unreached:
                logger.warning(
                    "no calibration token reached %d expert layers, such as %s: they are rounded by their weights "
                    "alone and listed in report.json; more samples (nsamples, seqlen) reach more of them",
                    len(walk.unreached), walk.unreached[0],
                )  # fmt: skip
            walk.calibration = walk.last_inputs = walk.last_full = None  # saving and checking have no use for them
            return_freed()
        finally:
            progress.finish()
            stack.close()
        done = time.monotonic()
        seconds = {"calibration": captured - started, "quantization": done - captured}
        described = None if data is None else ", ".join(f"{n} ({c} samples)" for n, c in data.sources)
        return Finished(walk, outside, loss, probe_ids, described, seconds)

    def _finish_outside(self, job: Job, walk: Walk, sinks: Sequence[Sink], progress: Progress) -> list[QuantizedLayer]:
        progress.message("what is outside the blocks")
        optimized = self.settings.needs_data and self.settings.optimized_start
        algorithm = self.settings.algorithm
        steps = algorithm.iters if isinstance(algorithm, SignRoundConfig) else 0
        outside = quantize_outside(job, self.source, walk, optimized, self.settings.scale_dtype, steps)
        emit_outside(job, self.source, outside, sinks)
        return outside

    def _data(self) -> CalibrationData | None:
        if not self.settings.needs_data:
            return None
        config = _text_config(self.source.config)
        data = prepare_calibration(
            self.settings.dataset, self.tokenizer, seqlen=self.settings.seqlen, nsamples=self.settings.nsamples,
            seed=self.settings.seed, model_max_length=getattr(config, "max_position_embeddings", None),
            vocab_size=_vocab_size(self.source), platform=self.settings.platform,
        )  # fmt: skip
        shown = ", ".join(f"{name} ({count})" for name, count in data.sources)
        logger.info("calibration: %d samples of %d tokens from %s", len(data.samples), data.seqlen, shown)
        return data

    def _probe(self) -> list[dict[str, torch.Tensor]]:
        most = getattr(_text_config(self.source.config), "max_position_embeddings", None)
        return probe_samples(self.tokenizer, _vocab_size(self.source) or 2, most)

    def _capture(
        self, samples: list[dict[str, torch.Tensor]], store: torch.device, job: Job, spill: Spill | None = None
    ) -> CapturedInputs:
        dtype = compute_dtype(self.settings, self.source)
        return capture_inputs(self.source, samples, self.settings.device, store, dtype, spill, streams_experts(job))

    def _complete(self, job: Job, sink: FolderSink | GgufSink, finished: Finished) -> None:
        """The files beside the weights, and the check."""
        if not isinstance(sink, FolderSink):
            self._complete_file(job, sink, finished)
            return
        folder, fmt, source, settings = sink.folder, sink.format, self.source, self.settings
        write_side_files(folder, source, self.tokenizer, settings.trust_remote_code)
        write_config(folder, source, job, fmt)
        verified = None
        if settings.verify:
            started = time.monotonic()
            expected = Expected(
                planned_tensors(fmt, dict(job.layers), source, job.cache), sink.expected, sink.dense, finished.probe,
                finished.loss if fmt.holds_activations or not finished.walk.activations else None,
                settings.device, finished.walk.dtype, settings.trust_remote_code,
                None if fmt.loads_here else _reader(job, fmt, sink.experts.targets), fmt.rounds_weights,
                streams_experts(job),
            )  # fmt: skip
            verified = verify_folder(folder, expected)
            finished.seconds["verify"] = time.monotonic() - started
            loss = "" if verified["loss_reopened"] is None else f", probe loss {verified['loss_reopened']:.4f}"
            logger.info(
                "verified %s: %d tensors, %d layers%s", folder, len(expected.tensors), len(expected.digests), loss
            )
        self._record(job, sink, finished, verified)
        logger.info("saved %s", folder)

    def _complete_file(self, job: Job, sink: GgufSink, finished: Finished) -> None:
        """The same for one GGUF file, which holds its tokenizer itself."""
        verified = None
        if self.settings.verify:
            from auto_round.compressors.gguf_verify import verify_file

            started = time.monotonic()
            verified = verify_file(sink, job, self.source)
            finished.seconds["verify"] = time.monotonic() - started
            logger.info("verified %s: %d tensors, %d layers", sink.path, verified["tensors"], verified["layers"])
        self._record(job, sink, finished, verified)
        logger.info("saved %s", sink.path)

    def _record(
        self, job: Job, sink: FolderSink | GgufSink, finished: Finished, verified: Mapping[str, Any] | None
    ) -> None:
        write_records(
            sink.folder, job, self.settings, sink.format, finished.walk.records, finished.seconds, sink.digests(),
            verified, finished.data, finished.walk.unreached,
        )  # fmt: skip


def _reader(
    job: Job, fmt: OutputFormat, targets: Mapping[str, FusedTarget]
) -> Callable[[str, TensorFiles], QuantizedLayer]:
    def read(name: str, files: TensorFiles) -> QuantizedLayer:
        plan = job.layers[name]
        specs = fmt.tensor_specs(name, plan.scheme, plan.in_features, plan.out_features)
        tensors = read_pieces(files, specs, targets)
        return fmt.read_layer(name, plan.scheme, tensors, plan.in_features, plan.out_features)

    return read


def _as_done(job: Job, memory: Job, done: Mapping[str, QuantizedLayer]) -> Job:
    """`job` for layers that are quantized already. Raises UnsupportedError when its formats cannot hold one of them."""
    refused = sorted(set(done) - set(job.quantized()))
    if refused:
        raise UnsupportedError(
            f"{', '.join(job.formats)} cannot hold {len(refused)} of the quantized layers, such as {refused[0]}: "
            f"{job.layers[refused[0]].reason}; use quantize_and_save, which leaves them in full precision, or format "
            "fake"
        )
    other = [name for name, layer in done.items() if layer.blocks is not None and job.layers[name].ggml != layer.kind]
    if other:
        raise UnsupportedError(
            f"{', '.join(job.formats)} stores {other[0]} as {job.layers[other[0]].ggml}, and it is quantized as "
            f"{done[other[0]].kind}; use quantize_and_save, or the format of the scheme that was used"
        )
    left = {name: memory.layers[name] for name in job.quantized() if name not in done}
    return replace(job, layers={**job.layers, **left})


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _vocab_size(source: ModelSource) -> int | None:
    size = getattr(_text_config(source.config), "vocab_size", None)
    return int(size) if size else None


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms for as long as this is open, and the caller's choice again afterwards."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
