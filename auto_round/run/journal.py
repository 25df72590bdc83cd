"""Journal of a run: checksummed, atomically written files of finished units and activation streams, to resume from.

    run.json                   the run's settings, data, weights and versions
    manifest.json              the valid files among those below, with their sizes and checksums
    unit-0003.safetensors      what was written of the fourth block, and its results (the last: non-block layers)
    full-0004.safetensors      the activations that the fifth block takes as input; also quantized-, smoke_sample-

Each file is written under a temporary name, synced to disk and renamed. The manifest is written after all files
that it names, and the activations before the last block are removed after it. So a kill at any moment leaves
either the state before or the state after.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round import envs
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import ConfigError, OutputError, Stopped
from auto_round.files import sync_folder
from auto_round.logger import logger
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.source import ModelSource
from auto_round.output.folders import PARTIAL
from auto_round.output.staging import Staging, all_files_present
from auto_round.output.writer import damaged_error
from auto_round.run import journal_files
from auto_round.run.fingerprint import as_json, differences, file_differences, weights_checksum

if TYPE_CHECKING:
    from auto_round.run.writers import FileOutput

VERSION = 3
"""Version of the journal's content."""
_RUN, _MANIFEST = "run.json", "manifest.json"


def journal_folder(output: Path) -> Path:
    """The journal folder of runs that write to `output`."""
    digest = hashlib.sha256(os.path.abspath(output.expanduser()).encode()).hexdigest()[:12]
    return envs.resume_folder() / "resume" / f"{output.name or 'out'}-{digest}"


class Journal:
    """Resume state of one run: whether it can be resumed, which units are done, and how to record another.

    Attributes:
        units: {"name", "file", "mark", "weights"} of finished units in order, with a checksum of the original weights.
        finished: number of units that were finished when this run began; `restored` has their results.
        streams: file name and mark of each stream after the last unit, by kind.
        done: by format, SHA-256 by file name of its folder once that is complete and checked.
    """

    def __init__(self, output: Path, replace: bool = False) -> None:
        """`replace`: start anew when the journal is damaged or of another run."""
        self.output, self.replace, self.folder = output, replace, journal_folder(output)
        self.run: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._outputs: Sequence[FileOutput] = ()
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._tasks: dict[str, Future[None]] = {}
        self._submitted: set[str] = set()
        self._written: dict[str, list[Any]] = {}
        self._reset()

    def _reset(self) -> None:
        self.units: list[dict[str, Any]] = []
        self.streams: dict[str, list[Any]] = {}
        self.done: dict[str, dict[str, str]] = {}
        self.restored: list[journal_files.Unit] = []
        self.finished = 0

    @property
    def is_empty(self) -> bool:
        return not self.units and not self.done

    # The files of the journal.

    def load(self) -> None:
        """Read the manifests. Raises OutputError when they are damaged."""
        read = journal_files.read_checked
        self.run = read(self.folder / _RUN) or {}
        empty: dict[str, Any] = {"units": [], "streams": {}, "done": {}}
        state = (read(self.folder / _MANIFEST) if self.run else None) or empty
        self.units, self.streams, self.done = state["units"], state["streams"], state["done"]
        self.finished = len(self.units)

    def _files(self) -> list[list[Any]]:
        """(name, mark) of every file."""
        return [*([unit["file"], unit["mark"]] for unit in self.units), *self.streams.values()]

    def check(self) -> None:
        """Compare the checksum of every file. Raises OutputError naming the first damaged one."""
        for name, mark in self._files():
            journal_files.check_file(self.folder / name, mark)

    def nbytes(self) -> int:
        return sum(mark[0] for _, mark in self._files())

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start a new journal."""
        self.remove()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the journal {self.folder} cannot be made ({error.strerror}); set AR_WORK_SPACE to a folder that can "
                "be written, or do without a journal (--no_resume)"
            ) from error
        self.run = dict(run)
        self._write(_RUN, self.run)

    def stream(self, kind: str) -> TensorFiles:
        """The file with `hidden`, the states [N, T, H] after the last unit. Raises OutputError when it is damaged."""
        if kind not in self.streams:
            raise damaged_error(self.folder / _MANIFEST, f"it names no {kind} stream")
        name, mark = self.streams[kind]
        return journal_files.open_tensors(self.folder / name, mark)

    def write_stream(self, kind: str, hidden: torch.Tensor | DiskTensor) -> list[Any]:
        """Write the file of a stream after the next unit, and return its record."""
        file = f"{kind}-{len(self.units) + 1:04d}.safetensors"
        return [file, journal_files.write_tensors(self.folder / file, {"hidden": hidden})]

    def write_unit(self, name: str, tensors: journal_files.Tensors, values: Any, weights: int) -> None:
        """Write the file of the next unit, and record it with the streams after it."""
        file = f"unit-{len(self.units):04d}.safetensors"
        mark = journal_files.write_tensors(self.folder / file, tensors, values)
        written, self._written = self._written, {}
        self.commit([*self.units, {"name": name, "file": file, "mark": mark, "weights": weights}], written, self.done)

    def commit(
        self, units: list[dict[str, Any]], streams: dict[str, list[Any]], done: dict[str, dict[str, str]]
    ) -> None:
        """Write the manifest, then remove the files that it no longer names."""
        before = {name for name, _ in self._files()}
        self._sync()
        self._write(_MANIFEST, {"units": units, "streams": streams, "done": done})
        self.units, self.streams, self.done = units, streams, done
        for name in before - {name for name, _ in self._files()}:
            (self.folder / name).unlink(missing_ok=True)

    def remove_uncommitted(self) -> None:
        """Remove files that a killed run was writing or about to remove."""
        valid = {_RUN, _MANIFEST, *(name for name, _ in self._files())}
        for path in self.folder.iterdir():
            if path.name not in valid:
                path.unlink()

    def remove(self) -> None:
        """Remove the journal and its empty parent folders."""
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                (self.folder / _MANIFEST).unlink()
        except OSError as error:
            raise OutputError(f"the journal {self.folder} cannot be removed ({error.strerror})") from error
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # they hold something else
            self.folder.parent.rmdir()
            self.folder.parent.parent.rmdir()
        self._reset()

    def _write(self, name: str, value: Any) -> None:
        journal_files.write_checked(self.folder / name, value)
        self._sync()

    def _sync(self) -> None:
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise journal_files.unwritable_error(self.folder, error) from error

    # Before the run.

    def missing_bytes(self, planned: int) -> int:
        """Disk space that it still needs of the `planned` bytes."""
        return max(0, planned - self.nbytes())

    def own_files(self, fmt: str, folder: Path) -> Iterable[str]:
        """Files of a format's folder that an interrupted run has made."""
        return self.done.get(fmt, ())

    def check_compatible(
        self, fixed: Mapping[str, Any], files: Mapping[str, list[Any]], layout: Mapping[str, Any] | None = None
    ) -> None:
        """Load the journal and compare it with this run (its `fingerprint`, its `weight_files`, and what else decides
        how the output files are laid out), without writing anything. Raises ConfigError when they differ."""
        layout = {**(layout or {}), "version of the journal": VERSION}
        now = self._now = as_json({"settings": fixed, "weights": files, "layout": layout})
        with self._starting_over():
            self.load()
            if not self.is_empty:
                found = differences(self.run.get("layout", {}), now["layout"])
                found += differences(self.run.get("settings"), now["settings"])
                found += file_differences(self.run.get("weights") or {}, now["weights"])
                journal_files.raise_if_different(self.output, found)
                self.check()

    def open(self, late: Callable[[], Mapping[str, Any]], source: ModelSource, outputs: Sequence[FileOutput]) -> None:
        """Open the journal for writing, after comparing data and weights with the interrupted run, and begin the
        outputs, or continue them after the last finished unit.

        `late`: returns digests of what is known only after the data is read. Weights are compared only if a weight file
        is not the same file any more. Raises ConfigError when they differ.
        """
        self._now["late"] = as_json(late())
        self._outputs = outputs
        with self._starting_over():
            if not self.is_empty:
                journal_files.raise_if_different(self.output, self._late_differences(source))
            states = [journal_files.read_tensors(self.folder / unit["file"], unit["mark"]) for unit in self.units]
            self.restored = [journal_files.Unit.from_state(*state) for state in states]
            if self.restored:
                self._begin_outputs()
        if self.is_empty:
            self.begin(self._now)
        if not self.restored:
            self._begin_outputs()
        self.remove_uncommitted()
        self._pool = ThreadPoolExecutor(1, "journal")

    def _begin_outputs(self) -> None:
        for output in self._outputs:
            output.begin([unit.marks[output.format.name] for unit in self.restored])

    def _late_differences(self, source: ModelSource) -> list[str]:
        """Differences in the data, and in the weights of finished units if they may differ."""
        before, now = dict(self.run["late"]), self._now["late"]
        if now["smoke_sample"] is None:  # this run does not verify: it needs no smoke sample
            before["smoke_sample"] = None
        found = differences(before, now)
        if self.run["weights"] == self._now["weights"]:
            return found
        logger.info("the model's files are not the same files: comparing the weights of the finished blocks")
        for unit, name in zip(self.units, [*source.blocks, None], strict=False):
            if self.checksum(source, name) != unit["weights"]:
                where = "outside the blocks" if name is None else f"of {name}"
                found.append(f"weights {where}: other values than then")
        return found

    @contextmanager
    def _starting_over(self) -> Iterator[None]:
        """With `replace`, remove a journal that does not fit instead of raising."""
        try:
            yield
        except (ConfigError, OutputError) as error:
            if not self.replace:
                raise
            logger.warning("starting anew: %s", error)
            self.remove()

    # During the run. One thread writes, in order; after a task that failed, the others fail with its error.

    def checksum(self, source: ModelSource, block: str | None = None) -> int:
        """Checksum of the weights of a block, or of those outside the blocks."""
        return weights_checksum(source, block)

    def submit_streams(self, streams: journal_files.Tensors) -> None:
        """Start writing streams after the current unit, unless they were submitted already. Their values must not
        change before `wait_until_written`."""

        def write(kind: str, hidden: torch.Tensor | DiskTensor) -> None:
            self._written[kind] = self.write_stream(kind, hidden)

        for kind, hidden in streams.items():
            if kind not in self._submitted:
                self._tasks[kind] = self._submit(partial(write, kind, hidden))
                self._submitted.add(kind)

    def add(self, name: str, unit: journal_files.Unit, weights: int) -> None:
        """Record a finished unit that was given to the outputs, with the streams submitted for it, in the background.
        It is valid when all of its files, and its part of the output files, are on disk."""
        unit.marks = {output.format.name: output.mark() for output in self._outputs}
        state = unit.state()

        def write() -> None:
            for output in self._outputs:
                output.writer.sync()
            self.write_unit(name, *state, weights)

        self._submitted.clear()
        self._submit(write)

    def _submit(self, task: Callable[[], None]) -> Future[None]:
        """Queue a task for the thread. It does not run after one that failed, whose error all later calls raise."""
        assert self._pool is not None
        before = self._last
        if before is not None and before.done():
            before.result()

        def run() -> None:
            if before is not None:
                before.result()
            task()

        self._last = self._pool.submit(run)
        return self._last

    def wait_until_written(self, *kinds: str) -> None:
        """Wait until the journal has written these streams; without any, everything."""
        tasks = [self._tasks.pop(kind) for kind in kinds if kind in self._tasks]
        if not kinds and self._last is not None:
            tasks = [self._last]
        for task in tasks:
            task.result()

    def finished_units(self) -> int:
        """Number of finished units, after pending writes have ended or failed."""
        with suppress(Exception):
            self.wait_until_written()
        return len(self.units)

    @contextmanager
    def checkpointing(
        self, outputs: Sequence[FileOutput], blocks: int, blocks_done: Callable[[], int | None]
    ) -> Iterator[None]:
        """When a run fails, write pending entries, keep unfinished outputs if it can be resumed, and tell the user;
        Ctrl-C becomes `Stopped`. `blocks_done`: returns None before the first is begun."""
        try:
            yield
        except BaseException as error:
            count = self.finished_units()
            for output in outputs:
                output.close()
                output.stage.retain = output.stage.retain or count > 0
            if isinstance(error, KeyboardInterrupt):
                done = blocks_done()
                where = "before the first block"
                if done is not None:
                    where = f"in block {done + 1} of {blocks}" if done < blocks else "after the last block"
                then = "run the same command again to resume" if count else "the same command starts anew"
                raise Stopped(f"stopped {where}; {then}", getattr(error, "number", signal.SIGINT)) from error
            if count and isinstance(error, Exception):
                logger.info("%d finished blocks are saved; run the same command again to resume", min(count, blocks))
            raise

    # After the run.

    def complete(self, fmt: str, files: Mapping[str, str]) -> None:
        """Record that all files of a format are in its folder's `.partial` on disk and were checked."""
        self.commit(self.units, self.streams, {**self.done, fmt: dict(files)})

    def publish_if_complete(self, fmt: str, stage: Staging, stale: Iterable[str] = ()) -> bool:
        """Publish a folder that was complete before the run was interrupted; returns whether it was."""
        files = self.done.get(fmt)
        if files is None or not all_files_present(stage.folder, files):
            return False
        stage.publish(files, stale)
        logger.info("%s is complete already", stage.folder)
        return True

    def finish(self, keep_record: bool) -> None:
        """End the run. `keep_record`: leave a record of its folders for the other runs of the same command."""
        if keep_record:
            self.commit([], {}, self.done)
        else:
            self.remove()

    def close(self) -> None:
        """Stop writing. A journal without finished units is removed."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            if self.is_empty:
                self.remove()


class NoJournal(Journal):
    """The journal of a run that cannot be resumed: it records nothing, and removes one of an earlier run, unless
    `output` is None."""

    def __init__(self, output: Path | None = None) -> None:
        super().__init__(output or Path())
        self._removes = output is not None
        with suppress(OutputError):
            self.load()
        self._left = self.done if self._removes else {}
        self._reset()

    def missing_bytes(self, planned: int) -> int:
        return 0

    def own_files(self, fmt: str, folder: Path) -> Iterable[str]:
        # A complete folder is checked by its report.json.
        return self._left.get(fmt, ()) if (folder / PARTIAL).is_dir() else ()

    def open(self, late: Callable[[], Mapping[str, Any]], source: ModelSource, outputs: Sequence[FileOutput]) -> None:
        if self._removes:
            self.remove()
        for output in outputs:
            output.begin()

    def checksum(self, source: ModelSource, block: str | None = None) -> int:
        return 0

    def _nothing(self, *given: Any, **named: Any) -> None:
        pass

    submit_streams = add = complete = finish = _nothing


def interrupted_settings(output: Path) -> dict[str, Any]:
    """The `fingerprint` of the interrupted run into this folder; empty when there is none."""
    journal = Journal(output)
    with suppress(OutputError):
        journal.load()
    return {} if journal.is_empty else dict(journal.run.get("settings", {}))
