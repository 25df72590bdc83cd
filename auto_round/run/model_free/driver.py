"""Driver of model-free runs: from settings to output folders, including resuming and several processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

from auto_round import envs
from auto_round.errors import ConfigError, ModelError, OutputError, Stopped, UnsupportedError
from auto_round.files import write_text
from auto_round.formats.base import OutputFormat, get_format
from auto_round.layer_config import scheme_from_entry
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
from auto_round.output.staging import FolderLock, Staging, all_files_present, is_lock_held, sync_and_hash
from auto_round.output.verify import check_tokenizer
from auto_round.output.writer import parse_size
from auto_round.report.memory import format_bytes, format_seconds
from auto_round.report.progress import make_progress
from auto_round.run.finalize import write_config, write_recipe, write_records, write_side_files
from auto_round.run.fingerprint import as_json, differences, fingerprint, is_up_to_date, run_digests, weight_files
from auto_round.run.folders import default_format, format_folders, missing_bytes, stale_files
from auto_round.run.journal import Journal
from auto_round.run.journal_files import raise_if_different, read_checked, write_checked
from auto_round.run.model_free.inputs import Inputs, open_inputs
from auto_round.run.model_free.unit_processor import UnitProcessor
from auto_round.run.model_free.units import Unit, plan_shards, plan_work, tensor_bytes
from auto_round.run.model_free.workers import Peers, ShardFile, Writes, run_units
from auto_round.run.plan import Job, MemoryPlan
from auto_round.run.planner import make_job
from auto_round.run.results import ModelWriter
from auto_round.run.saving import Runs
from auto_round.run.settings import Settings, check_whole_number

JOURNAL = ".journal"
"""Subfolder of the staging folder: identity of the run, a record of each output file, signals of processes."""
_RUN, _COMPLETE = "run.json", "complete.json"
_MAX_WORKERS = 8
_MEMORY = 4_000_000_000
_WITHOUT = "leave model_free out (--disable_model_free) for the regular flow"
# Parts of module names in vision and audio towers, and the reason why their layers are left unquantized.
_TOWERS = ("vision", "visual", "vision_tower", "vision_model", "audio_tower", "audio_model", "image_newline",
           "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio")  # fmt: skip
_TOWER = "it reads images or sound"


class ModelFreeOptions(NamedTuple):
    """Tensors that are processed at a time, bytes of all of them together, and index of this process and number of
    processes on a shared folder."""

    workers: int
    memory: int
    rank: int
    world: int


def model_free_options(parallelism: int | None = None, memory: int | None = None) -> ModelFreeOptions:
    """Options from the arguments and the environment variables of `torchrun`. Raises ConfigError for a bad value."""

    def number(name: str, default: int) -> int:
        text = os.environ.get(name, "").strip() or str(default)
        if not text.isdecimal():
            raise ConfigError(f"environment variable {name}={text!r} is no whole number")
        return int(text)

    if parallelism is not None:
        check_whole_number("parallelism", parallelism, 1)
    rank, world = number("RANK", 0), max(1, number("WORLD_SIZE", 1))
    if rank >= world:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usual = max(1, min(_MAX_WORKERS, cores // max(1, number("LOCAL_WORLD_SIZE", 1))))
    workers = parallelism or envs.get("AR_MODEL_FREE_SHARD_PARALLELISM") or usual
    return ModelFreeOptions(workers, memory or _MEMORY, rank, world)


def check_settings(settings: Settings) -> None:
    """Raise UnsupportedError when the settings need a model or calibration data."""
    schemes = {settings.scheme_name: settings.scheme}
    for name, entry in settings.layer_config.items():
        schemes[f"of layer {name}"] = scheme_from_entry(name, entry, settings.scheme)
    for name, scheme in schemes.items():
        why, quantizes, inputs = "", scheme.quantizes_weights, scheme.activations
        if name.upper().startswith("GGUF") or (quantizes and scheme.super_bits is not None):
            why = "GGUF types are not written from tensors alone;"
        elif quantizes and inputs is not None and inputs.calibrated:
            why = "the scales of its activations come from calibration data; set act_bits=16 (--act_bits 16) for its "
            why += "weights alone, or"
        elif quantizes and scheme.rotation_config is not None:
            why = "rotations change the weights of several layers at once;"
        if why:
            cannot = f"model-free mode cannot make scheme {name} ({scheme.describe()})"
            raise UnsupportedError(f"{cannot}: {why} {_WITHOUT}")
    for applies, reason in (
        (settings.on_nan == "keep", "plans every byte before it reads a weight, so on_nan=keep is not possible; name "
                                    f"the layers in ignore_layers, or {_WITHOUT}"),
        (settings.cache, "cannot make static scales of the key-value cache or of attention, which come from "
                         f"calibration data; {_WITHOUT}"),
        (settings.imatrix or settings.save_imatrix,
         "rounds to nearest, and importance files weight a search; leave one out"),
        (settings.tunes or settings.needs_data, f"rounds to nearest and neither tunes nor searches; {_WITHOUT}"),
    ):  # fmt: skip
        if applies:
            raise UnsupportedError(f"model-free mode {reason}")


@dataclass(frozen=True)
class ModelFree(Runs):
    """Model-free runs of a folder or hub id."""

    source: CheckpointSource
    inputs: Inputs
    options: ModelFreeOptions

    model_free: ClassVar[bool] = True

    @property
    def module(self) -> None:
        return None

    def plans(self, formats: Sequence[OutputFormat], output_dir: str | None) -> list[Job]:
        return [self._plan(formats, output_dir, replace(self.settings, strict=self.settings.strict is not False))]

    def plan_for(self, formats: Sequence[OutputFormat] | None) -> Job:
        return self._plan([get_format(default_format(self.settings))] if formats is None else formats)

    def to_memory(self, writers: Sequence[ModelWriter]) -> NoReturn:
        raise UnsupportedError(
            "quantize: model-free mode has no model in memory; quantize_and_save() writes the files, and "
            "Transformers opens them"
        )

    def _plan(
        self, formats: Sequence[OutputFormat], output_dir: str | None = None, settings: Settings | None = None
    ) -> Job:
        source, (workers, memory, *_) = self.source, self.options
        if output_dir is not None:
            reject_model_folder(Path(output_dir), source.folder)
        # max_memory limits the tensors that are processed at a time; there are no activations.
        job = make_job(replace(settings or self.settings, max_memory=None), source, formats, output_dir)
        towers = {
            name: replace(plan, reason=_TOWER)
            for name, plan in job.layers.items()
            if not plan.scheme.quantizes_weights and not plan.reason and not set(_TOWERS).isdisjoint(name.split("."))
        }
        job = replace(
            job, layers={**job.layers, **towers}, notes=(*job.notes, *self.inputs.files.notes), journal_bytes=0,
            memory_plan=MemoryPlan(),
            tensors_at_a_time=f"{workers} tensors at a time, at most {format_bytes(memory)} together",
        )  # fmt: skip
        largest = max((unit.memory for fmt in formats for unit in plan_work(job, source, fmt)[0]), default=0)
        return replace(job, peak_ram=max(largest, min(memory, workers * largest)), peak_vram=0)

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool = True,
        writers: Sequence[ModelWriter] = (),
    ) -> list[Path]:  # fmt: skip
        """Quantize and write the formats in order. Returns one folder per format."""
        root, (_, _, rank, world) = Path(output_dir).expanduser(), self.options
        folders = format_folders(root, formats)
        peers = [Peers(folder / PARTIAL / JOURNAL, rank, world) for folder in folders]
        job = self._plan(formats, output_dir)
        side_files(self.source.folder, self.settings.trust_remote_code)  # refuses links out of the folder early
        made = run_digests(job, self.settings, self.source, shard, None) if world == 1 else None
        if not overwrite and is_up_to_date(folders, made, self.settings):
            logger.info("%s holds the result of this command already; --overwrite makes it anew", root)
            return folders
        for note in job.notes:
            logger.warning("%s", note)
        stale = stale_files(root, folders)
        check_disk(output_dir, missing_bytes(job, root))
        for fmt, folder, others in zip(formats, folders, peers, strict=True):
            one = self._plan([fmt], output_dir) if len(formats) > 1 else job
            try:
                with explain_write_errors(folder, sum(job.bytes_on_disk.values())):
                    _FormatRun(self, one, fmt, folder, shard, others, made).write(overwrite, resume, stale[folder])
            except BaseException as error:
                others.signal_failure(error)
                if isinstance(error, KeyboardInterrupt):
                    text = f"stopped while {folder} was written; run the same command again to resume"
                    raise Stopped(text, getattr(error, "number", signal.SIGINT)) from error
                raise
        if root not in folders and rank == 0:
            remove_files(root, stale[root])
        self.inputs.close()
        return folders


class _FormatRun:
    """Writes one format into a folder. `made_from`: `run_digests`."""

    def __init__(
        self, free: ModelFree, job: Job, fmt: OutputFormat, folder: Path, shard: int | str, peers: Peers,
        made_from: Mapping[str, str] | None,
    ) -> None:  # fmt: skip
        self.settings, self.options, self.inputs, self.source = free.settings, free.options, free.inputs, free.source
        self.job, self.format, self.folder, self.shard = job, fmt, folder, shard
        self.peers, self.made_from = peers, made_from
        self.path, self.journal = folder / PARTIAL, folder / PARTIAL / JOURNAL
        self.units, self.layout = plan_work(job, self.source, fmt)
        self.shards = plan_shards(self.units, self.layout.tensors, self.inputs.shards, parse_size(shard))
        self.records = [self.journal / f"{i + 1:05d}.json" for i in range(len(self.shards))]
        self.processor = UnitProcessor(job, self.source, fmt, self.units, self.layout, self.settings)

    def write(self, overwrite: bool, resume: bool, stale: Sequence[str]) -> None:
        """Quantize, verify and publish in place of the `stale` files of an earlier run.

        Process 0 locks the folder for all processes. It holds a second lock once the files in the folder are those of
        this run: its identity alone may be of a killed run that process 0 is about to discard.
        """
        settings = fingerprint(self.job, self.settings, self.source, self.shard)
        identity = as_json({"settings": settings, "weights": weight_files(self.source)})
        run, complete, peers, started = self.journal / _RUN, self.journal / _COMPLETE, self.peers, time.monotonic()
        if peers.rank:
            begun = lambda: is_lock_held(peers.begun) and read_checked(run) == identity
            peers.wait(begun, "process 0 to begin", 600)
            if not complete.is_file():
                self._quantize(overwrite)
            write_text(peers.ready[peers.rank - 1], "")
            peers.wait(lambda: not run.is_file(), "process 0 to end")
            return
        ensure_output_folder(self.folder, overwrite=True)
        with Staging(self.folder) as stage:
            self._begin(stage, identity, overwrite, resume)
            with FolderLock(peers.begun, self.folder, patience=10):
                if not complete.is_file():
                    self._quantize(overwrite)
                peers.wait(lambda: all(file.is_file() for file in peers.ready), "the other processes")
                if not complete.is_file():
                    write_checked(complete, self._complete({"quantization": time.monotonic() - started}))
                stage.publish(read_checked(complete), stale)
        logger.info("saved %s", self.folder)

    def _begin(self, stage: Staging, identity: Any, overwrite: bool, resume: bool) -> None:
        """Resume the run in the folder, or start a new one. Raises ConfigError when it is another run."""
        try:
            before = read_checked(self.journal / _RUN) if resume else None
            complete = read_checked(self.journal / _COMPLETE)
        except OutputError:
            if not overwrite and resume:
                raise
            before = complete = None
        for file in self.peers.ready:
            file.unlink(missing_ok=True)
        if before == identity:
            logger.info("resuming the unfinished run in %s", self.folder)
            if complete is not None and not all_files_present(self.folder, complete):
                (self.journal / _COMPLETE).unlink(missing_ok=True)
            return
        if before is not None and not overwrite:
            raise_if_different(self.folder, differences(before, identity))
        ensure_output_folder(self.folder, overwrite)
        Journal(self.folder).remove()  # of a regular run, whose files are removed
        stage.clear(keep={JOURNAL})
        self.journal.mkdir(exist_ok=True)
        for file in self.journal.glob("*.json"):
            file.unlink()
        write_checked(self.journal / _RUN, identity)

    def _quantize(self, replace: bool) -> None:
        """Write the output files of this process that an earlier run did not finish. `replace`: see `ShardFile`."""
        started, workers = time.monotonic(), self.options.workers
        own = self.peers.share([shard.size for shard in self.shards])
        open_file = lambda i: ShardFile(self.shards[i], self.path, self.records[i], self.settings.verify, replace)
        with ThreadPoolExecutor(workers) as pool:  # it hashes finished files
            files = [file for file in pool.map(open_file, own) if file.missing]
        todo = {self.units[number]: (number, file) for file in files for number in file.missing}
        progress = make_progress(f"model-free {self.job.scheme_name}")
        commits: list[Future[None]] = []

        def commit(file: ShardFile, pending: Mapping[int, Writes]) -> None:
            if file.commit(pending, dict(self.processor.digests)):
                progress.block(file.shard.name)

        def process(unit: Unit) -> None:
            number, file = todo[unit]
            pending = file.write(number, self.processor.chunks(unit))
            if pending:
                commits.append(committer.submit(commit, file, pending))
            for ended in [future for future in commits if future.done()]:
                ended.result()
            self.inputs.done(unit)

        progress.start(len(files))
        try:
            with self.inputs.serve(todo), ThreadPoolExecutor(1, "model-free-sync") as committer:
                run_units(todo, process, workers, self.options.memory, self.inputs.before)
            for ended in commits:
                ended.result()
        finally:
            progress.finish()
            for file in files:
                file.close()
        if todo:
            seconds, size = format_seconds(time.monotonic() - started), sum(file.shard.size for file in files)
            logger.info("%d tensors in %s, %s written", len(todo), seconds, format_bytes(size))

    def _complete(self, seconds: dict[str, float]) -> dict[str, str]:
        """Write everything beside the weights, and verify. Returns SHA-256 of all files by name."""
        settings, source, folder, started = self.settings, self.source, self.path, time.monotonic()
        trusted, tensors = settings.trust_remote_code, self.layout.tensors
        write_side_files(folder, source, None, trusted)
        write_config(folder, source, self.job, self.format, trusted)
        if len(self.shards) > 1:
            place = dict(sorted((name, shard.name) for shard in self.shards for name in shard.offsets))
            index = {"metadata": {"total_size": sum(tensor_bytes(tensors[n]) for n in place)}, "weight_map": place}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        records = [read_checked(path) for path in self.records]
        sums = {shard.name: record["sha256"] for shard, record in zip(self.shards, records, strict=True)}
        verified = None
        if settings.verify:
            digests = {name: digest for record in records for name, digest in record["digests"].items()}
            verified = {
                "passed": True, "tensors": len(tensors), "layers": self.processor.check_samples(folder, digests),
                "loss_in_memory": None, "loss_reopened": None,
                "tokenizer": check_tokenizer(folder, source.folder, None, trusted),
            }  # fmt: skip
            seconds["verify"] = time.monotonic() - started
        write_recipe(folder, settings, self.job, self.shard)
        write_records(
            folder, self.job, settings, self.format, (), seconds, sums, verified, None, made_from=self.made_from
        )
        return sync_and_hash(folder, sums)


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
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError("model_free=True reads the files of a folder or hub id; give its name, not a model object")
    name, budget = os.fspath(model), settings.max_memory
    try:
        options = model_free_options(parallelism, None if budget is None else budget.ram)
        check_settings(settings)
        inputs = open_inputs(name, settings, options.rank)
        source = open_meta_source(inputs.folder, dtype=settings.model_dtype, name_or_path=name, files=inputs.files)
    except (UnsupportedError, ModelError) as error:
        if wanted is True:
            raise
        logger.info("using the regular flow: %s", error)
        return None
    if source.stored_as:
        logger.info("the model is quantized already (%s); it is dequantized while it is read", source.stored_as)
    return ModelFree(source, settings, None, inputs, options)
