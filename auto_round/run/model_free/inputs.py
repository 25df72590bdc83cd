"""Input files of a model-free run: a local folder, or hub files downloaded, verified and deleted one by one."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from auto_round import envs
from auto_round.errors import ModelError, first_line
from auto_round.files import file_sha256
from auto_round.logger import logger
from auto_round.modeling.files.folder import NOT_FETCHED, is_hub_id, model_folder
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.run.model_free.units import Unit
from auto_round.run.settings import Settings

_TRIES = 5
_AHEAD = 2  # files on disk at a time, unless running units read more
_INDEX = "model.safetensors.index.json"


class Inputs:
    """Input files in a local folder: one with config.json and the small files, the tensors, the weight files in
    order."""

    def __init__(self, folder: Path, files: TensorFiles) -> None:
        self.folder, self.files = folder, files
        self.shards = sorted({tensor.file for tensor in files.stored.tensors.values()})
        self._asked: set[str] = set()

    def serve(self, units: Iterable[Unit]) -> AbstractContextManager[object]:
        """A context in which these units are started in this order."""
        return nullcontext()

    def before(self, unit: Unit) -> None:
        """Make the files of a unit available before it starts, and read ahead, so that workers do not wait."""
        for key in unit.inputs:
            if key not in self._asked:
                self._asked.add(key)
                self.files.stored.prefetch(key)

    def done(self, unit: Unit) -> None:
        """A unit has ended."""

    def close(self) -> None:
        """Remove temporary files after a successful run."""


class RemoteFile(NamedTuple):
    """Size in bytes of a file on the hub, and its SHA-256 if the hub has it."""

    size: int
    sha256: str | None = None


class HubFetcher:
    """A repository of the Hugging Face hub, through its client."""

    def __init__(self, repo: str) -> None:
        import huggingface_hub

        self.repo, self._hub = repo, huggingface_hub

    def small_files(self, trust_remote_code: bool) -> Path:
        """A local folder with config.json, the index and the tokenizer."""
        ignored = [*NOT_FETCHED, "*.safetensors", *(() if trust_remote_code else ("*.py",))]
        download = self._hub.snapshot_download
        return Path(self._ask(lambda: download(self.repo, ignore_patterns=ignored), "its small files"))

    def weight_files(self) -> dict[str, RemoteFile]:
        """All safetensors files by name."""
        entries = self._ask(lambda: list(self._hub.HfApi().list_repo_tree(self.repo)), "its list of files")
        files = [entry for entry in entries if entry.path.endswith(".safetensors")]
        return {file.path: RemoteFile(int(file.size), getattr(file.lfs, "sha256", None)) for file in files}

    def head(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""
        files = self._hub.HfFileSystem()
        return bytes(self._ask(lambda: files.cat_file(f"{self.repo}/{name}", start=start, end=end), name))

    def fetch(self, name: str, folder: Path) -> Path:
        """Download the file into `folder`; an interrupted download is resumed."""
        return Path(self._hub.hf_hub_download(self.repo, name, local_dir=folder))

    def _ask(self, work: Callable[[], Any], what: str) -> Any:
        try:
            return work()
        except (OSError, ValueError) as error:  # the client's errors are OSErrors
            raise ModelError(f"the hub does not give {what} of {self.repo!r}: {first_line(error)}") from error


def fetch_checked(fetcher: HubFetcher, name: str, wanted: RemoteFile, folder: Path) -> Path:
    """Fetch one file and compare its size and hash, with several tries.

    Raises ModelError naming the file after the last try.
    """
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            logger.warning("%s: %s; trying again", name, reason)
            time.sleep(2.0**attempt)
        try:
            file = fetcher.fetch(name, folder)
            if (size := file.stat().st_size) != wanted.size:
                raise OSError(f"it came with {size} bytes instead of {wanted.size}")
            if wanted.sha256 not in (None, file_sha256(file)):
                raise OSError("its SHA-256 is not the hub's")
            return file
        except OSError as error:
            reason = first_line(error)
            (folder / name).unlink(missing_ok=True)
    raise ModelError(f"{name} could not be fetched in {_TRIES} tries: {reason}")


class FetchedFiles(TensorFiles):
    """Tensors in files of a hub repository that may be placeholders: a header in a sparse file of full size.

    Attributes:
        remote, headers: of each file.
        present: files that are downloaded. Reading from others is an error.
    """

    def __init__(self, files: TensorFiles, remote: dict[Path, RemoteFile]) -> None:
        super().__init__(files.folder, files.tensors)
        self.notes, self.remote = files.notes, remote
        self.headers = {path: _header(path) for path in remote}
        self.present: set[Path] = set()

    def identity(self, file: Path) -> list[Any]:
        remote = self.remote[file]
        return [remote.size, remote.sha256 or hashlib.sha256(self.headers[file]).hexdigest()]

    def read_bytes(self, key: str, start: int, size: int) -> torch.Tensor:
        file = self.tensors[key].file
        if file not in self.present:
            raise ModelError(f"tensor {key!r} was read while {file.name} is not downloaded; report this")
        return super().read_bytes(key, start, size)


class HubInputs(Inputs):
    """A hub repository whose weight files are downloaded for the first unit that reads them and removed after the last.

    The next file is downloaded meanwhile: at most two files are on disk, or as many as the running units read.

    Args:
        staging: folder for downloads; files of a killed run in it are reused.
    """

    files: FetchedFiles

    def __init__(self, fetcher: HubFetcher, staging: Path, trust_remote_code: bool) -> None:
        folder = fetcher.small_files(trust_remote_code)
        self.fetcher, self.staging = fetcher, staging
        remote = {staging / name: file for name, file in fetcher.weight_files().items()}
        staging.mkdir(parents=True, exist_ok=True)
        if staging / "model.safetensors" not in remote and (folder / _INDEX).is_file():
            shutil.copyfile(folder / _INDEX, staging / _INDEX)
        for path, file in remote.items():
            if not path.is_file():
                length = int.from_bytes(fetcher.head(path.name, 0, 8), "little")
                if not 2 <= length <= file.size - 8:
                    raise ModelError(f"{path.name} on the hub is no safetensors file")
                part = path.with_name(f"{path.name}.header")
                part.write_bytes(fetcher.head(path.name, 0, 8 + length))
                os.truncate(part, file.size)
                os.replace(part, path)
        super().__init__(folder, FetchedFiles(TensorFiles.open(staging), remote))

    @contextmanager
    def serve(self, units: Iterable[Unit]) -> Iterator[None]:
        self._unread = Counter(file for unit in units for file in unit.files)  # units that have still to read a file
        self._coming: dict[Path, Future[None]] = {}
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(1, "model-free-fetch")
        try:
            yield
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def before(self, unit: Unit) -> None:
        order, wanted = list(self._unread), list(unit.files)
        following = max((order.index(file) + 1 for file in wanted), default=0)
        if sum(self._unread[file] > 0 for file in {*self._coming, *wanted}) < _AHEAD:
            wanted += order[following : following + 1]
        for file in wanted:
            if file not in self._coming:
                self._coming[file] = self._pool.submit(self._fetch, file)
        for file in unit.files:
            self._coming[file].result()
        super().before(unit)

    def _fetch(self, path: Path) -> None:
        """Download one file in place of its placeholder."""
        arriving = self.staging / "arriving"
        arriving.mkdir(parents=True, exist_ok=True)
        file = fetch_checked(self.fetcher, path.name, self.files.remote[path], arriving)
        if _header(file) != self.files.headers[path]:
            raise ModelError(f"{path.name} changed on the hub during the run; run the same command again")
        os.replace(file, path)
        self.files.present.add(path)

    def done(self, unit: Unit) -> None:
        for file in unit.files:
            with self._lock:
                self._unread[file] -= 1
                finished = self._unread[file] == 0
            if finished:
                self.files.present.discard(file)
                file.unlink()

    def close(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


def _header(path: Path) -> bytes:
    """The bytes before the tensors."""
    with open(path, "rb") as file:
        front = file.read(8)
        return front + file.read(int.from_bytes(front, "little"))


def open_inputs(model: str, settings: Settings, rank: int) -> Inputs:
    """Open the input files of a folder or hub id.

    A hub id whose files are all in the local cache is opened as a folder. Models of ModelScope are downloaded at once.

    Raises ModelError when the files are missing or damaged.
    """
    if is_hub_id(model) and settings.platform == "hf" and not envs.AR_USE_MODELSCOPE:
        from huggingface_hub import snapshot_download

        try:
            cached = Path(snapshot_download(model, local_files_only=True))
            return Inputs(cached, TensorFiles.open(cached))
        except (OSError, ValueError, ModelError):  # the cache is incomplete
            staging = envs.work_space() / "model_free" / f"{model.strip('/').replace('/', '--')}-{rank}"
            return HubInputs(HubFetcher(model), staging, settings.trust_remote_code)
    folder = model_folder(model, trust_remote_code=settings.trust_remote_code, platform=settings.platform)
    return Inputs(folder, TensorFiles.open(folder))
