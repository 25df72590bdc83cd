"""The journal as a run uses it: may it be gone on with, what is finished, and what has just been finished."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.spill import SpilledTensor
from auto_round.compressors.resume.background import Background
from auto_round.compressors.resume.fingerprint import (
    TUNED_ALONE,
    block_checksum,
    differences,
    listed,
    outside_checksum,
    plain,
)
from auto_round.compressors.resume.journal import Journal, journal_folder
from auto_round.compressors.resume.unit_state import Unit, unit_from_state, unit_state
from auto_round.errors import ConfigError, OutputError
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource

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
        self._kept: set[str] = set()
        self._begun = False
        self.finished = 0

    @property
    def done(self) -> Mapping[str, Mapping[str, str]]:
        """SHA-256 by file name of each format's folder that is complete and checked."""
        return self.journal.done

    def admit(self, fixed: Mapping[str, Any], files: Mapping[str, list[Any]]) -> None:
        """Read what is there and compare it with this run; nothing is written yet.

        Args:
            fixed: `fingerprint`.
            files: `weight_files`.

        Raises:
            ConfigError: the interrupted run was another one.
            OutputError: its journal is damaged.
        """
        self._fixed, self._files = dict(fixed), plain(files)
        try:
            self.journal.load()
            if self.journal.is_empty:
                return
            before = self.journal.run
            found = differences(before.get("settings"), self._fixed) + _other_files(before.get("weights"), self._files)
            self._refuse(found)
            self.journal.check()
        except (ConfigError, OutputError) as error:
            if not self.replace:
                raise
            self._anew(error)

    def settle(self, late: Mapping[str, Any], source: ModelSource) -> None:
        """What is known only when the data has been read: begin, or make sure that the interrupted run was this one.

        Where a weight file is not the same file, the weights that were used until now are compared with it.

        Raises:
            ConfigError: the data or the weights were others.
            OutputError: the journal cannot be written.
        """
        values = plain(late)
        if not self.journal.is_empty:
            try:
                before = dict(self.journal.run["late"])
                if values["probe"] is None:  # it was to check the files with, which is not wanted any more
                    before["probe"] = None
                found = differences(before, values)
                if self.journal.run["weights"] != self._files:
                    found += self._other_weights(source)
                self._refuse(found)
            except ConfigError as error:
                if not self.replace:
                    raise
                self._anew(error)
        if self.journal.is_empty:
            self.journal.begin({"settings": self._fixed, "weights": self._files, "late": values})
        self.journal.tidy()
        self._begun = True
        self.finished = len(self.journal.units)
        self._background = Background("journal")

    def unit(self, index: int, device: torch.device, in_file: bool = False) -> Unit:
        """A finished unit; its layers are read as they are reached if `in_file`. Raises OutputError when its file is
        damaged."""
        return unit_from_state(*self.journal.unit(index, in_file), device)

    def stream(self, kind: str) -> torch.Tensor:
        """Hidden states after the last finished unit: "full", "quantized" or "probe"."""
        return self.journal.stream(kind)

    def stream_into(self, kind: str, room: SpilledTensor) -> None:
        """The same into a file."""
        self.journal.stream_into(kind, room)

    def keep(self, kind: str, hidden: torch.Tensor | SpilledTensor) -> None:
        """Begin to write a stream as it is after the unit that is in work. Its values must not change before
        `until_written(kind)`."""
        assert self._background is not None

        def write() -> None:
            self._written[kind] = self.journal.write_stream(kind, hidden)

        self._tasks[kind] = self._background.submit(write)
        self._kept.add(kind)

    def add(self, name: str, unit: Unit, weights: int, streams: Mapping[str, torch.Tensor | SpilledTensor]) -> None:
        """A unit is finished. It is written beside what comes next, and counts when all of it is on the disk.

        Args:
            weights: checksum of the weights that it was made from.
            streams: hidden states after it by kind, with those that `keep` was given. They must not change before
                `until_written`.

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
            if kind not in self._kept:
                self.keep(kind, streams[kind])
        self._kept.clear()
        self._background.submit(commit)

    def until_written(self, *kinds: str) -> None:
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
            self.journal.reduce()
        else:
            self.journal.remove()

    def close(self) -> None:
        """Stop writing. A journal in which nothing is finished is removed."""
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._begun and self.journal.is_empty:
            self.journal.remove()

    def _refuse(self, found: list[str]) -> None:
        if found:
            raise ConfigError(
                f"output folder {self.output} holds an interrupted run that differs: {listed(found)}; give the same "
                "settings to go on with it, choose another folder, or start anew with --overwrite or --no_resume "
                "(overwrite=True or resume=False)"
            )

    def _anew(self, error: Exception) -> None:
        logger.warning("starting anew: %s", error)
        self.journal.remove()

    def _other_weights(self, source: ModelSource) -> list[str]:
        """Finished blocks whose weights are not those that were read then."""
        logger.info("the model's files are not the same files: comparing the weights of the finished blocks")
        found = []
        for unit, name in zip(self.journal.units, source.blocks, strict=False):
            if block_checksum(source, name) != unit["weights"]:
                found.append(f"weights of {name}: other values than then")
        if len(self.journal.units) > len(source.blocks) and self.journal.units[-1]["weights"] != outside_checksum(
            source
        ):
            found.append("weights outside the blocks: other values than then")
        return found


@dataclass(frozen=True)
class HowExpertsWere:
    """How an interrupted run has gone about experts: `alone`, one at a time, or with their block. `settings`: its
    fingerprint."""

    alone: bool
    settings: Mapping[str, Any]

    def differs(self, fixed: Mapping[str, Any]) -> bool:
        """Whether a run of this fingerprint is another one; the size of files, which is not known yet, left out."""
        return differences({**self.settings, _SIZE: ""}, {**plain(fixed), _SIZE: ""}) != []


def tuned_alone_before(output: Path) -> HowExpertsWere | None:
    """Of the interrupted run into this folder; None where there is none, or it has no experts to tune."""
    journal = Journal(journal_folder(output))
    with suppress(OutputError):
        journal.load()
    settings = {} if journal.is_empty else journal.run.get("settings", {})
    found = settings.get("experts")
    return None if found is None else HowExpertsWere(found == TUNED_ALONE, settings)


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
