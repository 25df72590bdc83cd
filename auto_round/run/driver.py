"""Driver of a regular run: from settings and a model to quantized layers in memory or output folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from auto_round.algorithms.base import BlockQuantizer
from auto_round.algorithms.gptq import GPTQQuantizer
from auto_round.algorithms.quantization.rtn.config import RegisteredConfig
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.algorithms.transforms.base import TRANSFORMS
from auto_round.calib_dataset import CalibrationData, prepare_calibration
from auto_round.calibration.capture import CapturedInputs, capture_inputs
from auto_round.calibration.disk_store import DiskStore
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.envs import work_space
from auto_round.errors import ModelError, OutputError, UnsupportedError
from auto_round.formats.base import OutputFormat, get_format
from auto_round.formats.no_config import GgufFormat
from auto_round.logger import logger
from auto_round.modeling.config import largest, smallest
from auto_round.modeling.files.folder import side_files
from auto_round.modeling.source import ModelSource
from auto_round.output import folders as disk
from auto_round.output.staging import Staging
from auto_round.report.memory import HeapTrimmer, format_bytes, trim_heap
from auto_round.report.progress import Progress, make_progress
from auto_round.run import fingerprint as prints
from auto_round.run import folders as targets
from auto_round.run.blocks import RunState, quantize_blocks, write_unit
from auto_round.run.finalize import finalize
from auto_round.run.folder_output import FolderWriter
from auto_round.run.gguf import GgufFileWriter, given_importance, save_importance
from auto_round.run.head import finish_non_block, smoke_samples
from auto_round.run.journal import Journal, NoJournal, interrupted_settings
from auto_round.run.numerics import NumericsPolicy, damaged_tensors, deterministic_algorithms
from auto_round.run.plan import Job
from auto_round.run.planner import compute_dtype, make_job
from auto_round.run.results import ModelWriter, assemble_model
from auto_round.run.settings import Settings
from auto_round.run.streams import Stream
from auto_round.run.writers import FileOutput, MemoryWriter, OutputContext, OutputWriter, RunResult

_MIN_FREED_BYTES = 16 << 20  # freed memory that is worth returning to the system when experts are streamed
_WRITERS: Mapping[type[OutputFormat], type[FileOutput]] = {GgufFormat: GgufFileWriter}  # of others: FolderWriter


class InMemory(NamedTuple):
    """The result of a run without output folders: a runnable model, its quantized layers, and what `run` can save.
    `writers`: what gave a model object its weights; none for a checkpoint."""

    model: torch.nn.Module
    layers: dict[str, QuantizedLayer]
    job: Job
    finished: RunResult
    run: Run
    writers: Sequence[ModelWriter] = ()


@dataclass
class Samples:
    """What a run captured before its first block; None for what it does not need."""

    smoke_ids: list[dict[str, torch.Tensor]] | None = None
    smoke: CapturedInputs | None = None
    data: CalibrationData | None = None
    calibration: CapturedInputs | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Digests of everything that changes the result and is known only after the data is read."""
        data, smoke, captured = self.data, self.smoke_ids, self.calibration
        return {
            "calibration data": None if data is None else prints.samples_digest(data.samples),
            "smoke_sample": None if smoke is None else prints.samples_digest(smoke),
            "inputs of the first block": None if captured is None else prints.tensors_checksum([captured.hidden]),
        }


class Run:
    """One run: a source model with settings. `tokenizer` may be None when no text has to be read. `outputs` receive the
    results too, after files are written."""

    def __init__(
        self, source: ModelSource, settings: Settings, tokenizer: Any, outputs: Sequence[OutputWriter] = ()
    ) -> None:
        self.source, self.settings, self.tokenizer, self.outputs = source, settings, tokenizer, outputs
        self._run_state: RunState | None = None
        self._damaged: dict[str, str] | None = None  # tensors with NaN or Inf, once they were searched for

    def plan(
        self, formats: Sequence[OutputFormat], output_dir: str | None = None, fit: bool = True, in_memory: bool = False,
        resume: bool = True,
    ) -> Job:  # fmt: skip
        """Plan the job without running it; the run uses its settings from now on. `fit`, `in_memory`: see `make_job`.
        `resume`: repeat choices of the interrupted run in `output_dir` that change the result, if possible."""
        before = interrupted_settings(Path(output_dir)) if resume and output_dir and self.settings.tunes else {}
        rest = (formats, output_dir, fit, self.tokenizer, self._damaged, in_memory)
        make = partial(make_job, self.settings, self.source, *rest)
        job = make(tune=not before.get("asked_algorithm")) if before else make()
        now = prints.fingerprint(job, job.used, self.source, "") if before else {}
        if before and prints.differences({**before, "max_shard_size": ""}, now):
            job = make()  # another run, which will be refused or replaced
        self.settings = job.used
        return job

    def checked_plan(
        self, formats: Sequence[OutputFormat] | None, output_dir: str | None = None, resume: bool = True
    ) -> Job:
        """Plan the job (without formats: `memory_plan`) and check the importance files that it reads and writes. With
        on_nan=keep, tensors with NaN or Inf are searched for first."""
        source, settings = self.source, self.settings
        if output_dir is not None:
            disk.reject_model_folder(Path(output_dir), source.folder or source.name_or_path)
        if settings.on_nan == "keep" and self._damaged is None:
            source.checks_finite = False
            self._damaged = damaged_tensors(source)
            for name, bad in self._damaged.items():
                logger.warning("tensor %s holds %s: it is left unquantized", name, bad)
        job = self.memory_plan() if formats is None else self.plan(formats, output_dir, resume=resume)
        if settings.imatrix is not None:
            given_importance(settings.imatrix, job, source)
        if settings.save_imatrix is not None:
            disk.check_file(settings.save_imatrix)
        return job

    def memory_plan(self) -> Job:
        """Plan for a model whose layers stay in memory. Layers that no packing holds are left unquantized, so that any
        format can be saved later; when no format holds the scheme at all, every layer is quantized."""
        try:
            return self.plan([get_format(targets.default_format(self.settings))], in_memory=True)
        except UnsupportedError:
            return self.plan([], in_memory=True)

    def to_memory(self) -> InMemory:
        """Quantize and keep the layers in memory."""
        job, output = self.checked_plan(None), MemoryWriter()
        finished = self._quantize(job, [], NoJournal(), [output])
        job = job.with_unquantized(finished.state.numerics.unquantized)
        return InMemory(assemble_model(self.source, output.layers), output.layers, job, finished, self)

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool = True,
        siblings: Sequence[str] = (), job: Job | None = None,
    ) -> list[Path]:  # fmt: skip
        """Quantize and write every format as blocks finish. Returns one folder per format.

        Args:
            resume: record finished blocks in a journal, and resume an interrupted run.
            siblings: subfolders of other runs of the same command. The journal then remains, to recognize this run as
                complete.
            job: the checked plan, if there is one already.

        Raises ConfigError when the interrupted run differs, OutputError when the folder cannot be used, and Stopped.
        """
        job = self.checked_plan(formats, output_dir, resume) if job is None else job
        made = prints.run_digests(job, self.settings, self.source, shard, self.tokenizer)
        root = Path(output_dir).expanduser()
        folders = targets.format_folders(root, formats)
        if not overwrite and prints.is_up_to_date(folders, made, self.settings):
            logger.info("%s holds the result of this command already; --overwrite makes it anew", output_dir)
            if not siblings:
                Journal(root).remove()
            return folders
        spilled, free = job.memory_plan.spilled, disk.free_bytes(work_space())
        if free < spilled:
            raise OutputError(
                f"{format_bytes(spilled)} of activations are stored in {work_space()} (AR_WORK_SPACE), whose disk has "
                f"{format_bytes(free)} free; free some space, set AR_WORK_SPACE to another disk, give more "
                "max_memory, or lower nsamples or seqlen"
            )
        journal_of, make = partial(self._journal, job, root, shard, resume), partial(self._quantize, job)
        return self._write(job, root, formats, overwrite, shard, journal_of, make, made, siblings)

    def save(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, result: InMemory
    ) -> list[Path]:
        """Write the result of `to_memory`. Returns one folder per format."""
        self.source.checks_finite = self.settings.on_nan != "keep"
        job = self.plan(formats, output_dir, fit=False).for_quantized(result.job, result.layers)
        disk.reject_model_folder(Path(output_dir), self.source.folder or self.source.name_or_path)

        def write_again(files: Sequence[FileOutput], journal: Journal) -> RunResult:
            journal.open(dict, self.source, files)
            rest = dict(result.layers)
            for block in self.source.blocks:
                inside = {name: rest.pop(name) for name in result.layers if name.startswith(f"{block}.")}
                scales = {n: s for n, s in result.finished.state.cache_scales.items() if n.startswith(f"{block}.")}
                write_unit(self.source, block, inside, scales, files)
            write_unit(self.source, None, rest, {}, files)
            return result.finished

        root = Path(output_dir).expanduser()
        return self._write(job, root, formats, overwrite, shard, lambda replace: NoJournal(), write_again)

    def _write(
        self, job: Job, root: Path, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        journal_of: Callable[[bool], Journal], make: Callable[[Sequence[FileOutput], Journal], RunResult],
        made_from: Mapping[str, str] | None = None, siblings: Sequence[str] = (),
    ) -> list[Path]:  # fmt: skip
        """Write every format that an interrupted run has not completed, and publish the folders. `journal_of` opens the
        journal; its argument says whether to discard one that does not fit. `make` gives all results to the outputs."""
        folders = targets.format_folders(root, formats)
        disk.check_disk(str(root), targets.missing_bytes(job, root))
        if self.source.folder is not None:
            side_files(self.source.folder, self.settings.trust_remote_code)  # refuses links out of the folder early
        removed = not root.exists()
        disk.ensure_output_folder(str(root), overwrite=True)
        with disk.explain_write_errors(root, targets.output_bytes(job)), ExitStack() as stack:
            base = stack.enter_context(Staging(root))
            journal = journal_of(overwrite or removed)
            targets.check_folders(job, root, formats, overwrite, journal, siblings)
            stages = [base if f == root else stack.enter_context(Staging(f)) for f in folders]
            stack.callback(journal.close)
            stale = targets.stale_files(root, folders, siblings)
            pending = [
                (fmt, stage)
                for fmt, stage in zip(formats, stages, strict=True)
                if not journal.publish_if_complete(fmt.name, stage, stale[stage.folder])
            ]
            writers = [_WRITERS.get(type(fmt), FolderWriter) for fmt, _ in pending]
            outputs = [of(job, *one, self.source, shard) for of, one in zip(writers, pending, strict=True)]
            blocks_done = lambda: None if self._run_state is None else len(self._run_state.records)
            with journal.checkpointing(outputs, len(job.blocks), blocks_done):
                if outputs:
                    finished = make(outputs, journal)
                    for output in outputs:
                        output.writer.finish()
                    job = job.with_unquantized(finished.state.numerics.unquantized)
                    made = OutputContext(self.source, self.settings, self.tokenizer, job, finished, made_from, shard)
                    for output in outputs:
                        finalize(made, output, journal, stale[output.stage.folder])
            if root not in folders and not siblings:  # files of an earlier run that wrote a single format
                disk.remove_files(root, stale[root])
        journal.finish(keep_record=bool(siblings))
        return folders

    def check_compatible(
        self, job: Job, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        resume: bool, siblings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Raise every error of `to_folders` that is known before work begins."""
        root = Path(output_dir).expanduser()
        made = prints.run_digests(job, self.settings, self.source, shard, self.tokenizer)
        if overwrite or not prints.is_up_to_date(targets.format_folders(root, formats), made, self.settings):
            disk.check_disk(output_dir, targets.missing_bytes(job, root))
            journal = self._journal(job, root, shard, resume, overwrite or not root.exists())
            targets.check_folders(job, root, formats, overwrite, journal, siblings)

    def _journal(self, job: Job, root: Path, shard: int | str, resume: bool, replace: bool) -> Journal:
        """The journal of a run. `replace`: discard a damaged one and one of another run."""
        if not (resume and job.resumable):
            return NoJournal(root)
        journal = Journal(root, replace)
        fixed = prints.fingerprint(job, self.settings, self.source, shard)
        journal.check_compatible(fixed, prints.weight_files(self.source), job.file_identity)
        return journal

    def _quantizer(self, job: Job) -> BlockQuantizer:
        settings, algorithm = self.settings, self.settings.algorithm
        if isinstance(algorithm, SignRoundConfig):
            options = settings.optimized_start, settings.enable_torch_compile, settings.gptq
            return SignRoundQuantizer(algorithm, settings.scale_dtype, *options)
        if isinstance(algorithm, RegisteredConfig):
            return algorithm.make(settings.scale_dtype)
        feeds_back = any(plan.codec.uses_feedback(asked=False) for plan in job.quantized().values())
        if settings.gptq is not None or (feeds_back and algorithm.optimized):
            return GPTQQuantizer(settings.gptq, settings.optimized_start, settings.scale_dtype)
        return RTNQuantizer(algorithm, settings.scale_dtype)

    def _quantize(
        self, job: Job, files: Sequence[FileOutput], journal: Journal, store: Sequence[OutputWriter] = ()
    ) -> RunResult:
        """Quantize all units in order and write them to all outputs."""
        settings, source = self.settings, self.source
        started = time.monotonic()
        for note in (job.fallback, *job.notes) if job.fallback else job.notes:
            logger.warning("%s", note)
        progress = make_progress(f"{settings.algorithm_name} {job.scheme_name}")
        stack = ExitStack()
        try:
            importance = None
            if settings.imatrix is not None:
                importance = given_importance(settings.imatrix, job, source)
                if missing := [name for name in job.quantized() if name not in importance]:
                    message = "%s has no importance for %d layers, such as %s: all of their inputs get the same weight"
                    logger.info(message, settings.imatrix, len(missing), missing[0])
            samples = self._samples(job, journal, progress, stack)
            journal.open(samples.fingerprint, source, files)
            if journal.finished:
                done = f"{journal.finished} of {len(job.blocks)}" if journal.finished < len(job.blocks) else "all"
                logger.info("resuming the interrupted run: %s blocks are done", done)
            captured = time.monotonic()
            state = self._run_state = self._state(job, [*files, *store, *self.outputs], samples, importance, journal)
            with deterministic_algorithms(settings.enable_deterministic_algorithms):
                quantize_blocks(state, progress)
                progress.message("layers outside the blocks")
                loss = finish_non_block(state)
            if settings.save_imatrix is not None:
                save_importance(settings.save_imatrix, job, source, state.sums, state.tokens, settings.seqlen)
            if state.unreached:
                logger.warning(
                    "no calibration token reached %d expert layers, such as %s: they are rounded by their weights "
                    "alone and listed in report.json; more samples (nsamples, seqlen) reach more of them",
                    len(state.unreached), state.unreached[0],
                )  # fmt: skip
            state.numerics.log_clamped_scales()
            journal.wait_until_written()  # it still reads the hidden states that are freed next
            samples.calibration = state.full = state.quantized = None
            trim_heap()
        except BaseException:
            journal.finished_units()  # wait: it may still read from the files that are closed next
            raise
        finally:
            progress.finish()
            stack.close()
        seconds = {"calibration": captured - started, "quantization": time.monotonic() - captured}
        counts = () if samples.data is None else samples.data.sources
        data = ", ".join(f"{name} ({count} samples)" for name, count in counts)
        return RunResult(state, loss, samples.smoke_ids, None if samples.data is None else data, seconds)

    def _state(
        self, job: Job, outputs: Sequence[OutputWriter], samples: Samples,
        importance: Mapping[str, torch.Tensor] | None, journal: Journal,
    ) -> RunState:  # fmt: skip
        """The state before the first block."""
        settings, source, algorithm = self.settings, self.source, self.settings.algorithm
        dtype, quantizer = compute_dtype(settings, source), self._quantizer(job)
        seen = [f"tensor {name} holds {bad}" for name, bad in (self._damaged or {}).items()]
        numerics = NumericsPolicy(settings, source.dtype, outputs, dict(job.damaged), incidents=seen)
        full, smoke = (
            None if found is None else Stream.of(found, getattr(algorithm, "batch_size", 8), settings.device, dtype)
            for found in (samples.calibration, samples.smoke)
        )
        second = quantizer.needs_targets and getattr(algorithm, "enable_quanted_input", True)
        return RunState(
            job, settings, source, outputs, quantizer, dtype, numerics, journal,
            [TRANSFORMS[name]() for name in settings.transforms], importance,
            full, full.clone() if full is not None and second else None, smoke,
            HeapTrimmer(_MIN_FREED_BYTES) if job.memory_plan.streams_experts else HeapTrimmer(),
        )  # fmt: skip

    def _samples(self, job: Job, journal: Journal, progress: Progress, stack: ExitStack) -> Samples:
        """Capture what the blocks get of the smoke sample and of the calibration data, where the run needs them. The
        smoke sample also tells whether the blocks can be run one at a time; a run that only rounds does without it."""
        settings, source, tokenizer, memory = self.settings, self.source, self.tokenizer, job.memory_plan
        capture = partial(
            capture_inputs, source, device=settings.device, dtype=compute_dtype(settings, source),
            store_device=settings.device if memory.streams == "device" else "cpu",
            stream_experts=memory.streams_experts,
        )  # fmt: skip
        disk_store = stack.enter_context(DiskStore(work_space())) if memory.streams == "file" else None
        samples, needs_data = Samples(), settings.needs_data
        limit, vocabulary = smallest(source.config, "max_position_embeddings"), largest(source.config, "vocab_size")
        if settings.verify or needs_data:
            progress.message("capturing the smoke sample")
            samples.smoke_ids = smoke_samples(tokenizer, vocabulary or 2, limit)
            try:
                samples.smoke = capture(samples.smoke_ids, check_isolation=needs_data and not journal.finished)
            except (ModelError, UnsupportedError) as error:
                if needs_data:
                    raise
                logger.warning("the saved model is checked without a forward pass: %s", error)
                samples.smoke_ids = None
        if needs_data:
            progress.message("reading calibration data")
            data = samples.data = prepare_calibration(
                settings.dataset, tokenizer, seqlen=settings.seqlen, nsamples=settings.nsamples, seed=settings.seed,
                model_max_length=limit, vocab_size=vocabulary or None, platform=settings.platform,
            )  # fmt: skip
            shown = ", ".join(f"{name} ({count})" for name, count in data.sources)
            logger.info("calibration: %d samples of %d tokens from %s", len(data.samples), data.seqlen, shown)
            links = None if samples.smoke is None else samples.smoke.links
            samples.calibration = capture(data.samples, disk_store=disk_store, links=links)
        if not settings.verify:
            samples.smoke_ids = samples.smoke = None
        return samples
