"""Resume state of one run: whether it can be resumed, which blocks are done, and how to record another."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from auto_round.run.unit_state import Unit, unit_from_state, unit_state


class Background:
    """One thread that does tasks in order. After one that fails it does no more; the error is raised by the next call
    here, once."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None
        self._failed = False
        self._error: BaseException | None = None

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Do this after the tasks before it."""
        self._raise_pending_error()
        self._last = self._pool.submit(self._run_task, task)
        return self._last

    def wait(self, task: Future[None] | None = None) -> None:
        """Until this task is done, or all are."""
        last = self._last if task is None else task
        if last is not None:
            last.result()
        self._raise_pending_error()

    def close(self) -> None:
        """Wait, and end the thread. An error is dropped: another one is on its way, or `wait` was called before."""
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


# The journal as a run uses it: may it be gone on with, what is finished, and what has just been finished.

_SIZE = "max_shard_size"


class RunJournal:
    """The journal of a run into one output folder.

    Args:
        output: the run's output folder.
        replace: start anew where the journal is damaged, or of another run.

    Attributes:
        finished: units that were finished when this run began, and need not be done again.
    """

    def __init__(self, output: Path, replace: bool) -> None:
        self.output, self.replace = output, replace
        self.journal = Journal(journal_folder(output))
        self._fixed: dict[str, Any] = {}
        self._files: dict[str, list[Any]] = {}
        self._background: Background | None = None
        self._tasks: dict[str, Future[None]] = {}
        self._written: dict[str, list[Any]] = {}
        self._submitted: set[str] = set()
        self._opened = False
        self.finished = 0

    @property
    def done(self) -> Mapping[str, Mapping[str, str]]:
        """SHA-256 by file name of each format's folder that is complete and checked."""
        return self.journal.done

    def check_compatible(self, fixed: Mapping[str, Any], files: Mapping[str, list[Any]]) -> None:
        """Read what is there and compare it with this run; nothing is written yet.

        Args:
            fixed: `fingerprint`.
            files: `weight_files`.

        Raises:
            ConfigError: the interrupted run was another one.
            OutputError: its journal is damaged.
        """
        self._fixed, self._files = dict(fixed), as_json(files)
        try:
            self.journal.load()
            if self.journal.is_empty:
                return
            before = self.journal.run
            found = differences(before.get("settings"), self._fixed) + _other_files(before.get("weights"), self._files)
            self._raise_if_different(found)
            self.journal.check()
        except (ConfigError, OutputError) as error:
            if not self.replace:
                raise
            self._start_over(error)

    def open(self, late: Mapping[str, Any], source: ModelSource) -> None:
        """What is known only when the data has been read: begin, or make sure that the interrupted run was this one.

        Where a weight file is not the same file, the weights that were used until now are compared with it.

        Raises:
            ConfigError: the data or the weights were others.
            OutputError: the journal cannot be written.
        """
        values = as_json(late)
        if not self.journal.is_empty:
            try:
                before = dict(self.journal.run["late"])
                if values["smoke_sample"] is None:  # it was to check the files with, which is not wanted any more
                    before["smoke_sample"] = None
                found = differences(before, values)
                if self.journal.run["weights"] != self._files:
                    found += self._other_weights(source)
                self._raise_if_different(found)
            except ConfigError as error:
                if not self.replace:
                    raise
                self._start_over(error)
        if self.journal.is_empty:
            self.journal.begin({"settings": self._fixed, "weights": self._files, "late": values})
        self.journal.remove_uncommitted()
        self._opened = True
        self.finished = len(self.journal.units)
        self._background = Background("journal")

    def unit(self, index: int, device: torch.device, in_file: bool = False) -> Unit:
        """A finished unit; its layers are read as they are reached if `in_file`. Raises OutputError when its file is
        damaged."""
        return unit_from_state(*self.journal.unit(index, in_file), device)

    def stream(self, kind: str) -> torch.Tensor:
        """Hidden states after the last finished unit: "full", "quantized" or "probe"."""
        return self.journal.stream(kind)

    def stream_into(self, kind: str, target: DiskTensor) -> None:
        """The same into a file."""
        self.journal.stream_into(kind, target)

    def keep(self, kind: str, hidden: torch.Tensor | DiskTensor) -> None:
        """Begin to write a stream as it is after the unit that is in work. Its values must not change before
        `wait_until_written(kind)`."""
        assert self._background is not None

        def write() -> None:
            self._written[kind] = self.journal.write_stream(kind, hidden)

        self._tasks[kind] = self._background.submit(write)
        self._submitted.add(kind)

    def add(self, name: str, unit: Unit, weights: int, streams: Mapping[str, torch.Tensor | DiskTensor]) -> None:
        """A unit is finished. It is written beside what comes next, and counts when all of it is on the disk.

        Args:
            weights: checksum of the weights that it was made from.
            streams: hidden states after it by kind, with those that `keep` was given. They must not change before
                `wait_until_written`.

        Raises OutputError when something could not be written.
        """
        assert self._background is not None
        left, made = [unit], []  # the unit is given up as soon as it is written

        def write() -> None:
            made.append(self.journal.write_unit(name, *unit_state(left.pop()), weights))

        kinds = tuple(streams)

        def commit() -> None:
            written, self._written = self._written, {}
            self.journal.commit(made[0], {kind: written[kind] for kind in kinds})

        self._tasks["unit"] = self._background.submit(write)
        for kind in kinds:
            if kind not in self._submitted:
                self.keep(kind, streams[kind])
        self._submitted.clear()
        self._background.submit(commit)

    def wait_until_written(self, *kinds: str) -> None:
        """Until these streams, or "unit", the last unit, are not read any more. Raises OutputError when something
        could not be written."""
        if self._background is not None:
            for task in [self._tasks.pop(kind) for kind in kinds if kind in self._tasks]:
                self._background.wait(task)

    def wait(self) -> None:
        """Until all is on the disk. Raises OutputError when it cannot be written."""
        if self._background is not None:
            self._background.wait()

    def complete(self, name: str, files: Mapping[str, str]) -> None:
        """A format's folder is whole and checked, and about to be shown."""
        self.journal.complete(name, files)

    def kept(self) -> int:
        """Finished units, once what is under way is on the disk or has failed."""
        with suppress(OutputError):
            self.wait()
        return len(self.journal.units)

    def finish(self, keep: bool) -> None:
        """The run is over. `keep`: it is one of several, and is to be recognised when they are gone on with."""
        if keep:
            self.journal.drop_units()
        else:
            self.journal.remove()

    def close(self) -> None:
        """Stop writing. A journal in which nothing is finished is removed."""
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._opened and self.journal.is_empty:
            self.journal.remove()

    def _raise_if_different(self, found: list[str]) -> None:
        if found:
            raise ConfigError(
                f"output folder {self.output} holds an interrupted run that differs: "
                f"{format_differences(found)}; give the same "
                "settings to go on with it, choose another folder, or start anew with --overwrite or --no_resume "
                "(overwrite=True or resume=False)"
            )

    def _start_over(self, error: Exception) -> None:
        logger.warning("starting anew: %s", error)
        self.journal.remove()

    def _other_weights(self, source: ModelSource) -> list[str]:
        """Finished blocks whose weights are not those that were read then."""
        logger.info("the model's files are not the same files: comparing the weights of the finished blocks")
        found = []
        for unit, name in zip(self.journal.units, source.blocks, strict=False):
            if block_checksum(source, name) != unit["weights"]:
                found.append(f"weights of {name}: other values than then")
        if len(self.journal.units) > len(source.blocks) and self.journal.units[-1]["weights"] != non_block_checksum(
            source
        ):
            found.append("weights outside the blocks: other values than then")
        return found


@dataclass(frozen=True)
class PreviousExpertMode:
    """How an interrupted run has gone about experts: `per_expert`, one at a time, or with their block. `settings`: its
    fingerprint."""

    per_expert: bool
    settings: Mapping[str, Any]

    def differs(self, fixed: Mapping[str, Any]) -> bool:
        """Whether a run of this fingerprint is another one; the size of files, which is not known yet, left out."""
        return differences({**self.settings, _SIZE: ""}, {**as_json(fixed), _SIZE: ""}) != []


def previous_expert_mode(output: Path) -> PreviousExpertMode | None:
    """Of the interrupted run into this folder; None where there is none, or it has no experts to tune."""
    journal = Journal(journal_folder(output))
    with suppress(OutputError):
        journal.load()
    settings = {} if journal.is_empty else journal.run.get("settings", {})
    found = settings.get("experts")
    return None if found is None else PreviousExpertMode(found == PER_EXPERT, settings)


def remove_journal(output: Path) -> None:
    """Forget what an interrupted run into this folder left in the work space."""
    Journal(journal_folder(output)).remove()


def _other_files(before: Any, now: Mapping[str, list[Any]]) -> list[str]:
    """Weight files that cannot hold the same weights: another size or header. Their times may differ."""
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


# What a run says and keeps when it begins again, and when it is stopped.


def publish_if_complete(
    fmt: OutputFormat, stage: Staging, journal: RunJournal | None, stale: Iterable[str] = ()
) -> bool:
    """Whether a folder was complete and checked before the run was interrupted; if so it is shown, in the place of the
    `stale` files of an earlier run."""
    files = None if journal is None else journal.done.get(fmt.name)
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
    """What decides the result and is known only when the data has been read."""
    return {
        "calibration data": None if data is None else samples_digest(data.samples),
        "smoke_sample": None if smoke_sample is None else samples_digest(smoke_sample),
        "inputs of the first block": None if calibration is None else tensors_checksum([calibration.hidden]),
    }


def resume_message(finished: int, blocks: int) -> str:
    """Where a run goes on, in words."""
    if finished < blocks:
        return f"going on with the interrupted run: {finished} of {blocks} blocks are done"
    return "going on with the interrupted run: all blocks are done"


@contextmanager
def checkpointing(journal: RunJournal | None, blocks: int, blocks_done: Callable[[], int | None]) -> Iterator[None]:
    """Keep what is finished whatever happens, and say so; Ctrl-C becomes `Stopped`, which says where it was.

    Args:
        blocks: of the model.
        walked: how many of them are done; None before the first is begun.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        done = blocks_done()
        where = "before the first block"
        if done is not None:
            where = f"in block {done + 1} of {blocks}" if done < blocks else "after the last block"
        kept = journal is not None and journal.kept() > 0
        then = "the same command goes on from there" if kept else "the same command starts anew"
        raise Stopped(f"stopped {where}; {then}", getattr(stop, "number", signal.SIGINT)) from stop
    except Exception:
        if journal is not None and (count := journal.kept()):
            logger.info("%d finished blocks are kept; the same command goes on from there", min(count, blocks))
        raise
