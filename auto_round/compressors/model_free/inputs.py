"""The files of the input: a folder, or shards of a hub that come one after the other and go again."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from auto_round import envs
from auto_round.compressors.model_free.fetch import Fetcher, HubFetcher, RemoteFile, fetch_checked, write_stand_in
from auto_round.compressors.model_free.units import Unit
from auto_round.compressors.resume.fingerprint import input_identity
from auto_round.compressors.settings import Settings
from auto_round.errors import ModelError
from auto_round.modeling.hub import is_hub_id, model_folder
from auto_round.modeling.skeleton_source import shards_of
from auto_round.modeling.tensor_files import TensorFiles

_AHEAD = 2
_INDEX = "model.safetensors.index.json"


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

    def __init__(self, folder: Path, files: TensorFiles) -> None:
        self.folder, self.files = folder, files
        self.notes = list(files.notes)
        self.shards = list(shards_of(self.files))

    def identity(self) -> dict[str, Any]:
        """What tells these files from others, by name."""
        config = self.folder / "config.json"
        return {path.name: input_identity(path) for path in self.shards} | {"config.json": config.read_text("utf-8")}

    def schedule(self, units: Sequence[Unit]) -> Schedule:
        """For the units that will be started in this order."""
        return Schedule()

    def close(self) -> None:
        """The run is over."""


class FetchedFiles(TensorFiles):
    """Tensors of files of which only the headers may be here. Reading one whose file is away is an error."""

    def __init__(self, files: TensorFiles) -> None:
        super().__init__(files.folder, files.tensors)
        self.notes = files.notes
        self.here: set[Path] = set()

    def _fill(self, file: Path, key: str, start: int, view: memoryview) -> None:
        if file not in self.here:
            raise ModelError(f"tensor {key!r} was asked for while {file.name} is not here; report this")
        super()._fill(file, key, start, view)


class HubInputs(Inputs):
    """A repository whose weight files are fetched when a unit needs them, and removed after the last one that does.

    Args:
        staging: where they lie meanwhile; what a killed run left there is gone on with.
    """

    files: FetchedFiles

    def __init__(self, fetcher: Fetcher, staging: Path, trust_remote_code: bool) -> None:
        folder = fetcher.small_files(trust_remote_code)
        self.fetcher, self.staging = fetcher, staging
        remote = fetcher.weight_files()
        staging.mkdir(parents=True, exist_ok=True)
        if "model.safetensors" not in remote and (folder / _INDEX).is_file():
            shutil.copyfile(folder / _INDEX, staging / _INDEX)
        self.remote: dict[Path, RemoteFile] = {staging / name: file for name, file in remote.items()}
        for path, file in self.remote.items():
            if not path.is_file():
                write_stand_in(fetcher, path.name, file.size, staging)
        super().__init__(folder, FetchedFiles(TensorFiles.open(staging)))

    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {"config.json": (self.folder / "config.json").read_text("utf-8")}
        for path in self.shards:
            file = self.remote[path]
            found[path.name] = [file.size, file.sha256 or hashlib.sha256(self._header(path)).hexdigest()]
        return found

    def _header(self, path: Path) -> bytes:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return file.read(length)

    def schedule(self, units: Sequence[Unit]) -> Schedule:
        return _Fetching(self, units)

    def bring(self, path: Path) -> None:
        """Fetch one file in place of its stand-in."""
        header = self._header(path)
        arriving = self.staging / "arriving"
        arriving.mkdir(exist_ok=True)
        file = fetch_checked(self.fetcher, path.name, self.remote[path], arriving)
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if handle.read(length) != header:
                raise ModelError(f"{path.name} changed on the hub while it was worked on; run the same command again")
        os.replace(file, path)
        self.files.here.add(path)

    def drop(self, path: Path) -> None:
        """Give a file's disk back; its header stays."""
        self.files.here.discard(path)
        header = self._header(path)
        part = path.with_name(f"{path.name}.header")
        with open(part, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(self.remote[path].size)
        os.replace(part, path)

    def close(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


class _Fetching(Schedule):
    """Fetches the next file while units of the one before are worked on; two are here at most, or as many as the units
    read that are in work."""

    def __init__(self, inputs: HubInputs, units: Sequence[Unit]) -> None:
        self._inputs, self._units = inputs, units
        self._left = Counter(file for unit in units for file in unit.files)
        self._order = list(dict.fromkeys(file for unit in units for file in unit.files))
        self._lock = threading.Lock()
        self._coming: dict[Path, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1, "model-free-fetch")

    def before(self, position: int) -> None:
        files = self._units[position].files
        for file in files:
            self._start(file)
        last = max((self._order.index(file) for file in files), default=-1)
        with self._lock:
            here = sum(self._left[file] > 0 for file in self._coming)
        if last + 1 < len(self._order) and here < _AHEAD:
            self._start(self._order[last + 1])
        for file in files:
            self._coming[file].result()

    def _start(self, file: Path) -> None:
        with self._lock:
            if file not in self._coming:
                self._coming[file] = self._pool.submit(self._inputs.bring, file)

    def done(self, unit: Unit) -> None:
        for file in unit.files:
            with self._lock:
                self._left[file] -= 1
                gone = self._left[file] == 0
            if gone:
                self._inputs.drop(file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def open_inputs(model: str, settings: Settings, rank: int = 0, fetcher: Fetcher | None = None) -> Inputs:
    """The inputs of a folder or hub id.

    A hub id whose files are all in the local cache is a folder. ModelScope's ids are downloaded whole.

    Raises ModelError when they are not there or damaged.
    """
    local = fetcher is None and (not is_hub_id(model) or settings.platform != "hf" or envs.AR_USE_MODELSCOPE)
    cached = None if local or fetcher is not None else _cached(model)
    if local or cached is not None:
        trusted = settings.trust_remote_code
        folder = cached or model_folder(model, trust_remote_code=trusted, platform=settings.platform)
        return Inputs(folder, TensorFiles.open(folder))
    staging = envs.work_space() / "model_free" / f"{model.strip('/').replace('/', '--')}-{rank}"
    return HubInputs(fetcher or HubFetcher(model), staging, settings.trust_remote_code)


def _cached(repo: str) -> Path | None:
    """The snapshot of a repository in the local cache, where all its weights are there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        TensorFiles.open(folder)
    except (OSError, ValueError, ModelError):
        return None
    return folder
