"""Resume state of one run: whether it can be resumed, which blocks are done, and how to record another."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from auto_round.calib_dataset import CalibrationData
from auto_round.calibration.capture import CapturedInputs
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import ConfigError, OutputError, Stopped
from auto_round.formats.base import OutputFormat
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource
from auto_round.output.folders import PARTIAL
from auto_round.output.staging import Staging, all_files_present
from auto_round.run.fingerprint import (
    PER_EXPERT,
    as_json,
    block_checksum,
    differences,
    format_differences,
    non_block_checksum,
    samples_digest,
    tensors_checksum,
)
from auto_round.run.journal import Journal, journal_folder
from auto_round.run.plan import Job
from auto_round.run.unit_state import Unit, unit_from_state, unit_state
from auto_round.run.writers import FileOutput

VERSION = 2
"""Version of the journal's content."""


class Background:
    """One thread that runs tasks in order. After a failed task it runs no others; the next call raises the error,
    once."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None
        self._failed = False
        self._error: BaseException | None = None

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Queue a task."""
        self._raise_pending_error()
        self._last = self._pool.submit(self._run_task, task)
        return self._last

    def wait(self, task: Future[None] | None = None) -> None:
        """Wait until this task, or all tasks, are done."""
        last = self._last if task is None else task
        if last is not None:
            last.result()
        self._raise_pending_error()

    def close(self) -> None:
        """Wait for all tasks and end the thread. Their error is dropped: `wait` raises it."""
        self._pool.shutdown(wait=True)

    def _run_task(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException as error:
            self._failed, self._error = True, error

    def _raise_pending_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


class NoJournal:
    """The journal of a run that cannot be resumed: it records nothing, and removes one of an earlier run.

    Attributes:
        output: the run's output folder; None for a run that leaves a journal alone.
        journal: the files of a journal; here, what an earlier run has left.
    """

    def __init__(self, output: Path | None = None) -> None:
        self.output = output
        self.journal = Journal(journal_folder(output or Path()))
        if output is not None:
            with suppress(OutputError):
                self.journal.load()

    @property
    def finished(self) -> int:
        """Number of units that were finished when this run began."""
        return 0

    @property
    def done(self) -> Mapping[str, Mapping[str, str]]:
        """By format, SHA-256 by file name of its complete and checked folder."""
        return {}

    @property
    def continues(self) -> bool:
        """Whether an interrupted run has finished units."""
        return False

    def missing_bytes(self, job: Job) -> int:
        """Disk space that it still needs."""
        return 0

    def own_files(self, fmt: OutputFormat, folder: Path) -> Iterable[str]:
        """Files of a format's folder that an interrupted run has made."""
        # A complete folder is checked by its report.json.
        return self.journal.done.get(fmt.name, ()) if (folder / PARTIAL).is_dir() else ()

    def open(self, late: Callable[[], Mapping[str, Any]], source: ModelSource, outputs: Sequence[FileOutput]) -> None:
        if self.output is not None:
            self.journal.remove()
        for output in outputs:
            output.begin()

    def unit(self, index: int) -> Unit:
        raise LookupError(f"unit {index}: this run has no journal")

    def checksum(self, source: ModelSource, block: str | None = None) -> int:
        """Checksum of the weights of a block, or of those outside the blocks."""
        return 0

    def submit_streams(self, streams: Mapping[str, torch.Tensor | DiskTensor]) -> None:
        pass

    def add(self, name: str, unit: Unit, weights: int) -> None:
        pass

    def wait_until_written(self, *kinds: str) -> None:
        pass

    def wait(self) -> None:
        pass

    def complete(self, name: str, files: Mapping[str, str]) -> None:
        pass

    def finished_units(self) -> int:
        return 0

    def finish(self, keep_record: bool) -> None:
        pass

    def close(self) -> None:
        pass


class RunJournal(NoJournal):
    """Resume state of one run: whether it can be resumed, which units are done, and how to record another.

    Args:
        output: the run's output folder.
        replace: start anew when the journal is damaged or of another run.
    """

    def __init__(self, output: Path, replace: bool) -> None:
        super().__init__(output)
        self.replace = replace
        self._run: dict[str, Any] = {}
        self._background: Background | None = None
        self._tasks: dict[str, Future[None]] = {}
        self._written: dict[str, list[Any]] = {}
        self._submitted: set[str] = set()
        self._opened = False
        self._outputs: list[FileOutput] = []
        self._units: list[Unit] = []

    @property
    def finished(self) -> int:
        return len(self._units)

    @property
    def done(self) -> Mapping[str, Mapping[str, str]]:
        return self.journal.done

    @property
    def continues(self) -> bool:
        return bool(self.journal.units)

    def missing_bytes(self, job: Job) -> int:
        return max(0, job.journal_bytes - self.journal.nbytes())

    def own_files(self, fmt: OutputFormat, folder: Path) -> Iterable[str]:
        return self.journal.done.get(fmt.name, ())

    def checksum(self, source: ModelSource, block: str | None = None) -> int:
        return non_block_checksum(source) if block is None else block_checksum(source, block)

    def check_compatible(
        self, fixed: Mapping[str, Any], files: Mapping[str, list[Any]], layout: Mapping[str, Any] | None = None
    ) -> None:
        """Load the journal and compare it with this run, without writing anything.

        Args:
            fixed: `fingerprint`.
            files: `weight_files`.
            layout: what else decides how the output files are laid out.

        Raises:
            ConfigError: the interrupted run differs.
            OutputError: its journal is damaged.
        """
        layout = as_json({**(layout or {}), "version of the journal": VERSION})
        self._run = {"settings": dict(fixed), "weights": as_json(files), "layout": layout}
        try:
            self.journal.load()
            if self.journal.is_empty:
                return
            before = self.journal.run
            found = differences(before.get("layout", {}), layout)
            found += differences(before.get("settings"), self._run["settings"])
            self._raise_if_different(found + _other_files(before.get("weights"), self._run["weights"]))
            self.journal.check()
        except (ConfigError, OutputError) as error:
            if not self.replace:
                raise
            self._start_over(error)

    def open(self, late: Callable[[], Mapping[str, Any]], source: ModelSource, outputs: Sequence[FileOutput]) -> None:
        """Open the journal for writing, after comparing data and weights with the interrupted run, and begin the
        outputs, or continue them after the last finished unit.

        Weights are compared only if a weight file is not the same file any more.

        Args:
            late: returns `data_fingerprint`.

        Raises:
            ConfigError: the data or the weights differ.
            OutputError: the journal cannot be written, or the unfinished files are damaged.
        """
        self._run["late"] = as_json(late())
        self._outputs = list(outputs)
        if not self.journal.is_empty:
            try:
                self._raise_if_different(self._late_differences(source))
                self._units = [unit_from_state(*self.journal.unit(index)) for index in range(len(self.journal.units))]
                if self._units:
                    self._begin(outputs)
            except (ConfigError, OutputError) as error:
                if not self.replace:
                    raise
                self._start_over(error)
        if self.journal.is_empty:
            self.journal.begin(self._run)
        if not self._units:
            self._begin(outputs)
        self.journal.remove_uncommitted()
        self._opened = True
        self._background = Background("journal")

    def _begin(self, outputs: Sequence[FileOutput]) -> None:
        for output in outputs:
            output.begin([unit.marks[output.format.name] for unit in self._units])

    def _late_differences(self, source: ModelSource) -> list[str]:
        """Differences in the data, and in the weights if they may differ."""
        before = dict(self.journal.run["late"])
        if self._run["late"]["smoke_sample"] is None:  # this run does not verify: it needs no smoke sample
            before["smoke_sample"] = None
        found = differences(before, self._run["late"])
        if self.journal.run["weights"] != self._run["weights"]:
            found += self._other_weights(source)
        return found

    def unit(self, index: int) -> Unit:
        """A finished unit."""
        return self._units[index]

    def submit_streams(self, streams: Mapping[str, torch.Tensor | DiskTensor]) -> None:
        """Start writing streams after the current unit, unless they were submitted already. Their values must not
        change before `wait_until_written`."""
        assert self._background is not None

        def write(kind: str, hidden: torch.Tensor | DiskTensor) -> None:
            self._written[kind] = self.journal.write_stream(kind, hidden)

        for kind, hidden in streams.items():
            if kind not in self._submitted:
                self._tasks[kind] = self._background.submit(partial(write, kind, hidden))
                self._submitted.add(kind)

    def add(self, name: str, unit: Unit, weights: int) -> None:
        """Record a finished unit that was given to the outputs, with the streams submitted for it, in the background.
        It is valid when all of its files, and its part of the output files, are on disk.

        `weights`: checksum of its original weights.

        Raises OutputError when something could not be written.
        """
        assert self._background is not None
        unit.marks = {output.format.name: output.mark() for output in self._outputs}
        state = unit_state(unit)

        def commit() -> None:
            for output in self._outputs:
                output.writer.sync()
            record = self.journal.write_unit(name, *state, weights)
            written, self._written = self._written, {}
            self.journal.commit(record, written)

        self._submitted.clear()
        self._background.submit(commit)

    def wait_until_written(self, *kinds: str) -> None:
        """Wait until the journal has written these streams. Raises OutputError when something could not be
        written."""
        if self._background is not None:
            for task in [self._tasks.pop(kind) for kind in kinds if kind in self._tasks]:
                self._background.wait(task)

    def wait(self) -> None:
        """Wait until everything is on disk. Raises OutputError when it cannot be written."""
        if self._background is not None:
            self._background.wait()

    def complete(self, name: str, files: Mapping[str, str]) -> None:
        """Record that a format's folder is complete and checked, before it is published."""
        self.journal.complete(name, files)

    def finished_units(self) -> int:
        """Number of finished units, after pending writes have ended or failed."""
        with suppress(OutputError):
            self.wait()
        return len(self.journal.units)

    def finish(self, keep_record: bool) -> None:
        """End the run. `keep_record`: leave a record of its folders for the other runs of the same command."""
        if keep_record:
            self.journal.drop_units()
        else:
            self.journal.remove()

    def close(self) -> None:
        """Stop writing. A journal without finished units is removed."""
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._opened and self.journal.is_empty:
            self.journal.remove()

    def _raise_if_different(self, found: list[str]) -> None:
        if found:
            raise ConfigError(
                f"output folder {self.output} holds an interrupted run that differs: {format_differences(found)}; give "
                "the same settings to resume it, choose another folder, or start anew with --overwrite or --no_resume "
                "(overwrite=True or resume=False)"
            )

    def _start_over(self, error: Exception) -> None:
        logger.warning("starting anew: %s", error)
        self.journal.remove()
        self._units = []

    def _other_weights(self, source: ModelSource) -> list[str]:
        """Finished units whose weights differ from those that were quantized."""
        logger.info("the model's files are not the same files: comparing the weights of the finished blocks")
        units, blocks = self.journal.units, source.blocks
        found = [
            f"weights of {name}: other values than then"
            for unit, name in zip(units, blocks, strict=False)
            if block_checksum(source, name) != unit["weights"]
        ]
        if len(units) > len(blocks) and units[-1]["weights"] != non_block_checksum(source):
            found.append("weights outside the blocks: other values than then")
        return found


@dataclass(frozen=True)
class PreviousExpertMode:
    """How an interrupted run tunes experts: one at a time (`per_expert`) or with their block. `settings`: its
    fingerprint."""

    per_expert: bool
    settings: Mapping[str, Any]

    def differs(self, fixed: Mapping[str, Any]) -> bool:
        """Whether a fingerprint differs from this run's, apart from the shard size, which is not known yet."""
        ignored = {"max_shard_size": ""}
        return differences({**self.settings, **ignored}, {**as_json(fixed), **ignored}) != []


def previous_expert_mode(output: Path) -> PreviousExpertMode | None:
    """The expert mode of the interrupted run into this folder; None when there is none, or no experts are tuned."""
    journal = Journal(journal_folder(output))
    with suppress(OutputError):
        journal.load()
    settings = {} if journal.is_empty else journal.run.get("settings", {})
    found = settings.get("experts")
    return None if found is None else PreviousExpertMode(found == PER_EXPERT, settings)


def remove_journal(output: Path) -> None:
    """Remove the journal of runs into this folder from the work space."""
    Journal(journal_folder(output)).remove()


def _other_files(before: Any, now: Mapping[str, list[Any]]) -> list[str]:
    """Weight files with another size or header, which cannot hold the same weights. Their times may differ."""
    before = before if isinstance(before, dict) else {}
    found = []
    for name in sorted({*before, *now}):
        one, other = before.get(name), now.get(name)
        if one is None or other is None:
            found.append(f"weight file {name}: {'not there' if one is None else 'there'} then")
        elif one[0] != other[0]:
            found.append(f"weight file {name}: {one[0]} bytes then, {other[0]} now")
        elif one[2] != other[2]:
            found.append(f"weight file {name}: another header then")
    return found


def publish_if_complete(fmt: OutputFormat, stage: Staging, journal: NoJournal, stale: Iterable[str] = ()) -> bool:
    """Publish a folder that was complete and checked before the run was interrupted, in place of the `stale` files of
    an earlier run. Returns whether it was."""
    files = journal.done.get(fmt.name)
    if files is None or not all_files_present(stage.folder, files):
        return False
    stage.publish(files, stale)
    logger.info("%s is complete already", stage.folder)
    return True


def data_fingerprint(
    data: CalibrationData | None,
    smoke_sample: Sequence[Mapping[str, torch.Tensor]] | None,
    calibration: CapturedInputs | None,
) -> dict[str, Any]:
    """Digests of everything that changes the result and is known only after the data is read."""
    return {
        "calibration data": None if data is None else samples_digest(data.samples),
        "smoke_sample": None if smoke_sample is None else samples_digest(smoke_sample),
        "inputs of the first block": None if calibration is None else tensors_checksum([calibration.hidden]),
    }


def resume_message(finished: int, blocks: int) -> str:
    """The log message of a resumed run."""
    done = f"{finished} of {blocks}" if finished < blocks else "all"
    return f"resuming the interrupted run: {done} blocks are done"


@contextmanager
def checkpointing(journal: NoJournal, blocks: int, blocks_done: Callable[[], int | None]) -> Iterator[None]:
    """Write pending journal entries when a run is interrupted, and tell the user; Ctrl-C becomes `Stopped`.

    Args:
        blocks: number of blocks of the model.
        blocks_done: number of finished ones; None before the first is begun.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        done = blocks_done()
        where = "before the first block"
        if done is not None:
            where = f"in block {done + 1} of {blocks}" if done < blocks else "after the last block"
        then = "run the same command again to resume" if journal.finished_units() else "the same command starts anew"
        raise Stopped(f"stopped {where}; {then}", getattr(stop, "number", signal.SIGINT)) from stop
    except Exception:
        if count := journal.finished_units():
            logger.info("%d finished blocks are saved; run the same command again to resume", min(count, blocks))
        raise


@contextmanager
def kept_for_resuming(outputs: Sequence[FileOutput], journal: NoJournal) -> Iterator[None]:
    """Close unfinished outputs when a run fails, and keep their files if it can be resumed."""
    try:
        yield
    except BaseException:
        resumable = journal.finished_units() > 0
        for output in outputs:
            output.close()
            output.stage.retain = output.stage.retain or resumable
        raise
