"""Driver of a regular run: from settings and a model to quantized layers in memory or output folders."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.base import BlockQuantizer
from auto_round.algorithms.gptq import GPTQQuantizer
from auto_round.algorithms.quantization.rtn.config import RegisteredConfig, RTNConfig
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.algorithms.transforms.base import TRANSFORMS
from auto_round.calib_dataset import CalibrationData, prepare_calibration
from auto_round.calibration.block_links import ModelDependencies
from auto_round.calibration.capture import CapturedInputs, capture_inputs
from auto_round.calibration.disk_store import DiskStore
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.envs import work_space
from auto_round.errors import ModelError, UnsupportedError
from auto_round.formats.base import OutputFormat, get_format, require_plan
from auto_round.logger import logger
from auto_round.modeling.config import largest, smallest
from auto_round.modeling.files.folder import side_files
from auto_round.modeling.source import ModelSource
from auto_round.output.folders import (
    check_disk,
    check_file,
    ensure_output_folder,
    explain_write_errors,
    reject_model_folder,
    remove_files,
)
from auto_round.output.staging import Staging
from auto_round.report.memory import HeapTrimmer, trim_heap
from auto_round.report.progress import Progress, make_progress
from auto_round.run.block_layers import attach_activation_hooks
from auto_round.run.blocks import RunState, quantize_blocks, restore_unit, write_unit
from auto_round.run.experts import ExpertBuffers, streams_experts
from auto_round.run.file_layout import FileLayout, plan_files
from auto_round.run.finalize import OutputContext, RunResult, finalize
from auto_round.run.fingerprint import fingerprint, is_up_to_date, non_block_checksum, run_digests, weight_files
from auto_round.run.folders import check_folders, format_folders, missing_bytes, output_bytes, stale_files
from auto_round.run.gguf import gguf_format, given_importance, log_missing_importance, save_importance
from auto_round.run.head import quantize_non_block, smoke_loss, smoke_samples, write_non_block
from auto_round.run.journal import Journal, journal_folder
from auto_round.run.memory_policy import check_work_space
from auto_round.run.numerics import (
    NumericsPolicy,
    RtnFallback,
    check_non_layer_tensors,
    damaged_layers,
    damaged_tensors,
    deterministic_algorithms,
    needs_all_blocks,
)
from auto_round.run.plan import Job, plan_for_quantized
from auto_round.run.planner import compute_dtype, header_bytes, make_job, with_cache_scales
from auto_round.run.results import assemble_model
from auto_round.run.resume import (
    RunJournal,
    checkpointing,
    data_fingerprint,
    previous_expert_mode,
    publish_if_complete,
    remove_journal,
    resume_message,
)
from auto_round.run.settings import Settings
from auto_round.run.unit_state import Unit
from auto_round.run.writers import FileOutput, FolderWriter, MemoryWriter, OutputWriter

if TYPE_CHECKING:
    from auto_round.run.gguf_output import GgufFileWriter


_MIN_FREED_BYTES = 16 << 20  # freed memory that is worth returning to the system when experts are streamed


class Run:
    """One run: a source model with settings.

    `tokenizer` may be None when no text has to be read. `layer_store` also receives the quantized layers of a run that
    writes folders.
    """

    def __init__(
        self, source: ModelSource, settings: Settings, tokenizer: Any, layer_store: MemoryWriter | None = None
    ) -> None:
        self.source, self.settings, self.tokenizer, self.layer_store = source, settings, tokenizer, layer_store
        self._run_state: RunState | None = None
        self._damaged: dict[str, str] | None = None  # tensors with NaN or Inf, once they were searched for
        self._unquantized: dict[str, str] = {}

    def plan(
        self, formats: Sequence[OutputFormat], output_dir: str | None = None, fit: bool = True, in_memory: bool = False,
        resume: bool = True,
    ) -> Job:  # fmt: skip
        """Plan the job without running it.

        Args:
            fit, in_memory: see `make_job`.
            resume: when `output_dir` has an interrupted run, repeat its choices that change the result if possible.
        """
        given = (self.settings, self.source, formats, output_dir, fit, self.tokenizer)
        before = previous_expert_mode(Path(output_dir)) if resume and output_dir is not None else None
        job = make_job(*given, in_memory=in_memory, per_expert=None if before is None else before.per_expert)
        if before is not None and before.differs(fingerprint(job, self.settings, self.source, "")):
            job = make_job(*given, in_memory=in_memory)  # another run, which will be refused or replaced
        if not self._damaged:
            return job
        self._unquantized = damaged_layers(job, self._damaged, self.source)
        job = make_job(*given, self._unquantized, in_memory)
        check_non_layer_tensors(job, self._damaged)
        return job

    def _find_damaged(self) -> None:
        """With on_nan=keep, find the tensors with NaN or Inf before anything is planned."""
        if self.settings.on_nan != "keep" or self._damaged is not None:
            return
        self.source.checks_finite = False
        self._damaged = damaged_tensors(self.source)
        for name, bad in self._damaged.items():
            logger.warning("tensor %s holds %s: it is left unquantized", name, bad)

    def checked_plan(self, formats: Sequence[OutputFormat], output_dir: str | None = None, resume: bool = True) -> Job:
        """Plan the job and check the importance files that it reads and writes.

        Raises:
            DataError: the importance file is missing, damaged, or of another model.
            OutputError: the importance file cannot be written, or the output folder is the model's.
        """
        if output_dir is not None:
            self._reject_source_folder(output_dir)
        self._find_damaged()
        return self._checked(self.plan(formats, output_dir, resume=resume))

    def _reject_source_folder(self, output_dir: str) -> None:
        reject_model_folder(Path(output_dir), self.source.folder or self.source.name_or_path)

    def _checked(self, job: Job) -> Job:
        if self.settings.imatrix is not None:
            given_importance(self.settings.imatrix, job, self.source)
        if self.settings.save_imatrix is not None:
            check_file(self.settings.save_imatrix)
        return job

    def memory_plan(self) -> Job:
        """Plan for a model whose layers stay in memory.

        Layers that no packing holds are left unquantized, so that any format can be saved later; when no format holds
        the scheme at all, every layer is quantized.
        """
        name = self.settings.scheme_name.lower()
        try:
            return self.plan([get_format(name if name.startswith("gguf:") else "auto_round")], in_memory=True)
        except UnsupportedError:
            return self.plan([], in_memory=True)

    def to_memory(self) -> tuple[torch.nn.Module, dict[str, QuantizedLayer], RunResult]:
        """Quantize and keep the layers in memory: (model, layers by name, run result)."""
        self._find_damaged()
        job = self._checked(self.memory_plan())
        output = MemoryWriter()
        finished = self._quantize(job, layer_store=output)
        return assemble_model(self.source, output.layers), output.layers, finished

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool = True,
        siblings: Sequence[str] = (), job: Job | None = None,
    ) -> list[Path]:  # fmt: skip
        """Quantize and write every format as blocks finish. Returns one folder per format.

        Args:
            resume: record finished blocks in a journal, and resume an interrupted run.
            siblings: subfolders of other runs of the same command. The journal then remains, to recognize this run as
                complete, until `remove_journal`.
            job: the checked plan, if there is one already.

        Raises:
            ConfigError: the interrupted run differs.
            OutputError: the folder cannot be used, or another run works on it.
            Stopped: by Ctrl-C.
        """
        job = self.checked_plan(formats, output_dir, resume) if job is None else job
        made = run_digests(job, self.settings, self.source, shard, self.tokenizer)
        root = Path(output_dir).expanduser()
        folders = format_folders(root, formats)
        if not overwrite and is_up_to_date(folders, made, self.settings):
            logger.info("%s holds the result of this command already; --overwrite makes it anew", output_dir)
            if not siblings:
                remove_journal(root)
            return folders
        check_disk(output_dir, missing_bytes(job, root))
        if self.source.folder is not None:
            side_files(self.source.folder, self.settings.trust_remote_code)  # refuses links out of the folder early
        removed = not root.exists()
        if job.memory_plan is not None:
            check_work_space(job.memory_plan)
        ensure_output_folder(output_dir, overwrite=True)
        with explain_write_errors(root, output_bytes(job)), ExitStack() as stack:
            base = stack.enter_context(Staging(root))
            journal = self._journal(job, root, overwrite or removed, shard) if resume else None
            check_folders(job, root, formats, overwrite, journal, siblings)
            stages = [base if f == root else stack.enter_context(Staging(f)) for f in folders]
            if journal is None:
                Journal(journal_folder(root)).remove()
            else:
                stack.callback(journal.close)
            stale = stale_files(root, folders, siblings)
            pending = [
                (fmt, stage)
                for fmt, stage in zip(formats, stages, strict=True)
                if not publish_if_complete(fmt, stage, journal, stale[stage.folder])
            ]
            if pending:
                blocks_done = lambda: None if self._run_state is None else len(self._run_state.records)
                with checkpointing(journal, len(job.blocks), blocks_done):
                    self._make(job, pending, shard, journal, made, stale)
            if root not in folders and not siblings:  # files of an earlier run that wrote a single format
                remove_files(root, stale[root])
        if journal is not None:
            journal.finish(keep_record=bool(siblings))
        return folders

    def _make(
        self, job: Job, pending: Sequence[tuple[OutputFormat, Staging]], shard: int | str, journal: RunJournal | None,
        made_from: Mapping[str, str] | None, stale: Mapping[Path, Sequence[str]],
    ) -> None:  # fmt: skip
        """Quantize and write the formats whose folders are not complete."""
        self._run_state = None
        outputs = [self._output_writer(job, fmt, stage, shard) for fmt, stage in pending]
        try:
            finished = self._quantize(job, outputs, journal, self.layer_store)
            for output in outputs:
                output.writer.finish()
            job = job.with_unquantized(finished.state.numerics.unquantized)
            made = OutputContext(self.source, self.settings, self.tokenizer, job, finished, made_from, shard)
            for output in outputs:
                finalize(made, output, journal, stale[output.stage.folder])
        except BaseException:
            resumable = journal is not None and journal.finished_units() > 0
            for output in outputs:
                output.close()
                output.stage.retain = output.stage.retain or resumable
            raise

    def check_compatible(
        self, job: Job, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        resume: bool, siblings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Raise every error of `to_folders` that is known before work begins."""
        root = Path(output_dir).expanduser()
        made = run_digests(job, self.settings, self.source, shard, self.tokenizer)
        if not overwrite and is_up_to_date(format_folders(root, formats), made, self.settings):
            return
        check_disk(output_dir, missing_bytes(job, root))
        journal = self._journal(job, root, overwrite or not root.exists(), shard) if resume else None
        check_folders(job, root, formats, overwrite, journal, siblings)

    def _journal(self, job: Job, root: Path, replace: bool, shard: int | str) -> RunJournal | None:
        """The journal of runs that have one. `replace`: discard a damaged one and one of another run."""
        if not self.source.lazy or (streams_experts(job) and not self.settings.tunes):
            return None
        journal = RunJournal(root, replace)
        fixed, layout = fingerprint(job, self.settings, self.source, shard), {}
        if job.gguf is not None:
            from auto_round.run.gguf_output import gguf_file_name

            digest = hashlib.sha256(repr(job.gguf.metadata).encode()).hexdigest()[:16]
            layout = {"GGUF file": gguf_file_name(job), "GGUF metadata": digest}
        journal.check_compatible(fixed, weight_files(self.source), layout)
        return journal

    def _output_writer(
        self, job: Job, fmt: OutputFormat, stage: Staging, shard: int | str
    ) -> FolderWriter | GgufFileWriter:
        if job.gguf is not None and fmt is gguf_format([fmt]):
            from auto_round.run.gguf_output import make_gguf_writer

            return make_gguf_writer(job, fmt, stage, self.source, self.settings)
        layout = plan_files(fmt, job.layers, self.source)
        unquantized: dict[str, str] = {}

        def replan(names: Sequence[str], reason: str) -> FileLayout:
            unquantized.update(dict.fromkeys(names, reason))
            after = job.with_unquantized(unquantized)
            require_plan(fmt, after.export_plan(fmt))
            return plan_files(fmt, after.layers, self.source)

        specs = with_cache_scales(layout.tensors, fmt, job.cache)
        return FolderWriter(fmt, stage, self.source, shard, layout, replan, header_bytes(specs))

    def save(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        layers: Mapping[str, QuantizedLayer], finished: RunResult,
    ) -> list[Path]:  # fmt: skip
        """Write layers that `to_memory` quantized. Returns one folder per format."""
        self.source.checks_finite = self.settings.on_nan != "keep"
        job = plan_for_quantized(self.plan(formats, output_dir, fit=False), self.memory_plan(), layers)
        job = job.with_unquantized(finished.state.numerics.unquantized)
        check_disk(output_dir, output_bytes(job))
        self._reject_source_folder(output_dir)
        root = ensure_output_folder(output_dir, overwrite)
        folders = format_folders(root, formats)
        stale = stale_files(root, folders)
        made = OutputContext(self.source, self.settings, self.tokenizer, job, finished, shard=shard)
        for fmt, folder in zip(formats, folders, strict=True):
            ensure_output_folder(folder, overwrite)
            with explain_write_errors(folder, output_bytes(job)), Staging(folder) as stage:
                output = self._output_writer(job, fmt, stage, shard)
                with closing(output):
                    output.begin()
                    self._write_saved(output, layers, finished.state.cache_scales)
                    output.writer.finish()
                finalize(made, output, None, stale[folder])
        if root not in folders:
            remove_files(root, stale[root])
        return folders

    def _write_saved(
        self, output: OutputWriter, layers: Mapping[str, QuantizedLayer], scales: Mapping[str, torch.Tensor]
    ) -> None:
        rest = dict(layers)
        for block in self.source.blocks:
            prefix = f"{block}."
            inside = [rest.pop(name) for name in layers if name.startswith(prefix)]
            own_scales = {name: scale for name, scale in scales.items() if name.startswith(prefix)}
            write_unit(self.source, block, inside, own_scales, [output])
        write_non_block(self.source, list(rest.values()), [output])

    def _quantizer(self, job: Job) -> BlockQuantizer:
        settings = self.settings
        if isinstance(settings.algorithm, SignRoundConfig):
            return SignRoundQuantizer(
                settings.algorithm, settings.scale_dtype, settings.optimized_start, settings.enable_torch_compile,
                settings.gptq,
            )  # fmt: skip
        if isinstance(settings.algorithm, RegisteredConfig):
            return settings.algorithm.make(settings.scale_dtype)
        feeds_back = any(plan.codec.uses_feedback(asked=False) for plan in job.quantized().values())
        if settings.gptq is not None or (feeds_back and settings.algorithm.optimized):
            return GPTQQuantizer(settings.gptq, settings.optimized_start, settings.scale_dtype)
        return RTNQuantizer(settings.algorithm, settings.scale_dtype)

    def _quantize(
        self, job: Job, files: Sequence[FileOutput] = (), journal: RunJournal | None = None,
        layer_store: MemoryWriter | None = None,
    ) -> RunResult:  # fmt: skip
        settings, source = self.settings, self.source
        started = time.monotonic()
        for note in job.notes:
            logger.warning("%s", note)
        storage = "ram" if job.memory_plan is None else job.memory_plan.streams
        store = settings.device if storage == "device" else torch.device("cpu")
        progress = make_progress(f"{settings.algorithm_name} {job.scheme_name}")
        stack = ExitStack()
        try:
            disk_store = stack.enter_context(DiskStore(work_space())) if storage == "file" else None
            importance = None
            if settings.imatrix is not None:
                importance = given_importance(settings.imatrix, job, source)
                log_missing_importance(settings.imatrix, job, importance)
            progress.message("capturing the smoke sample")
            smoke_ids, smoke_sample = self._capture_smoke_sample(job, store, journal)
            links = None if smoke_sample is None else smoke_sample.links
            if settings.needs_data:
                progress.message("reading calibration data")
            data = self._data()
            calibration = self._capture(data.samples, store, job, disk_store, links) if data is not None else None
            if not settings.verify:
                smoke_ids = smoke_sample = None
            if journal is not None:
                journal.open(data_fingerprint(data, smoke_ids, calibration), source, files)
                if journal.finished:
                    logger.info("%s", resume_message(journal.finished, len(job.blocks)))
            else:
                for output in files:
                    output.begin()
            captured = time.monotonic()
            outputs: list[OutputWriter] = [*files, *([] if layer_store is None else [layer_store])]
            state = RunState(
                self._quantizer(job), outputs, settings.device, compute_dtype(settings, source), settings.seed,
                calibration, smoke_sample,
                batch=settings.algorithm.batch_size if isinstance(settings.algorithm, SignRoundConfig) else 8,
                quantized_input=getattr(settings.algorithm, "enable_quanted_input", True),
                cache=job.cache, importance=importance, gather=settings.save_imatrix is not None, journal=journal,
                rtn_fallback=RtnFallback(settings.scale_dtype, source.dtype, needs_all_blocks(settings)),
                numerics=NumericsPolicy(
                    settings.on_nan, dict(self._unquantized),
                    incidents=[f"tensor {name} holds {bad}" for name, bad in (self._damaged or {}).items()],
                ),
                transforms=[TRANSFORMS[name]() for name in settings.transforms], gptq=settings.gptq,
            )  # fmt: skip
            if streams_experts(job):
                state.freed = HeapTrimmer(_MIN_FREED_BYTES)
                if settings.tunes:
                    codes = stack.enter_context(DiskStore(work_space(), "codes"))
                    rtn = RTNConfig(disable_opt_rtn=not settings.optimized_start)
                    state.buffers = ExpertBuffers(codes, rtn=RTNQuantizer(rtn, settings.scale_dtype))
            self._run_state = state
            with deterministic_algorithms(settings.enable_deterministic_algorithms):
                quantize_blocks(job, source, state, progress)
                loss = self._finish_non_block(job, state, progress)
                if not source.lazy:
                    attach_activation_hooks(source.model, state.activations)
            if settings.save_imatrix is not None:
                save_importance(settings.save_imatrix, job, source, state.sums, state.tokens, settings.seqlen)
            if state.unreached:
                logger.warning(
                    "no calibration token reached %d expert layers, such as %s: they are rounded by their weights "
                    "alone and listed in report.json; more samples (nsamples, seqlen) reach more of them",
                    len(state.unreached), state.unreached[0],
                )  # fmt: skip
            state.numerics.log_clamped_scales()
            if journal is not None:
                journal.wait()  # it still reads the hidden states that are freed next
            state.calibration = state.last_inputs = state.last_full = None
            trim_heap()
        except BaseException:
            if journal is not None:
                journal.finished_units()  # wait: it may still read from the files that are closed next
            raise
        finally:
            progress.finish()
            stack.close()
        done = time.monotonic()
        seconds = {"calibration": captured - started, "quantization": done - captured}
        described = None if data is None else ", ".join(f"{n} ({c} samples)" for n, c in data.sources)
        return RunResult(state, loss, smoke_ids, described, seconds)

    def _finish_non_block(self, job: Job, state: RunState, progress: Progress) -> float | None:
        """Quantize the layers outside the blocks, and write all tensors outside the blocks, unless an interrupted run
        has done that. Returns the loss on the smoke sample."""
        progress.message("layers outside the blocks")
        if state.journal is not None and state.journal.finished > len(job.blocks):
            loss = restore_unit(state, len(job.blocks)).loss
            return None if state.smoke_sample is None else loss
        optimized = self.settings.needs_data and self.settings.optimized_start
        algorithm = self.settings.algorithm
        steps = algorithm.iters if isinstance(algorithm, SignRoundConfig) else 0
        non_block = quantize_non_block(job, self.source, state, optimized, self.settings.scale_dtype, steps)
        write_non_block(self.source, non_block, state.outputs)
        loss = smoke_loss(self.source, state, non_block)
        if state.journal is not None and non_block:
            unit = Unit(records=state.records[len(job.blocks) :], numerics=state.numerics.state(), loss=loss)
            state.journal.add("non_block", unit, non_block_checksum(self.source))
        return loss

    def _data(self) -> CalibrationData | None:
        if not self.settings.needs_data:
            return None
        data = prepare_calibration(
            self.settings.dataset, self.tokenizer, seqlen=self.settings.seqlen, nsamples=self.settings.nsamples,
            seed=self.settings.seed, model_max_length=smallest(self.source.config, "max_position_embeddings"),
            vocab_size=largest(self.source.config, "vocab_size") or None, platform=self.settings.platform,
        )  # fmt: skip
        shown = ", ".join(f"{name} ({count})" for name, count in data.sources)
        logger.info("calibration: %d samples of %d tokens from %s", len(data.samples), data.seqlen, shown)
        return data

    def _capture_smoke_sample(
        self, job: Job, store: torch.device, journal: RunJournal | None
    ) -> tuple[list[dict[str, torch.Tensor]] | None, CapturedInputs | None]:
        """Token ids of the smoke sample and its inputs of the first block, when verification or calibration needs them.

        With calibration, this also checks that the blocks can be run one at a time. A run that only rounds continues
        without a smoke sample when they cannot.

        Raises:
            ModelError, UnsupportedError: the blocks cannot be run one at a time, and the run needs that.
        """
        if not (self.settings.verify or self.settings.needs_data):
            return None, None
        check_isolation = self.settings.needs_data and not (journal is not None and journal.journal.units)
        vocab_size = largest(self.source.config, "vocab_size") or 2
        ids = smoke_samples(self.tokenizer, vocab_size, smallest(self.source.config, "max_position_embeddings"))
        try:
            return ids, self._capture(ids, store, job, check_isolation=check_isolation)
        except (ModelError, UnsupportedError) as error:
            if self.settings.needs_data:
                raise
            logger.warning("the saved model is checked without a forward pass: %s", error)
            return None, None

    def _capture(
        self, samples: list[dict[str, torch.Tensor]], store: torch.device, job: Job,
        disk_store: DiskStore | None = None, links: ModelDependencies | None = None, check_isolation: bool = False,
    ) -> CapturedInputs:  # fmt: skip
        dtype = compute_dtype(self.settings, self.source)
        return capture_inputs(
            self.source, samples, self.settings.device, store, dtype, disk_store, streams_experts(job), links,
            check_isolation,
        )  # fmt: skip
