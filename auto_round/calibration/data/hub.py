"""Stream calibration documents from the Hugging Face hub or ModelScope, after a short check of the network.

The client libraries retry for tens of seconds without a network, so one short request is made first. Without a hub, a
copy in the local caches is used. Loading scripts of a dataset are never run.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.calibration.data.documents import Document, document_from_row, documents_from_item
from auto_round.calibration.data.spec import register_dataset
from auto_round.errors import DataError
from auto_round.logger import logger

HUB_TIMEOUT_S = 5.0
"""Longest wait for an answer of the hub, in seconds."""

_ANSWER_VALID_S = 60.0
_hub_answers: dict[str, tuple[float, str]] = {}

DEFAULT_DATASET = "NeelNanda/pile-10k"
"""The dataset that is used when none is given."""

MODELSCOPE_DEFAULT = "swift/pile-val-backup"
"""The same on the platform ModelScope."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on a hub, and the names that it has in a dataset string."""

    names: tuple[str, ...]
    description: str = ""  # a few words for `list dataset`
    splits: tuple[str, ...] = ("train",)
    column: str | tuple[str, ...] | None = "text"  # None looks for a usual name; several are joined by an empty line
    path: str | None = None  # hub id, when it differs from the name
    config: str | None = None
    data_files: str | None = None  # parquet files inside the repository, for datasets with a loading script
    buffer_size: int = 1000  # rows held for shuffling; large for a dataset that is small and sorted
    concat: bool = False  # default of `concat`; True for documents far shorter than a usual sample
    modelscope: bool = False

    def documents(self, dataset_name: str, split: str | None, seed: int) -> Iterator[Document]:
        """Yield the documents. Raises DataError when the dataset cannot be read or has no rows."""
        splits, where = split.split("+") if split else self.splits, f"a row of dataset {dataset_name!r}"
        columns = (self.column,) if isinstance(self.column, str) else self.column
        row: Any = None
        for row in (_modelscope_rows if self.modelscope else _hub_rows)(self, dataset_name, splits, seed):
            if columns is None:
                yield from documents_from_item(row, where)
            elif not isinstance(row, Mapping) or any(column not in row for column in columns):
                shown = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
                raise DataError(
                    f"{where} has no column {columns}, it has {shown}; the dataset has changed, use another one"
                )
            elif len(columns) > 1:
                yield "\n\n".join(str(row[column]) for column in columns if row[column])
            else:
                yield document_from_row({"messages" if columns[0] == "messages" else "text": row[columns[0]]}, where)
        if row is None and not self.modelscope:
            raise DataError(f"dataset {dataset_name!r} has no rows in split {'+'.join(splits)}; choose another split")


for _set in (
    HubDataset((DEFAULT_DATASET,), "10,000 documents of the Pile, mixed English (default)", buffer_size=10_000),
    HubDataset(
        (MODELSCOPE_DEFAULT,), "validation part of the Pile", ("validation",), modelscope=True, buffer_size=10_000
    ),
    HubDataset(("BAAI/CCI3-HQ",), "Chinese web text"),
    HubDataset(
        ("codeparrot/github-code-clean",), "source code in many languages", column="code", data_files="data/*.parquet"
    ),
    HubDataset(("HuggingFaceH4/ultrachat_200k",), "conversations", ("train_sft",), "messages"),
    HubDataset(("madao33/new-title-chinese",), "Chinese news", column="content", buffer_size=6000),
    HubDataset(
        ("mbpp", "google-research-datasets/mbpp"), "short Python problems with solutions, joined",
        ("train", "validation", "test"), ("text", "code"), "google-research-datasets/mbpp", "full", concat=True,
    ),
    HubDataset(("openbmb/Ultra-FineWeb",), "filtered web text, splits en and zh", ("en",), "content"),
    HubDataset(
        ("opencode-instruct", "nvidia/OpenCodeInstruct"), "Python questions with answers", column=None,
        path="nvidia/OpenCodeInstruct",
    ),
):  # fmt: skip
    _where = "ModelScope" if _set.modelscope else "Hugging Face hub"
    register_dataset(_set.names, description=_set.description, where=_where, concat=_set.concat)(_set.documents)


class HubUnreachable(DataError):
    """The hub, or the library that reads it, is not available; `reason` says why in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"dataset {name!r} cannot be reached ({reason}); check the network, use a local file "
            "(--dataset ./calib.jsonl), or use the text inside the package (--dataset builtin)"
        )


def hub_problem() -> str:
    """Why the Hugging Face hub cannot be used now, in a few words, or "". Takes `HUB_TIMEOUT_S` at most."""
    try:
        from huggingface_hub import constants, get_session
    except ImportError:
        return "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    known = _hub_answers.get(endpoint)
    if known is not None and time.monotonic() - known[0] <= _ANSWER_VALID_S:
        return known[1]
    answers: list[str] = []

    def request() -> None:
        """Read the hub's front page. Any answer but a server or proxy failure counts as success."""
        try:
            status = get_session().head(endpoint, timeout=HUB_TIMEOUT_S).status_code
            answers.append(f"{endpoint} answers with status {status}" if status == 407 or status >= 500 else "")
        except Exception as error:  # the HTTP library behind get_session, and so its errors, differ between versions
            answers.append(f"no answer from {endpoint}: {_short(error)}")

    # In a thread, because name resolution can block for longer than the timeout of the request.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    answer = answers[0] if answers else f"no answer from {endpoint} within {HUB_TIMEOUT_S:g} s"
    _hub_answers[endpoint] = time.monotonic(), answer
    return answer


def _hub_rows(dataset: HubDataset, name: str, splits: Sequence[str], seed: int) -> Iterator[Any]:
    """Rows of all `splits` of a Hugging Face dataset in turn, shuffled within a moving buffer.

    Raises HubUnreachable when there is neither hub nor local copy, and DataError when the hub has no such dataset,
    split or configuration.
    """
    try:
        import datasets
    except ImportError as error:
        raise HubUnreachable(name, 'it needs `pip install "auto-round[data]"`') from error
    path, problem, streams = dataset.path or name, hub_problem(), []
    for split in splits:
        if problem:
            stream = _cached_stream(path, dataset.config, split)
            if stream is None:
                raise HubUnreachable(name, problem)
            logger.info("dataset %r is read from the local cache (%s)", name, problem)
        else:
            try:
                if dataset.data_files is not None:
                    files = {split: f"hf://datasets/{path}/{dataset.data_files}"}
                    stream = datasets.load_dataset("parquet", data_files=files, split=split, streaming=True)
                else:
                    stream = datasets.load_dataset(path, dataset.config, split=split, streaming=True)
            except Exception as error:  # whatever `datasets`, `fsspec` and the HTTP library raise
                raise _as_data_error(name, error) from error
        streams.append(iter(stream.shuffle(seed=seed, buffer_size=dataset.buffer_size)))
    return _round_robin(streams, name)


def _cached_stream(path: str, config: str | None, split: str) -> Any:
    """A dataset from the hub's file cache or from the cache of `datasets`, or None."""
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


def _modelscope_rows(dataset: HubDataset, name: str, splits: Sequence[str], seed: int) -> Iterator[Any]:
    """As `_hub_rows`, for a ModelScope dataset. Needs the package `modelscope`."""
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise HubUnreachable(name, 'ModelScope needs `pip install "auto-round[modelscope]"`') from error
    try:
        sets = [MsDataset.load(name, subset_name="default", split=s, use_streaming=True) for s in splits]
        rows = _round_robin([iter(one.to_hf_dataset()) for one in sets], name)
    except Exception as error:  # whatever `modelscope` and the HTTP library raise
        raise _as_data_error(name, error) from error
    rng = random.Random(seed)
    buffer = list(itertools.islice(rows, dataset.buffer_size))
    for row in rows:
        i = rng.randrange(len(buffer))
        yield buffer[i]
        buffer[i] = row
    rng.shuffle(buffer)
    yield from buffer


def _round_robin(streams: list[Iterator[Any]], name: str) -> Iterator[Any]:
    """Yield a row of each stream in turn; a failure of the network is raised as DataError."""
    try:
        while streams:
            for stream in list(streams):
                try:
                    yield next(stream)
                except StopIteration:
                    streams.remove(stream)
    except DataError:
        raise
    except Exception as error:  # whatever the stream's libraries raise
        raise _as_data_error(name, error) from error


def _as_data_error(name: str, error: Exception) -> DataError:
    """HubUnreachable for a network error, else a DataError that repeats the library's reason."""
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
