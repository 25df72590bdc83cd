"""What a run says and keeps when it begins again, and when it is stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from auto_round.calib_dataset import CalibrationData
from auto_round.calibration.inputs import CapturedInputs
from auto_round.compressors.resume.fingerprint import samples_digest, tensors_checksum
from auto_round.compressors.resume.run_journal import RunJournal
from auto_round.errors import Stopped
from auto_round.export.formats import OutputFormat
from auto_round.export.staging import Staging, can_publish
from auto_round.logger import logger


def is_done(fmt: OutputFormat, stage: Staging, journal: RunJournal | None, stale: Iterable[str] = ()) -> bool:
    """Whether a folder was complete and checked before the run was interrupted; if so it is shown, in the place of the
    `stale` files of an earlier run."""
    files = None if journal is None else journal.done.get(fmt.name)
    if files is None or not can_publish(stage.folder, files):
        return False
    stage.publish(files, stale)
    logger.info("%s is complete already", stage.folder)
    return True


def late_facts(
    data: CalibrationData | None, probe: Sequence[Mapping[str, torch.Tensor]] | None, calibration: CapturedInputs | None
) -> dict[str, Any]:
    """What decides the result and is known only when the data has been read."""
    return {
        "calibration data": None if data is None else samples_digest(data.samples),
        "probe": None if probe is None else samples_digest(probe),
        "inputs of the first block": None if calibration is None else tensors_checksum([calibration.hidden]),
    }


def going_on(finished: int, blocks: int) -> str:
    """Where a run goes on, in words."""
    if finished < blocks:
        return f"going on with the interrupted run: {finished} of {blocks} blocks are done"
    return "going on with the interrupted run: all blocks are done"


@contextmanager
def keeping(journal: RunJournal | None, blocks: int, walked: Callable[[], int | None]) -> Iterator[None]:
    """Keep what is finished whatever happens, and say so; Ctrl-C becomes `Stopped`, which says where it was.

    Args:
        blocks: of the model.
        walked: how many of them are done; None before the first is begun.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        done = walked()
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
