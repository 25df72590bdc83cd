"""Driver of model-free runs: from settings to output folders, including resuming and several processes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from auto_round._version import __version__
from auto_round.errors import ConfigError, ModelError, OutputError, Stopped, UnsupportedError
from auto_round.files import write_text
from auto_round.formats.base import OutputFormat, get_format
from auto_round.logger import logger
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.files.folder import side_files
from auto_round.modeling.meta_model import open_meta_source
from auto_round.output.folders import (
    PARTIAL,
    check_disk,
    ensure_output_folder,
    explain_write_errors,
    reject_model_folder,
    remove_files,
)
from auto_round.output.staging import FolderLock, is_lock_held
from auto_round.output.verify import check_tokenizer
from auto_round.output.writer import parse_size
from auto_round.plugins import loaded_plugins
from auto_round.report.memory import format_bytes, format_seconds
from auto_round.report.progress import make_progress
from auto_round.run.finalize import write_config, write_recipe, write_records, write_side_files
from auto_round.run.fingerprint import as_json, differences, digest_parts, is_up_to_date
from auto_round.run.folders import default_format, format_folders, stale_files
from auto_round.run.model_free.inputs import HubFetcher, Inputs, open_inputs
from auto_round.run.model_free.journal import BEGUN, FOLDER, LOCK, Journal, manifest_of
from auto_round.run.model_free.plan import (
    ModelFreeJob,
    ModelFreeOptions,
    check_settings,
    model_free_job,
    model_free_options,
)
from auto_round.run.model_free.shards import Layout, file_digest, index_text, plan_layout
from auto_round.run.model_free.unit_processor import UnitProcessor, check_layers, sample_layers
from auto_round.run.model_free.units import Unit, WorkPlan, plan_work
from auto_round.run.model_free.workers import (
    ShardRun,
    all_ready,
    assigned_shards,
    clear_failures,
    failures,
    mark_ready,
    raise_failures,
    run_units,
    wait_until,
    write_failure,
)
from auto_round.run.plan import Job
from auto_round.run.results import ModelWriter
from auto_round.run.settings import Settings


@dataclass
class ModelFree:
    """A model-free run: rounds a checkpoint tensor by tensor.

    Args:
        model: folder or hub id.
        dtype: of the unquantized weights; None is the checkpoint's own.
        fetcher: downloads the files of `model`; None for a folder, or the hub's client.

    Raises:
        UnsupportedError: the settings need a model or calibration data.
    """

    model: str
    settings: Settings
    options: ModelFreeOptions
    dtype: Any = None
    fetcher: HubFetcher | None = None
    _opened: tuple[Inputs, CheckpointSource] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_settings(self.settings)

    model_free: ClassVar[bool] = True
    module: ClassVar[None] = None

    @property
    def blocks(self) -> tuple[str, ...]:
        return self.source().blocks

    def copy(self) -> ModelFree:
        return self

    def model_writers(self, packs: bool) -> list[ModelWriter]:
        return []

    def plans(self, formats: Sequence[OutputFormat], output_dir: str | None) -> list[Job]:
        """The plan of the run. A layer name that matches nothing is an error, unless `strict` is False."""
        strict = replace(self.settings, strict=self.settings.strict is not False)
        return [replace(self, settings=strict).plan(formats, output_dir)]

    def plan_for(self, formats: Sequence[OutputFormat] | None) -> Job:
        return self.plan([get_format(default_format(self.settings))] if formats is None else formats)

    def to_memory(self, writers: Sequence[ModelWriter]) -> NoReturn:
        raise UnsupportedError(
            "quantize: model-free mode has no model in memory; quantize_and_save() writes the files, and "
            "Transformers opens them"
        )

    def source(self) -> CheckpointSource:
        """The opened checkpoint; only its configuration and headers are read."""
        return self._open()[1]

    def _open(self) -> tuple[Inputs, CheckpointSource]:
        if self._opened is None:
            inputs = open_inputs(self.model, self.settings, self.options.rank, self.fetcher)
            source = open_meta_source(inputs.folder, dtype=self.dtype, name_or_path=self.model, files=inputs.files)
            if source.stored_as:
                logger.info("the model is quantized already (%s); it is dequantized while it is read", source.stored_as)
            self._opened = inputs, source
        return self._opened

    def plan(self, formats: Sequence[OutputFormat], output_dir: str | None = None) -> ModelFreeJob:
        """Plan the job without running it."""
        inputs, source = self._open()
        if output_dir is not None:
            reject_model_folder(Path(output_dir), inputs.folder)
        return model_free_job(self.settings, source, formats, self.options, output_dir, inputs.notes)

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool = True,
        writers: Sequence[ModelWriter] = (),
    ) -> list[Path]:  # fmt: skip
        """Quantize and write the formats in order. Returns one folder per format.

        `resume`: resume the unfinished run in a folder; False starts anew.

        Raises:
            OutputError: the folder holds foreign files or an unfinished run that differs, or another run works on it.
            Stopped: by Ctrl-C.
        """
        root = Path(output_dir).expanduser()
        folders = format_folders(root, formats)
        earlier = {folder: failures(folder / FOLDER) for folder in folders}
        job = self.plan(formats, output_dir)
        side_files(self.source().folder, self.settings.trust_remote_code)  # refuses links out of the folder early
        made = None if self.options.world > 1 else self._run_digests(job, shard)
        if not overwrite and is_up_to_date(folders, made, self.settings):
            logger.info("%s holds the result of this command already; --overwrite makes it anew", root)
            for folder in folders:
                if not is_lock_held(folder / FOLDER / LOCK):  # left by a run that was killed after it had published
                    shutil.rmtree(folder / FOLDER, ignore_errors=True)
            return folders
        for note in job.notes:
            logger.warning("%s", note)
        stale = stale_files(root, folders)
        needed = sum(job.bytes_on_disk.values()) - sum(_finished_bytes(folder) for folder in folders)
        check_disk(output_dir, max(0, int(needed * 1.02)) + (1 << 20))
        for fmt, folder in zip(formats, folders, strict=True):
            one = self.plan([fmt], output_dir) if len(formats) > 1 else job
            # Processes that share the work share the folder: process 0 locks it for all of them.
            lock = FolderLock(folder / FOLDER / LOCK, folder) if self.options.rank == 0 else nullcontext()
            try:
                with explain_write_errors(folder, sum(job.bytes_on_disk.values())), lock:
                    self._write(one, fmt, folder, overwrite, shard, resume, earlier[folder], made)
            except KeyboardInterrupt as stop:
                self._record_failure(folder, stop)
                text = f"stopped while {folder} was written; run the same command again to resume"
                raise Stopped(text, getattr(stop, "number", signal.SIGINT)) from stop
            except BaseException as error:
                self._record_failure(folder, error)
                raise
            finally:
                with suppress(OSError):  # removes it only if it is empty
                    (folder / FOLDER).rmdir()
        if root not in folders and self.options.rank == 0:
            remove_files(root, stale[root])
        self._open()[0].close()
        self._opened = None
        return folders

    def _run_digests(self, job: ModelFreeJob, shard: int | str) -> Mapping[str, str]:
        """Digests of everything that changes the result."""
        settings = {
            **_result_settings(job, self.settings), "formats": job.formats, "max_shard_size": parse_size(shard),
            "version": __version__,
        }  # fmt: skip
        return digest_parts(settings, self._open()[0].identity(), "none")

    def _record_failure(self, folder: Path, error: BaseException) -> None:
        """Signal the failure to the other processes, so that they end too."""
        if self.options.world > 1:
            write_failure(folder / FOLDER, self.options.rank, error)

    def _write(
        self, job: ModelFreeJob, fmt: OutputFormat, folder: Path, overwrite: bool, shard: int | str, resume: bool,
        earlier: Collection[tuple[Path, int]], made: Mapping[str, str] | None,
    ) -> None:  # fmt: skip
        """Write one format. `earlier`: failure files of earlier runs."""
        inputs, source = self._open()
        rank, world = self.options.rank, self.options.world
        started = time.monotonic()
        work = plan_work(job, source, fmt)
        layout = plan_layout(work.units, work.tensors, inputs.shards, parse_size(shard))
        manifest = manifest_of(_result_settings(job, self.settings), inputs.identity(), layout)
        journal = Journal(folder)
        clear_failures(journal.folder, rank)
        with self._wait_for_start(journal, manifest, overwrite, resume, earlier):
            processor = UnitProcessor(job, source, fmt, work, self.settings.scale_dtype, self.settings.device)
            if self.settings.verify:
                processor = replace(processor, samples=sample_layers(processor))
            processor.use_buffer_pool()
            own = assigned_shards(layout, rank, world)
            before = {index for index in own if journal.has_digest(index)}
            self._quantize(job, work, layout, processor, journal, own, inputs)
            quantized = time.monotonic()
            self._check_files(layout, journal, own, before)
            if rank == 0:
                everything = range(len(layout.shards))
                wait_until(
                    lambda: all_ready(journal, world) and all(map(journal.has_digest, everything)),
                    lambda: _progress_of_others(journal.folder, earlier), "the other processes",
                )  # fmt: skip
                seconds = {"quantization": quantized - started}
                journal.publish(self._complete(job, fmt, layout, processor, journal, seconds, made, shard))
                journal.close()
                logger.info("saved %s", folder)
            else:

                def alive() -> int:
                    mark_ready(journal, rank)
                    return _progress_of_others(journal.folder, earlier)

                wait_until(lambda: not journal.is_open, alive, "process 0 to end")

    def _wait_for_start(
        self, journal: Journal, manifest: Mapping[str, Any], overwrite: bool, resume: bool,
        earlier: Collection[tuple[Path, int]],
    ) -> AbstractContextManager[object]:  # fmt: skip
        """Start the run, or wait until process 0 has started it. Process 0 holds a lock meanwhile, because the journal
        alone may be of a killed run that process 0 is about to discard."""
        begun = journal.folder / BEGUN
        if self.options.rank == 0:
            _begin_or_resume(journal, manifest, overwrite, resume)
            return FolderLock(begun, journal.output, patience=10) if self.options.world > 1 else nullcontext()
        wait_until(
            lambda: is_lock_held(begun) and journal.manifest() == as_json(manifest),
            lambda: raise_failures(journal.folder, earlier), "process 0 to begin", 600,
        )  # fmt: skip
        return nullcontext()

    def _quantize(
        self, job: ModelFreeJob, work: WorkPlan, layout: Layout, processor: UnitProcessor, journal: Journal,
        own: Sequence[int], inputs: Inputs,
    ) -> None:  # fmt: skip
        started = time.monotonic()
        progress = make_progress(f"model-free {job.scheme_name}")
        done: list[int] = []

        def finished(index: int, digest: str) -> None:
            journal.record_digest(index, digest)
            done.append(index)
            progress.block(layout.shards[index].name)

        run = ShardRun(layout, work.units, processor, journal, own, finished, compare=self.settings.verify)
        progress.start(len({index for index, _ in run.todo}))
        tasks = {id(work.units[number]): (index, number) for index, number in run.todo}
        units = [work.units[number] for _, number in run.todo]
        schedule = inputs.schedule(units)

        def process(unit: Unit) -> None:
            run.do(*tasks[id(unit)])
            schedule.done(unit)

        asked: set[str] = set()

        def before(position: int) -> None:
            schedule.before(position)
            processor.read_ahead(units[position], asked)

        well = False
        try:
            run_units(units, process, self.options.workers, self.options.memory, before)
            well = True
        finally:
            schedule.close()
            run.close(well)
            progress.finish()
        if units:
            size = sum(layout.shards[i].size for i in done)
            seconds = time.monotonic() - started
            logger.info("%d tensors in %s, %s written", len(units), format_seconds(seconds), format_bytes(size))

    def _check_files(self, layout: Layout, journal: Journal, own: Sequence[int], before: Collection[int]) -> None:
        """Check the files of this process that an earlier run finished: compare their digests with the recorded ones
        (`before`), or record them if that run was killed before it did."""

        def check(index: int) -> None:
            shard, recorded = layout.shards[index], journal.has_digest(index)
            if recorded and index not in before:
                return
            records = [] if recorded else [record for unit in journal.done(index).values() for record in unit]
            digest = file_digest(journal.whole / shard.name, shard, records, self.settings.verify and not recorded)
            if recorded:
                journal.check_finished(index, shard.name, digest)
            else:
                journal.record_digest(index, digest)

        with ThreadPoolExecutor(self.options.workers) as pool:
            list(pool.map(check, own))

    def _complete(
        self, job: ModelFreeJob, fmt: OutputFormat, layout: Layout, processor: UnitProcessor, journal: Journal,
        seconds: dict[str, float], made: Mapping[str, str] | None, shard: int | str,
    ) -> dict[str, str]:  # fmt: skip
        """Write everything beside the weights and verify. Returns SHA-256 of the weight files by name."""
        _, source = self._open()
        folder = journal.whole
        started = time.monotonic()
        write_side_files(folder, source, None, self.settings.trust_remote_code)
        write_config(folder, source, job, fmt, self.settings.trust_remote_code)
        if len(layout.shards) > 1:
            write_text(folder / "model.safetensors.index.json", index_text(layout, processor.work.tensors))
        verified = None
        if self.settings.verify:
            recorded = {k: v for i in range(len(layout.shards)) for k, v in journal.digests(i).items()}
            verified = {
                "passed": True, "tensors": len(processor.work.tensors),
                "layers": check_layers(folder, processor, recorded), "loss_in_memory": None, "loss_reopened": None,
                "tokenizer": check_tokenizer(folder, source.folder, None, self.settings.trust_remote_code),
            }  # fmt: skip
            seconds["verify"] = time.monotonic() - started
        sums = {file.name: journal.digest(i) or "" for i, file in enumerate(layout.shards)}
        write_recipe(folder, self.settings, job, shard)
        write_records(folder, job, self.settings, fmt, (), seconds, sums, verified, None, made_from=made)
        return sums


def _begin_or_resume(journal: Journal, manifest: Mapping[str, Any], overwrite: bool, resume: bool) -> None:
    """Resume the run in the folder, or start a new one.

    Raises OutputError when the folder holds another run, or foreign files.
    """
    if journal.is_open and not resume:
        journal.begin(manifest)
        return
    before, now = journal.manifest(), as_json(manifest)
    if before == now:
        logger.info("resuming the unfinished run in %s", journal.output)
        journal.resume_existing()
        return
    if before is not None and not overwrite:
        found = "; ".join(differences(before, now)[:3])
        raise OutputError(
            f"output folder {journal.output} holds an unfinished run that differs ({found}); finish that one with its "
            "own settings, choose another folder, or start anew with --overwrite or --no_resume (overwrite=True or "
            "resume=False)"
        )
    if before is None:
        journal.clear()  # files of a finished run
    folder = journal.output
    only_ours = folder.is_dir() and all(path.name.startswith(FOLDER) for path in folder.iterdir())
    ensure_output_folder(folder, overwrite or only_ours, {PARTIAL, FOLDER})
    journal.begin(manifest)


def _result_settings(job: ModelFreeJob, settings: Settings) -> dict[str, Any]:
    """Everything in a job that changes the bytes of the result."""
    values = job.to_dict()
    left_out = ("bytes_on_disk", "compute", "model")
    return {k: v for k, v in values.items() if k not in left_out} | {
        "dtype": str(job.settings.get("scale_dtype")), "device": settings.device.type,
        **{f"plugin {name}": version for name, version in loaded_plugins().items()},
    }  # fmt: skip


def _progress_of_others(folder: Path, earlier: Collection[tuple[Path, int]]) -> int:
    """A number that changes while some process writes; raises the failure of another process."""
    raise_failures(folder, earlier)
    try:
        return sum(path.stat().st_size + path.stat().st_mtime_ns for path in folder.iterdir())
    except OSError:
        return -1


def _finished_bytes(folder: Path) -> int:
    """Bytes that an unfinished run has written. Another process may be moving these files."""
    size = 0
    for path in (*(folder / FOLDER).glob("*.partial"), *(folder / FOLDER / "whole").glob("*.safetensors")):
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def open_model_free(model: Any, settings: Settings) -> ModelFree | None:
    """The model-free run, or None for the regular flow.

    Raises:
        ConfigError: options of this mode without it, or a model object.
        UnsupportedError, ModelError: the mode was requested and is impossible; with "auto" the regular flow is used.
    """
    wanted, parallelism = settings.config.tuning.model_free, settings.config.memory.parallelism
    if not wanted:
        if parallelism is not None:
            raise ConfigError("parallelism is an option of model-free mode; add model_free=True (--model_free)")
        return None
    try:
        if settings.imatrix is not None or settings.save_imatrix is not None:
            raise UnsupportedError(
                "model-free mode rounds to nearest, and importance files weight a search; leave one out"
            )
        budget = settings.max_memory
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(
                "model_free=True reads the files of a folder or hub id; give its name, not a model object"
            )
        own = model_free_options(parallelism, None if budget is None else budget.ram)
        free = ModelFree(os.fspath(model), settings, own, settings.model_dtype)
        free.source()
    except (UnsupportedError, ModelError) as error:
        if wanted is True:
            raise
        logger.info("using the regular flow: %s", error)
        return None
    return free
