"""Weight files of a hub: their headers first, then one file at a time, checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from auto_round.errors import ModelError
from auto_round.logger import logger
from auto_round.modeling.side_files import NOT_FETCHED

_TRIES = 5
_CODE = ("*.py",)


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub: its bytes, and their SHA-256 where the hub says it."""

    size: int
    sha256: str | None = None


class Fetcher(Protocol):
    """Where weight files come from."""

    def small_files(self, trust_remote_code: bool) -> Path:
        """A local folder with config.json, the index and the tokenizer."""

    def weight_files(self) -> dict[str, RemoteFile]:
        """All safetensors files by name."""

    def head(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""

    def fetch(self, name: str, folder: Path) -> Path:
        """The whole file, in `folder`; a download that was broken off is gone on with."""


class HubFetcher:
    """A repository of the Hugging Face hub, through its client."""

    def __init__(self, repo: str) -> None:
        self.repo = repo

    def small_files(self, trust_remote_code: bool) -> Path:
        from huggingface_hub import snapshot_download

        ignored = [*NOT_FETCHED, "*.safetensors", *(() if trust_remote_code else _CODE)]
        return Path(self._guarded(lambda: snapshot_download(self.repo, ignore_patterns=ignored), "its small files"))

    def weight_files(self) -> dict[str, RemoteFile]:
        from huggingface_hub import HfApi

        found = {}
        for entry in self._guarded(lambda: list(HfApi().list_repo_tree(self.repo)), "its list of files"):
            name = str(getattr(entry, "path", ""))
            if name.endswith(".safetensors"):
                lfs = getattr(entry, "lfs", None)
                found[name] = RemoteFile(int(entry.size), None if lfs is None else str(lfs.sha256))
        return found

    def head(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub import HfFileSystem

        return bytes(self._guarded(lambda: HfFileSystem().cat_file(f"{self.repo}/{name}", start=start, end=end), name))

    def fetch(self, name: str, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo, name, local_dir=folder))

    def _guarded(self, work: Callable[[], Any], what: str) -> Any:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return work()
        except (HfHubHTTPError, OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the hub does not give {what} of {self.repo!r}: {first}") from error


def fetch_checked(
    fetcher: Fetcher, name: str, wanted: RemoteFile, folder: Path, sleep: Callable[[float], None] = time.sleep
) -> Path:
    """Fetch one file and hold it against its size and hash, several times if need be.

    Raises ModelError naming the file after the last try.
    """
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            logger.warning("%s: %s; trying again", name, reason)
            sleep(2.0**attempt)
        try:
            file = fetcher.fetch(name, folder)
        except OSError as error:  # of which those of the client are kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        problem = _problem(file, wanted)
        if problem is None:
            return file
        reason = problem
        file.unlink(missing_ok=True)
    raise ModelError(f"{name} could not be fetched in {_TRIES} tries: {reason}")


def _problem(file: Path, wanted: RemoteFile) -> str | None:
    size = file.stat().st_size
    if size != wanted.size:
        return f"it came with {size} bytes instead of {wanted.size}"
    if wanted.sha256 is None:
        return None
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while part := handle.read(1 << 22):
            digest.update(part)
    return None if digest.hexdigest() == wanted.sha256 else "its SHA-256 is not the hub's"


def write_stand_in(fetcher: Fetcher, name: str, size: int, folder: Path) -> None:
    """A file with the header of `name` and room that takes no disk, in place of its data."""
    length = int.from_bytes(fetcher.head(name, 0, 8), "little")
    if not 2 <= length <= size - 8:
        raise ModelError(f"{name} on the hub is no safetensors file")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        file.write(fetcher.head(name, 0, 8 + length))
        file.truncate(size)
