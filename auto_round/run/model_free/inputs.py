"""Input shards of a model-free run: a local folder, or hub files downloaded, verified and deleted one by one."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round import envs
from auto_round.errors import ModelError, first_line
from auto_round.files import file_sha256
from auto_round.logger import logger
from auto_round.modeling.files.folder import NOT_FETCHED, is_hub_id, model_folder
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.run.fingerprint import input_identity
from auto_round.run.model_free.units import Unit
from auto_round.run.settings import Settings

_TRIES = 5
_AHEAD = 2  # files on disk at a time, unless running units read more
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class RemoteFile:
    """Size in bytes of a file on the hub, and its SHA-256 if the hub has it."""

    size: int
    sha256: str | None = None


class HubFetcher:
    """A repository of the Hugging Face hub, through its client."""

    def __init__(self, repo: str) -> None:
        self.repo = repo

    def small_files(self, trust_remote_code: bool) -> Path:
        """A local folder with config.json, the index and the tokenizer."""
        from huggingface_hub import snapshot_download

        ignored = [*NOT_FETCHED, "*.safetensors", *(() if trust_remote_code else ("*.py",))]
        return Path(self._call_hub(lambda: snapshot_download(self.repo, ignore_patterns=ignored), "its small files"))

    def weight_files(self) -> dict[str, RemoteFile]:
        """All safetensors files by name."""
        from huggingface_hub import HfApi

        found = {}
        for entry in self._call_hub(lambda: list(HfApi().list_repo_tree(self.repo)), "its list of files"):
            name = str(getattr(entry, "path", ""))
            if name.endswith(".safetensors"):
                lfs = getattr(entry, "lfs", None)
                found[name] = RemoteFile(int(entry.size), None if lfs is None else str(lfs.sha256))
        return found

    def head(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""
        from huggingface_hub import HfFileSystem

        return bytes(self._call_hub(lambda: HfFileSystem().cat_file(f"{self.repo}/{name}", start=start, end=end), name))

    def fetch(self, name: str, folder: Path) -> Path:
        """Download the file into `folder`; an interrupted download is resumed."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo, name, local_dir=folder))

    def _call_hub(self, work: Callable[[], Any], what: str) -> Any:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return work()
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ModelError(f"the hub does not give {what} of {self.repo!r}: {first_line(error)}") from error


def fetch_checked(
    fetcher: HubFetcher, name: str, wanted: RemoteFile, folder: Path, sleep: Callable[[float], None] = time.sleep
) -> Path:
    """Fetch one file and compare its size and hash, with several tries.

    Raises ModelError naming the file after the last try.
    """
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            logger.warning("%s: %s; trying again", name, reason)
            sleep(2.0**attempt)
        try:
            file = fetcher.fetch(name, folder)
        except OSError as error:  # errors of the hub's client are OSErrors
            reason = first_line(error)
            continue
        size = file.stat().st_size
        if size != wanted.size:
            reason = f"it came with {size} bytes instead of {wanted.size}"
        elif wanted.sha256 is None or file_sha256(file) == wanted.sha256:
            return file
        else:
            reason = "its SHA-256 is not the hub's"
        file.unlink(missing_ok=True)
    raise ModelError(f"{name} could not be fetched in {_TRIES} tries: {reason}")


def write_placeholder(path: Path, header: bytes, size: int) -> None:
    """Write a safetensors header to a sparse file of the full size, in place of a file at `path`."""
    part = path.with_name(f"{path.name}.header")
    with open(part, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size)
    os.replace(part, path)


class Schedule:
    """Makes input files available to running units. This one, for a local folder, does nothing."""

    def before(self, position: int) -> None:
        """Called before the unit at `position` starts."""

    def done(self, unit: Unit) -> None:
        """Called after a unit has ended."""

    def close(self) -> None:
        """Called after the last unit, or after an error."""


class Inputs:
    """Input files in a local folder.

    Attributes:
        folder: has config.json and the small files.
        files: the tensors.
        shards: the weight files in order.
        notes: for the user.
    """

    def __init__(self, folder: Path, files: TensorFiles) -> None:
        self.folder, self.files = folder, files
        self.notes = list(files.notes)
        self.shards = sorted({tensor.file for tensor in files.stored.tensors.values()})

    def identity(self) -> dict[str, Any]:
        """Plain values that identify the input files, by name."""
        config = self.folder / "config.json"
        return {path.name: input_identity(path) for path in self.shards} | {"config.json": config.read_text("utf-8")}

    def schedule(self, units: Sequence[Unit]) -> Schedule:
        """The schedule of units that are started in this order."""
        return Schedule()

    def close(self) -> None:
        """Remove temporary files at the end of the run."""


class FetchedFiles(TensorFiles):
    """Tensors in files that may be placeholders with a header only. Reading from a placeholder is an error.

    Attributes:
        present: files that are downloaded.
    """

    def __init__(self, files: TensorFiles) -> None:
        super().__init__(files.folder, files.tensors)
        self.notes = files.notes
        self.present: set[Path] = set()

    def prefetch(self, key: str, start: int = 0, size: int | None = None) -> None:
        """Do nothing: files are downloaded as a whole."""

    def read_bytes(self, key: str, start: int, size: int) -> torch.Tensor:
        file = self.tensors[key].file
        if file not in self.present:
            raise ModelError(f"tensor {key!r} was read while {file.name} is not downloaded; report this")
        return super().read_bytes(key, start, size)


class HubInputs(Inputs):
    """A hub repository whose weight files are downloaded for the first unit that reads them and removed after the last.

    Args:
        staging: folder for downloads; files of a killed run in it are reused.
    """

    files: FetchedFiles

    def __init__(self, fetcher: HubFetcher, staging: Path, trust_remote_code: bool) -> None:
        folder = fetcher.small_files(trust_remote_code)
        self.fetcher, self.staging = fetcher, staging
        remote = fetcher.weight_files()
        staging.mkdir(parents=True, exist_ok=True)
        if "model.safetensors" not in remote and (folder / _INDEX).is_file():
            shutil.copyfile(folder / _INDEX, staging / _INDEX)
        self.remote: dict[Path, RemoteFile] = {staging / name: file for name, file in remote.items()}
        for path, file in self.remote.items():
            if not path.is_file():
                length = int.from_bytes(fetcher.head(path.name, 0, 8), "little")
                if not 2 <= length <= file.size - 8:
                    raise ModelError(f"{path.name} on the hub is no safetensors file")
                write_placeholder(path, fetcher.head(path.name, 8, 8 + length), file.size)
        super().__init__(folder, FetchedFiles(TensorFiles.open(staging)))

    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {"config.json": (self.folder / "config.json").read_text("utf-8")}
        for path in self.shards:
            file = self.remote[path]
            found[path.name] = [file.size, file.sha256 or hashlib.sha256(_header(path)).hexdigest()]
        return found

    def schedule(self, units: Sequence[Unit]) -> Schedule:
        return _FetchSchedule(self, units)

    def fetch_file(self, path: Path) -> None:
        """Download one file in place of its placeholder."""
        arriving = self.staging / "arriving"
        arriving.mkdir(exist_ok=True)
        file = fetch_checked(self.fetcher, path.name, self.remote[path], arriving)
        if _header(file) != _header(path):
            raise ModelError(f"{path.name} changed on the hub during the run; run the same command again")
        os.replace(file, path)
        self.files.present.add(path)

    def remove_file(self, path: Path) -> None:
        """Replace a downloaded file by its placeholder, to free the disk."""
        self.files.present.discard(path)
        write_placeholder(path, _header(path), self.remote[path].size)

    def close(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


class _FetchSchedule(Schedule):
    """Downloads the next file while units of the previous one are processed; at most two files are on disk, or as many
    as the running units read."""

    def __init__(self, inputs: HubInputs, units: Sequence[Unit]) -> None:
        self._inputs, self._units = inputs, units
        self._unread = Counter(file for unit in units for file in unit.files)  # units that have still to read a file
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
            present = sum(self._unread[file] > 0 for file in self._coming)
        if last + 1 < len(self._order) and present < _AHEAD:
            self._start(self._order[last + 1])
        for file in files:
            self._coming[file].result()

    def _start(self, file: Path) -> None:
        with self._lock:
            if file not in self._coming:
                self._coming[file] = self._pool.submit(self._inputs.fetch_file, file)

    def done(self, unit: Unit) -> None:
        for file in unit.files:
            with self._lock:
                self._unread[file] -= 1
                finished = self._unread[file] == 0
            if finished:
                self._inputs.remove_file(file)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def open_inputs(model: str, settings: Settings, rank: int = 0, fetcher: HubFetcher | None = None) -> Inputs:
    """Open the input files of a folder or hub id.

    A hub id whose files are all in the local cache is opened as a folder. Models of ModelScope are downloaded at once.

    Raises ModelError when the files are missing or damaged.
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
    """The snapshot of a repository in the local cache; None when it is incomplete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        TensorFiles.open(folder)
    except (OSError, ValueError, ModelError):
        return None
    return folder
