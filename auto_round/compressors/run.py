"""One run from settings and a source to a model in memory or to folders."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.quantization.block_task import BlockQuantizer
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.calib_dataset import CalibrationData, prepare_calibration
from auto_round.calibration.inputs import CapturedInputs, capture_inputs
from auto_round.calibration.links import Links
from auto_round.calibration.spill import Spill
from auto_round.compressors.activations import attach
from auto_round.compressors.assemble import assemble_model
from auto_round.compressors.blockwise import Walk, take_unit, walk_blocks
from auto_round.compressors.deliver import Delivery, Finished, deliver
from auto_round.compressors.deterministic import deterministic_algorithms
from auto_round.compressors.file_layout import FileLayout, plan_files
from auto_round.compressors.gguf_job import gguf_format
from auto_round.compressors.importance_files import given_importance, save_importance, say_what_is_missing
from auto_round.compressors.job import Job
from auto_round.compressors.non_finite import (
    FallBack,
    Numbers,
    check_dense_places,
    damaged_layers,
    damaged_tensors,
    needs_all_blocks,
)
from auto_round.compressors.output_folders import check_folders, format_folders, output_bytes, stale_files
from auto_round.compressors.outside import emit_outside, probe_loss, quantize_outside
from auto_round.compressors.place import check_work_space
from auto_round.compressors.planning import compute_dtype, header_bytes, make_job, with_cache_scales
from auto_round.compressors.probe import probe_samples
from auto_round.compressors.resume.fingerprint import (
    fingerprint,
    outside_checksum,
    weight_files,
)
from auto_round.compressors.resume.going_on import going_on, is_done, keeping, late_facts
from auto_round.compressors.resume.journal import Journal, journal_folder
from auto_round.compressors.resume.run_journal import RunJournal, remove_journal, tuned_alone_before
from auto_round.compressors.resume.same_command import is_made, recipe
from auto_round.compressors.resume.unit_state import Unit
from auto_round.compressors.saved_layers import as_done
from auto_round.compressors.settings import Settings
from auto_round.compressors.sinks import FolderSink, MemorySink, Sink
from auto_round.compressors.streamed_experts import streams_experts
from auto_round.compressors.tuned_experts import ExpertRooms
from auto_round.envs import work_space
from auto_round.errors import ModelError, UnsupportedError
from auto_round.export.disk import check_disk, check_file, ensure_output_folder, writing
from auto_round.export.earlier_output import refuse_source, remove_files
from auto_round.export.formats import OutputFormat, get_format, require_plan
from auto_round.export.staging import Staging
from auto_round.logger import logger
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.modeling.config_values import largest, smallest
from auto_round.modeling.side_files import side_files
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer
from auto_round.report.memory import FreedMemory, return_freed
from auto_round.report.progress import Progress, make_progress

if TYPE_CHECKING:
    from auto_round.compressors.gguf_sink import GgufSink


_LITTLE = 16 << 20  # bytes of freed memory that are worth giving back where experts are read one at a time


class Run:
    """A source with settings. `tokenizer` may be None when no text has to be read. `keep` is given the layers, too."""

    def __init__(self, source: ModelSource, settings: Settings, tokenizer: Any, keep: MemorySink | None = None) -> None:
        self.source, self.settings, self.tokenizer, self.keep = source, settings, tokenizer, keep
        self._walking: Walk | None = None
        self._looked = False
        self._damaged: dict[str, str] = {}
        self._kept: dict[str, str] = {}

    def plan(
        self, formats: Sequence[OutputFormat], output_dir: str | None = None, fit: bool = True, in_memory: bool = False,
        resume: bool = True,
    ) -> Job:  # fmt: skip
        """The job, without doing it. `fit`, `in_memory`: see `make_job`. `resume`: an interrupted run may be gone on
        with, so what decides the result is chosen as it was then, where that is possible."""
        given = (self.settings, self.source, formats, output_dir, fit, self.tokenizer)
        before = tuned_alone_before(Path(output_dir)) if resume and output_dir is not None else None
        job = make_job(*given, in_memory=in_memory, tuned_alone=None if before is None else before.alone)
        if before is not None and before.differs(fingerprint(job, self.settings, self.source, "")):
            job = make_job(*given, in_memory=in_memory)  # another run, to be refused or replaced
        if not self._damaged:
            return job
        self._kept = damaged_layers(job, self._damaged, self.source)
        job = make_job(*given, self._kept, in_memory)
        check_dense_places(job, self._damaged)
        return job

    def _look_for_damage(self) -> None:
        """Where layers with NaN or Inf are to stay, find them before anything is planned."""
        if self.settings.on_nan != "keep" or self._looked:
            return
        self._looked = True
        self.source.checks_finite = False
        self._damaged = damaged_tensors(self.source)
        for name, bad in self._damaged.items():
            logger.warning("tensor %s holds %s: it stays as it is", name, bad)

    def checked_plan(self, formats: Sequence[OutputFormat], output_dir: str | None = None, resume: bool = True) -> Job:
        """The same, with the files of importance that it will read and write looked at.

        Raises:
            DataError: the file to read is not there, damaged, or of another model.
            OutputError: the file to write cannot be made, or the output folder is the model's.
        """
        if output_dir is not None:
            self._refuse_source(output_dir)
        self._look_for_damage()
        return self._checked(self.plan(formats, output_dir, resume=resume))

    def _refuse_source(self, output_dir: str) -> None:
        refuse_source(Path(output_dir), getattr(self.source, "folder", None) or self.source.name_or_path)

    def _checked(self, job: Job) -> Job:
        settings = self.settings
        if settings.imatrix is not None:
            given_importance(settings.imatrix, job, self.source)
        if settings.save_imatrix is not None:
            check_file(settings.save_imatrix)
        return job

    def memory_plan(self) -> Job:
        """The job of a model that is kept in memory. Layers that no packing takes stay as they are, so that it can be
        saved in any format later; a scheme that no packing takes at all leaves that to format fake."""
        name = self.settings.scheme_name.lower()
        try:
            return self.plan([get_format(name if name.startswith("gguf:") else "auto_round")], in_memory=True)
        except UnsupportedError:
            return self.plan([], in_memory=True)

    def to_memory(self) -> tuple[torch.nn.Module, dict[str, QuantizedLayer], Finished]:
        """Quantize and keep the layers: (model, layers by name, records)."""
        self._look_for_damage()
        job = self._checked(self.memory_plan())
        sink = MemorySink()
        finished = self._walk(job, [sink])
        return assemble_model(self.source, sink.layers), sink.layers, finished

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool = True,
        siblings: Sequence[str] = (), job: Job | None = None,
    ) -> list[Path]:  # fmt: skip
        """Quantize, writing every format as blocks finish. Returns the folders, one a format.

        Args:
            resume: keep a journal, and go on with the run that was interrupted there.
            siblings: subfolders of other runs that are part of the same command; the journal of what this one made is
                kept until `remove_journal`.
            job: the plan, where it was made and checked already.

        Raises:
            ConfigError: the interrupted run was another one.
            OutputError: the folder cannot be used, or another run works on it.
            Stopped: by Ctrl-C.
        """
        job = self.checked_plan(formats, output_dir, resume) if job is None else job
        made = recipe(job, self.settings, self.source, shard, self.tokenizer)
        places = format_folders(Path(output_dir).expanduser(), formats)
        if not overwrite and is_made(places, made, self.settings):
            logger.info("%s holds the result of this command already; --overwrite makes it anew", output_dir)
            if not siblings:
                remove_journal(Path(output_dir).expanduser())
            return places
        check_disk(output_dir, output_bytes(job))
        if isinstance(self.source, CheckpointSource):
            side_files(self.source.folder, self.settings.trust_remote_code)  # a link that leads away is found now
        removed = not Path(output_dir).expanduser().exists()
        if job.memory_plan is not None:
            check_work_space(job.memory_plan)
        root = ensure_output_folder(output_dir, overwrite=True)
        with writing(root, output_bytes(job)), ExitStack() as stack:
            base = stack.enter_context(Staging(root))
            journal = self._journal(job, root, overwrite or removed, shard) if resume else None
            check_folders(job, root, formats, overwrite, journal, siblings)
            folders = format_folders(root, formats)
            stages = [base if f == root else stack.enter_context(Staging(f)) for f in folders]
            if journal is None:
                Journal(journal_folder(root)).remove()
            else:
                stack.callback(journal.close)
            stale = stale_files(root, folders, siblings)
            left = [
                (f, stage)
                for f, stage in zip(formats, stages, strict=True)
                if not is_done(f, stage, journal, stale[stage.folder])
            ]
            if left:
                with keeping(journal, len(job.blocks), self._walked):
                    self._make(job, left, shard, journal, made, stale)
            if root not in folders and not siblings:  # what was there before several formats got folders of their own
                remove_files(root, stale[root])
        if journal is not None:  # when nothing of a run is left but complete folders
            journal.finish(keep=bool(siblings))
        return folders

    def _walked(self) -> int | None:
        """Blocks that are done, None before the walk."""
        return None if self._walking is None else len(self._walking.records)

    def _make(
        self, job: Job, left: Sequence[tuple[OutputFormat, Staging]], shard: int | str, journal: RunJournal | None,
        made_from: Mapping[str, str] | None, stale: Mapping[Path, Sequence[str]],
    ) -> None:  # fmt: skip
        """Everything from the calibration data to the folders that are not complete yet."""
        self._walking = None
        for _, stage in left:
            stage.clear()
        sinks = [self._sink(job, fmt, stage.path, shard) for fmt, stage in left]
        with ExitStack() as stack:
            for sink in sinks:
                stack.enter_context(sink.writer)
            finished = self._walk(job, [*sinks, *([] if self.keep is None else [self.keep])], journal)
            if journal is not None:
                journal.wait()
        job = job.with_kept(finished.walk.numbers.kept)
        made = Delivery(self.source, self.settings, self.tokenizer, job, finished, made_from)
        for sink, (_, stage) in zip(sinks, left, strict=True):
            deliver(made, sink, stage, journal, stale[stage.folder])

    def admit(
        self, job: Job, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        resume: bool, siblings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Everything of `to_folders` that can be refused before work begins."""
        if not overwrite and is_made(
            format_folders(Path(output_dir).expanduser(), formats),
            recipe(job, self.settings, self.source, shard, self.tokenizer), self.settings,
        ):  # fmt: skip
            return
        check_disk(output_dir, output_bytes(job))
        root = Path(output_dir).expanduser()
        journal = self._journal(job, root, overwrite or not root.exists(), shard) if resume else None
        check_folders(job, root, formats, overwrite, journal, siblings)

    def _journal(self, job: Job, root: Path, replace: bool, shard: int | str) -> RunJournal | None:
        """The journal where one is kept. `replace`: one of another run, or a damaged one, is removed: the user said so,
        or has removed the output folder."""
        if not self.source.lazy or (streams_experts(job) and not self.settings.tunes):
            return None
        journal = RunJournal(root, replace)
        journal.admit(fingerprint(job, self.settings, self.source, shard), weight_files(self.source))
        return journal

    def _sink(self, job: Job, fmt: OutputFormat, folder: Path, shard: int | str) -> FolderSink | GgufSink:
        if job.gguf is not None and fmt is gguf_format([fmt]):
            from auto_round.compressors.gguf_sink import make_sink

            return make_sink(job, fmt, folder, self.source, self.settings)
        layout = plan_files(fmt, job.layers, self.source)
        kept: dict[str, str] = {}

        def replan(names: Sequence[str], reason: str) -> FileLayout:
            kept.update(dict.fromkeys(names, reason))
            after = job.with_kept(kept)
            require_plan(fmt, after.export_plan(fmt))
            return plan_files(fmt, after.layers, self.source)

        specs = with_cache_scales(layout.tensors, fmt, job.cache)
        return FolderSink(fmt, folder, self.source, shard, layout, replan, header_bytes(specs))

    def save(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str,
        layers: Mapping[str, QuantizedLayer], finished: Finished,
    ) -> list[Path]:  # fmt: skip
        """Write layers that are in memory already."""
        self.source.checks_finite = self.settings.on_nan != "keep"
        job = as_done(self.plan(formats, output_dir, fit=False), self.memory_plan(), layers)
        job = job.with_kept(finished.walk.numbers.kept)
        check_disk(output_dir, output_bytes(job))
        self._refuse_source(output_dir)
        root = ensure_output_folder(output_dir, overwrite)
        folders = format_folders(root, formats)
        stale = stale_files(root, folders)
        made = Delivery(self.source, self.settings, self.tokenizer, job, finished)
        for fmt, folder in zip(formats, folders, strict=True):
            ensure_output_folder(folder, overwrite)
            with writing(folder, output_bytes(job)), Staging(folder) as stage:
                stage.clear()
                sink = self._sink(job, fmt, stage.path, shard)
                with sink.writer:
                    self._emit_saved(job, sink, layers, finished.walk.cache_scales)
                deliver(made, sink, stage, None, stale[folder])
        if root not in folders:
            remove_files(root, stale[root])
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

    def _quantizer(self) -> BlockQuantizer:
        settings = self.settings
        if isinstance(settings.algorithm, SignRoundConfig):
            return SignRoundQuantizer(
                settings.algorithm, settings.scale_dtype, settings.optimized_start, settings.enable_torch_compile
            )
        return RTNQuantizer(settings.algorithm, settings.scale_dtype)

    def _walk(self, job: Job, sinks: Sequence[Sink], journal: RunJournal | None = None) -> Finished:
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
            importance = None
            if settings.imatrix is not None:
                importance = given_importance(settings.imatrix, job, source)
                say_what_is_missing(settings.imatrix, job, importance)
            progress.message("capturing the probe")
            probe_ids, probe = self._capture_probe(job, store, journal)
            links = None if probe is None else probe.links
            if settings.needs_data:
                progress.message("reading calibration data")
            data = self._data()
            calibration = self._capture(data.samples, store, job, spill, links) if data is not None else None
            if not settings.verify:
                probe_ids = probe = None
            if journal is not None:
                journal.settle(late_facts(data, probe_ids, calibration), source)
                if journal.finished:
                    logger.info("%s", going_on(journal.finished, len(job.blocks)))
            captured = time.monotonic()
            batch = settings.algorithm.batch_size if isinstance(settings.algorithm, SignRoundConfig) else 8
            walk = Walk(
                self._quantizer(), sinks, settings.device, compute_dtype(settings, source), settings.seed, calibration,
                probe, batch, getattr(settings.algorithm, "enable_quanted_input", True), job.cache,
                importance, settings.save_imatrix is not None, journal,
                FallBack(settings.scale_dtype, source.dtype, needs_all_blocks(settings)), self._numbers(),
                stack.enter_context(self._expert_rooms()) if settings.tunes and streams_experts(job) else None,
            )  # fmt: skip
            if streams_experts(job):
                walk.freed = FreedMemory(_LITTLE)
            self._walking = walk
            with deterministic_algorithms(settings.deterministic):
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
            walk.numbers.say_clamped()
            if journal is not None:
                journal.wait()  # it writes hidden states, which are given up here
            walk.calibration = walk.last_inputs = walk.last_full = None  # saving and checking have no use for them
            return_freed()
        except BaseException:
            if journal is not None:
                journal.kept()  # it may still be writing what lies in the files that are closed now
            raise
        finally:
            progress.finish()
            stack.close()
        done = time.monotonic()
        seconds = {"calibration": captured - started, "quantization": done - captured}
        described = None if data is None else ", ".join(f"{n} ({c} samples)" for n, c in data.sources)
        return Finished(walk, outside, loss, probe_ids, described, seconds)

    @contextmanager
    def _expert_rooms(self) -> Iterator[ExpertRooms]:
        """What tuning experts one at a time needs for all blocks; its file is gone afterwards."""
        plain = RTNConfig(disable_opt_rtn=not self.settings.optimized_start)
        with Spill(work_space(), "codes") as codes:
            yield ExpertRooms(codes, RTNQuantizer(plain, self.settings.scale_dtype))

    def _numbers(self) -> Numbers:
        """The policy, with what is known before the walk."""
        incidents = [f"tensor {name} holds {bad}" for name, bad in self._damaged.items()]
        return Numbers(self.settings.on_nan, dict(self._kept), incidents=incidents)

    def _finish_outside(self, job: Job, walk: Walk, sinks: Sequence[Sink], progress: Progress) -> list[QuantizedLayer]:
        progress.message("what is outside the blocks")
        if walk.journal is not None and walk.journal.finished > len(job.blocks):
            outside = list(take_unit(walk, len(job.blocks)).layers)
        else:
            optimized = self.settings.needs_data and self.settings.optimized_start
            algorithm = self.settings.algorithm
            steps = algorithm.iters if isinstance(algorithm, SignRoundConfig) else 0
            outside = quantize_outside(job, self.source, walk, optimized, self.settings.scale_dtype, steps, sinks)
            if walk.journal is not None and outside:
                inputs = {
                    name: walk.activations[name] for name in (v.name for v in outside) if name in walk.activations
                }
                unit = Unit(outside, inputs, walk.records[len(job.blocks) :], numbers=walk.numbers.state())
                hidden = {} if walk.probe_hidden is None else {"probe": walk.probe_hidden}
                walk.journal.add("outside", unit, outside_checksum(self.source), hidden)
        emit_outside(job, self.source, outside, sinks)
        return outside

    def _data(self) -> CalibrationData | None:
        if not self.settings.needs_data:
            return None
        data = prepare_calibration(
            self.settings.dataset, self.tokenizer, seqlen=self.settings.seqlen, nsamples=self.settings.nsamples,
            seed=self.settings.seed, model_max_length=smallest(self.source.config, "max_position_embeddings"),
            vocab_size=_vocab_size(self.source), platform=self.settings.platform,
        )  # fmt: skip
        shown = ", ".join(f"{name} ({count})" for name, count in data.sources)
        logger.info("calibration: %d samples of %d tokens from %s", len(data.samples), data.seqlen, shown)
        return data

    def _probe(self) -> list[dict[str, torch.Tensor]]:
        most = smallest(self.source.config, "max_position_embeddings")
        return probe_samples(self.tokenizer, _vocab_size(self.source) or 2, most)

    def _capture_probe(
        self, job: Job, store: torch.device, journal: RunJournal | None
    ) -> tuple[list[dict[str, torch.Tensor]] | None, CapturedInputs | None]:
        """The probe's ids and inputs of the first block, where a check or calibration wants them. Before calibration
        it is found out whether the blocks can be run one at a time; a run that only rounds goes on without a probe
        where they cannot.

        Raises:
            ModelError, UnsupportedError: they cannot, and the run needs it.
        """
        if not (self.settings.verify or self.settings.needs_data):
            return None, None
        rehearse = self.settings.needs_data and not (journal is not None and journal.journal.units)
        ids = self._probe()
        try:
            return ids, self._capture(ids, store, job, rehearse=rehearse)
        except (ModelError, UnsupportedError) as error:
            if self.settings.needs_data:
                raise
            logger.warning("the saved model is checked without a forward pass: %s", error)
            return None, None

    def _capture(
        self, samples: list[dict[str, torch.Tensor]], store: torch.device, job: Job, spill: Spill | None = None,
        links: Links | None = None, rehearse: bool = False,
    ) -> CapturedInputs:  # fmt: skip
        dtype = compute_dtype(self.settings, self.source)
        return capture_inputs(
            self.source, samples, self.settings.device, store, dtype, spill, streams_experts(job), links, rehearse
        )


def _vocab_size(source: ModelSource) -> int | None:
    return largest(source.config, "vocab_size") or None
