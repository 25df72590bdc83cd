"""Reading data sets of a hub a few rows at a time, and knowing at once when there is no hub.

The libraries below retry for tens of seconds when there is no network, so one short request goes ahead of them. Without
a hub, a copy that an earlier run left in the local caches is used.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from auto_round.errors import DataError
from auto_round.logger import logger

PROBE_SECONDS = 5.0
"""Longest wait for a sign of life from the hub."""

_PROBE_VALID_SECONDS = 60.0
_probe_results: dict[str, tuple[float, str]] = {}


class HubUnreachable(DataError):
    """The hub, or the library that reads it, is not there; `reason` says which in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"dataset {name!r} cannot be reached ({reason}); check the network, use a local file "
            "(--dataset ./calib.jsonl), or use the text inside the package (--dataset builtin)"
        )


def hub_problem() -> str:
    """Why the Hugging Face hub cannot be used now, in a few words, or "". Takes `PROBE_SECONDS` at most."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    known = _probe_results.get(endpoint)
    if known is None or time.monotonic() - known[0] > _PROBE_VALID_SECONDS:
        known = (time.monotonic(), _probe(endpoint))
        _probe_results[endpoint] = known
    return known[1]


def _probe(endpoint: str) -> str:
    """Get the hub's front page. Any answer but a server's or proxy's failure will do: the network is in question."""
    answer: list[str] = []

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            status = get_session().head(endpoint, timeout=PROBE_SECONDS).status_code
            answer.append(f"{endpoint} answers with status {status}" if status == 407 or status >= 500 else "")
        except Exception as error:  # the HTTP library behind get_session differs between versions, and so do its errors
            answer.append(f"no answer from {endpoint}: {_short(error)}")

    # In a thread, since looking up a name can block for longer than any timeout of the request.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answer[0] if answer else f"no answer from {endpoint} within {PROBE_SECONDS:g} s"


def hub_rows(
    name: str,
    splits: Sequence[str],
    seed: int,
    *,
    path: str | None = None,
    config: str | None = None,
    data_files: str | None = None,
    buffer_size: int = 1000,
) -> Iterator[Any]:
    """Rows of a hub data set, shuffled within a moving buffer, from all `splits` in turn.

    Args:
        name: what the user calls it, for messages.
        splits: split names.
        seed: of the shuffle.
        path: hub id, `name` when None.
        config: name of the configuration.
        data_files: pattern inside the repository, for sets whose own loading script cannot be run; parquet only.
        buffer_size: rows held for shuffling.

    The first row is fetched before this returns. Raises HubUnreachable when there is neither hub nor local copy, and
    DataError when the hub has no such set, split or configuration.
    """
    try:
        import datasets
    except ImportError as error:
        raise HubUnreachable(name, 'it needs `pip install "auto-round[data]"`') from error
    path = path or name
    problem = hub_problem()
    streams = []
    for split in splits:
        if problem:
            stream = _cached_stream(path, config, split)
            if stream is None:
                raise HubUnreachable(name, problem)
            logger.info("dataset %r is read from the local cache (%s)", name, problem)
        else:
            try:
                if data_files is not None:
                    files = {split: f"hf://datasets/{path}/{data_files}"}
                    stream = datasets.load_dataset("parquet", data_files=files, split=split, streaming=True)
                else:
                    stream = datasets.load_dataset(path, config, split=split, streaming=True)
            except Exception as error:  # whatever `datasets`, `fsspec` and the HTTP library raise
                raise _as_data_error(name, error) from error
        streams.append(iter(stream.shuffle(seed=seed, buffer_size=buffer_size)))
    rows = _guarded(_in_turn(streams), name)
    first = list(itertools.islice(rows, 1))
    if not first:
        raise DataError(f"dataset {name!r} has no rows in split {'+'.join(splits)}; choose another split")
    return itertools.chain(first, rows)


def modelscope_rows(name: str, splits: Sequence[str], seed: int, buffer_size: int = 1000) -> Iterator[Any]:
    """Rows of a ModelScope data set, as `hub_rows`. Needs the package `modelscope`."""
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise HubUnreachable(name, 'ModelScope needs `pip install "auto-round[modelscope]"`') from error
    try:
        streams = [
            iter(MsDataset.load(name, subset_name="default", split=s, use_streaming=True).to_hf_dataset())
            for s in splits
        ]
    except Exception as error:  # whatever `modelscope` and the HTTP library raise
        raise _as_data_error(name, error) from error
    return _buffer_shuffle(_guarded(_in_turn(streams), name), seed, buffer_size)


def _cached_stream(path: str, config: str | None, split: str) -> Any:
    """A data set from the hub's file cache or from the cache of `datasets`, or None."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, repo_type="dataset", local_files_only=True)
        return datasets.load_dataset(folder, config, split=split, streaming=True)
    except Exception as error:  # not in this cache, or only in part
        logger.debug("%s is not in the hub's cache: %s", path, error)
    try:
        cache = Cache(dataset_name=path.split("/")[-1], repo_id=path, config_name=config, version="auto", hash="auto")
        return cache.as_dataset(split=split).to_iterable_dataset()
    except Exception as error:  # not in this cache either
        logger.debug("%s is not in the cache of datasets: %s", path, error)
    return None


def _in_turn(streams: list[Iterator[Any]]) -> Iterator[Any]:
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


def _buffer_shuffle(rows: Iterator[Any], seed: int, size: int) -> Iterator[Any]:
    import random

    rng = random.Random(seed)
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        i = rng.randrange(len(buffer))
        yield buffer[i]
        buffer[i] = row
    rng.shuffle(buffer)
    yield from buffer


def _guarded(rows: Iterator[Any], name: str) -> Iterator[Any]:
    """The rows, with a network failure on the way told as one of ours."""
    try:
        yield from rows
    except DataError:
        raise
    except Exception as error:  # whatever the stream's libraries raise
        raise _as_data_error(name, error) from error


def _as_data_error(name: str, error: Exception) -> DataError:
    """HubUnreachable for what looks like the network, else a DataError that repeats the library's reason."""
    kinds = {c.__name__ for c in type(error).__mro__}
    if kinds & {"ConnectionError", "TimeoutError", "TransportError", "HTTPError", "ClientError", "RequestException"}:
        return HubUnreachable(name, _short(error))
    if "DatasetNotFoundError" in kinds:
        return DataError(
            f"the hub has no dataset {name!r} that you may read ({_short(error)}); check the name, or log in if it is "
            "gated"
        )
    return DataError(f"dataset {name!r} cannot be read: {_short(error)}; check its splits and columns on the hub")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
