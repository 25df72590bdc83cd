"""Stream calibration documents from the Hugging Face hub or ModelScope, with an early check for the network.

The client libraries retry for tens of seconds without a network, so one short request goes first. Without a
hub, a copy in the local caches is used. `HUB_SETS` has one row for each dataset with a short name: hub, splits
and columns. Loading scripts of a dataset are never run.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.calibration.data.documents import Document, document_from_row
from auto_round.calibration.data.spec import register_dataset
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
    rows = _with_data_errors(_round_robin(streams), name)
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
    return _buffer_shuffle(_with_data_errors(_round_robin(streams), name), seed, buffer_size)


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


def _round_robin(streams: list[Iterator[Any]]) -> Iterator[Any]:
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


def _with_data_errors(rows: Iterator[Any], name: str) -> Iterator[Any]:
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


# The data sets that have a name here, and any other text set of the Hugging Face hub.
#
# One row of a table per set: which hub, which splits, which columns. Loading scripts of a set are never run.

DEFAULT_DATASET = "NeelNanda/pile-10k"
"""What is used when no dataset is named."""

MODELSCOPE_DEFAULT = "swift/pile-val-backup"
"""The same with the platform ModelScope."""


@dataclass(frozen=True)
class HubSet:
    """A data set of a hub.

    Attributes:
        names: names in a dataset string; the first is shown.
        description: a few words.
        splits: default splits.
        column: column of the text, or None to look for a usual one; several are joined by an empty line.
        path: hub id when it is not the first name.
        config: configuration of the set.
        data_files: parquet files inside the repository, for sets that come with a loading script.
        buffer_size: rows held for shuffling; large where the set is small and sorted.
        concat: default of `concat`; for sets whose documents are far shorter than a usual sample.
        modelscope: whether it lives on ModelScope.
    """

    names: tuple[str, ...]
    description: str
    splits: tuple[str, ...] = ("train",)
    column: str | tuple[str, ...] | None = "text"
    path: str | None = None
    config: str | None = None
    data_files: str | None = None
    buffer_size: int = 1000
    concat: bool = False
    modelscope: bool = False


HUB_SETS = (
    HubSet((DEFAULT_DATASET,), "10,000 documents of the Pile, mixed English (default)", buffer_size=10_000),
    HubSet(
        (MODELSCOPE_DEFAULT,),
        "validation part of the Pile",
        splits=("validation",),
        modelscope=True,
        buffer_size=10_000,
    ),
    HubSet(("BAAI/CCI3-HQ",), "Chinese web text"),
    HubSet(
        ("codeparrot/github-code-clean",), "source code in many languages", column="code", data_files="data/*.parquet"
    ),
    HubSet(("HuggingFaceH4/ultrachat_200k",), "conversations", splits=("train_sft",), column="messages"),
    HubSet(("madao33/new-title-chinese",), "Chinese news", column="content", buffer_size=6000),
    HubSet(
        ("mbpp", "google-research-datasets/mbpp"),
        "short Python problems with solutions, joined",
        splits=("train", "validation", "test"),
        column=("text", "code"),
        path="google-research-datasets/mbpp",
        config="full",
        concat=True,
    ),
    HubSet(("openbmb/Ultra-FineWeb",), "filtered web text, splits en and zh", splits=("en",), column="content"),
    HubSet(
        ("opencode-instruct", "nvidia/OpenCodeInstruct"),
        "Python questions with answers",
        column=None,
        path="nvidia/OpenCodeInstruct",
    ),
)
"""Data sets with a name."""


def open_rows(entry: HubSet, name: str, splits: tuple[str, ...], seed: int) -> Iterator[Any]:
    """Rows of a set of the table."""
    if entry.modelscope:
        return modelscope_rows(name, splits, seed, entry.buffer_size)
    return hub_rows(
        name,
        splits,
        seed,
        path=entry.path,
        config=entry.config,
        data_files=entry.data_files,
        buffer_size=entry.buffer_size,
    )


def row_document(row: Any, column: str | tuple[str, ...] | None, where: str) -> Document:
    """The document of a row: the named column(s), or what `document_from_row` finds."""
    if column is None:
        return document_from_row(row, where)
    names = (column,) if isinstance(column, str) else column
    if not isinstance(row, Mapping) or any(n not in row for n in names):
        shown = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(f"{where} has no column {names}, it has {shown}; the set has changed, use another one")
    if len(names) == 1:
        return document_from_row({"messages" if names[0] == "messages" else "text": row[names[0]]}, where)
    return "\n\n".join(str(row[n]) for n in names if row[n])


def unlisted_hub_documents(name: str, split: str | None, seed: int) -> Iterator[Document]:
    """Documents of a hub set that is not in the table, from a column with a usual name (`text`, `messages`, ...)."""
    splits = tuple(split.split("+")) if split else ("train",)
    for row in hub_rows(name, splits, seed):
        yield document_from_row(row, f"a row of dataset {name!r}")


def _reader(entry: HubSet) -> Callable[..., Iterator[Document]]:
    def read(dataset_name: str, split: str | None, seed: int) -> Iterator[Document]:
        splits = tuple(split.split("+")) if split else entry.splits
        for row in open_rows(entry, dataset_name, splits, seed):
            yield row_document(row, entry.column, f"a row of dataset {dataset_name!r}")

    return read


for _entry in HUB_SETS:
    register_dataset(
        _entry.names,
        description=_entry.description,
        where="ModelScope" if _entry.modelscope else "Hugging Face hub",
        concat=_entry.concat,
    )(_reader(_entry))
