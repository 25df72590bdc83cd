"""The files of the input: a folder, or shards of a hub that come one after the other and go again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from auto_round.compressors.model_free.integrity import check_inputs
from auto_round.compressors.model_free.journal import input_identity
from auto_round.compressors.model_free.units import Unit
from auto_round.compressors.settings import Settings
from auto_round.modeling.hub import model_folder
from auto_round.modeling.skeleton_source import shards_of
from auto_round.modeling.tensor_files import TensorFiles


class Schedule:
    """Keeps the files there that running units read. This one, of a local folder, has nothing to do."""

    def before(self, position: int) -> None:
        """Called before the unit at `position` starts."""

    def done(self, unit: Unit) -> None:
        """A unit has ended."""

    def __enter__(self) -> Schedule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""


class Inputs:
    """A local folder.

    Attributes:
        folder: holds config.json and the small files.
        files: the tensors.
        shards: the weight files in order.
        notes: for the user.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = TensorFiles.open(folder)
        self.notes = check_inputs(self.files)
        self.shards = list(shards_of(self.files))

    def identity(self) -> dict[str, Any]:
        """What tells these files from others, by name."""
        config = self.folder / "config.json"
        return {path.name: input_identity(path) for path in self.shards} | {"config.json": config.read_text("utf-8")}

    def schedule(self, units: Sequence[Unit]) -> Schedule:
        """For the units that will be started in this order."""
        return Schedule()


def open_inputs(model: str, settings: Settings, fetcher: Any = None) -> Inputs:
    """The inputs of a folder or hub id. Raises ModelError when they are not there or damaged."""
    folder = model_folder(model, trust_remote_code=settings.trust_remote_code, platform=settings.platform)
    return Inputs(folder)
