"""Where documents come from: local files, the text inside the package (see `data/SOURCES.md`), and hubs.

The client libraries of hubs retry for tens of seconds without a network, so one short request is made first. Without a
hub, a copy in the local caches is used. Loading scripts of a dataset are never run.
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from auto_round.calibration.data.documents import Document, document_from_row, documents_from_item
from auto_round.calibration.data.spec import register_dataset
from auto_round.errors import DataError, nearest
from auto_round.logger import logger

BUILTIN = "builtin"
_HELD_OUT_EVERY = 16  # every sixteenth document is held out for evaluation, so that each source is represented
_DESCRIPTION = "mixed public-domain English text, short documents joined"
HUB_TIMEOUT_S = 5.0  # longest wait for an answer of the hub, in seconds
_ANSWER_VALID_S = 60.0
_hub_answers: dict[str, tuple[float, str]] = {}
DEFAULT_DATASET = "NeelNanda/pile-10k"  # the dataset that is used when none is given
MODELSCOPE_DEFAULT = "swift/pile-val-backup"  # the same on the platform ModelScope


def looks_like_path(name: str) -> bool:
    """Whether a dataset name is a local file: it exists, has a file suffix, or is written as a path."""
    return (
        Path(name).suffix.lower() in (*READERS, ".csv", ".arrow", ".gz", ".zst", ".bin", ".pt", ".tsv")
        or name.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or "\\" in name
        or Path(name).expanduser().exists()
    )


def read_local(name: str, seed: int) -> Iterator[Document]:
    """Yield the documents of a file or folder in an order drawn from `seed`. Raises DataError."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise DataError(f"folder {name!r} has no {', '.join(READERS)} file; name the file, or put one there")
        random.Random(f"{seed}:{len(files)}").shuffle(files)
        for file in files:
            yield from read_local(str(file), seed)
        return
    if not path.is_file():
        try:
            names = [p.name for p in path.parent.iterdir()]
        except OSError:
            problem = f": there is no folder {str(path.parent)!r}; check the path"
        else:
            problem = nearest(path.name, names) or "; check the path"
        raise DataError(f"dataset file {name!r} does not exist{problem}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"dataset file {name!r} has the suffix {path.suffix!r}; use {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix.lower()](path, random.Random(seed))
    except UnicodeDecodeError as error:
        raise DataError(f"dataset file {name!r} is not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise DataError(f"dataset file {name!r} cannot be read: {error}") from error


def split_text(text: str) -> list[str]:
    """Split plain text into documents at two blank lines or more, else at one blank line, else at line ends."""
    text = text.replace("\r\n", "\n")
    separator = next((s for s in ("\n\n\n", "\n\n") if s in text), "\n")
    documents = [part.strip("\n") for part in text.split(separator) if part.strip()]
    logger.debug("text split at %r into %d documents", separator, len(documents))
    return documents


def _read_txt(path: Path, rng: random.Random) -> Iterator[Document]:
    documents = split_text(path.read_text(encoding="utf-8"))
    rng.shuffle(documents)
    yield from documents


def _read_json(path: Path, rng: random.Random) -> Iterator[Document]:
    """A list of rows, an object whose lists are columns, or one row; or jsonl, as many `.json` files are."""
    text, where = path.read_text(encoding="utf-8-sig"), f"dataset file {str(path)!r}"
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_json_row(next((line for line in text.split("\n") if line.strip()), "")):
            yield from _read_jsonl(path, rng)
            return
        raise DataError(
            f"{where} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); write a list of "
            "strings, or a list of objects with a 'text' key"
        ) from error
    if isinstance(data, Mapping):
        columns = {k: v for k, v in data.items() if isinstance(v, list)}
        chat = data.get("messages") and isinstance(data["messages"][0], Mapping)
        if chat or not columns or (data.get("input_ids") and isinstance(data["input_ids"][0], int)):
            data = [data]
        else:
            lengths = {k: len(v) for k, v in columns.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(f"{where} has columns of different lengths: {lengths}; make them equal")
            data = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    elif not isinstance(data, list):
        raise DataError(f"{where} has a {type(data).__name__}; write a list or an object of lists")
    yield from _shuffled(data, rng, "entry {} of " + repr(str(path)))


def _is_json_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, str, list))
    except json.JSONDecodeError:
        return False


def _shuffled(rows: Sequence[Any], rng: random.Random, where: str) -> Iterator[Document]:
    """Yield the documents of rows in random order; `where` has a place for the row's index."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    for i in order:
        yield from documents_from_item(rows[i], where.replace("{}", str(i), 1))


def _read_jsonl(path: Path, rng: random.Random) -> Iterator[Document]:
    lines: list[tuple[int, int]] = []  # (byte offset, line number) of every non-empty line
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                lines.append((offset, number))
            offset += len(line)
        rng.shuffle(lines)
        for offset, number in lines:
            file.seek(offset)
            where = f"line {number} of {str(path)!r}"
            try:
                row = json.loads(file.readline().decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not valid JSON: {error.msg}; write one object per line") from error
            yield from documents_from_item(row, where)


def _read_parquet(path: Path, rng: random.Random) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f'reading {str(path)!r} needs pyarrow; run `pip install "auto-round[data]"`') from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"dataset file {str(path)!r} is not a parquet file: {error}") from error
    with file:
        groups = list(range(file.num_row_groups))
        rng.shuffle(groups)
        for group in groups:
            rows = file.read_row_group(group).to_pylist()
            yield from _shuffled(rows, rng, f"row {{}} of group {group} of " + repr(str(path)))


READERS: dict[str, Callable[[Path, random.Random], Iterator[Document]]] = {
    ".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_txt, ".parquet": _read_parquet,
}  # fmt: skip
"""Reader of each file suffix."""


def builtin_documents() -> list[str]:
    """All documents of the packaged text in file order. Raises DataError when the file is missing or damaged."""
    file = resources.files("auto_round.calibration") / "data" / "builtin.txt.xz"
    try:
        text = lzma.decompress(file.read_bytes()).decode("utf-8")
    except (FileNotFoundError, lzma.LZMAError) as error:
        raise DataError(
            f"the packaged calibration text is missing or damaged ({error}); install auto-round again"
        ) from error
    return text.strip("\n").split("\n\n\n")


def held_out_documents() -> list[str]:
    """The documents that calibration never reads, about 20 thousand tokens. Raises DataError as `builtin_documents`."""
    return builtin_documents()[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]


@register_dataset(BUILTIN, description=_DESCRIPTION, where="inside the package", concat=True)
def builtin(seed: int, split: str | None) -> Iterator[str]:
    """Yield the documents of the packaged text in an order fixed by `seed`. The only split is `train`."""
    if split not in (None, "train"):
        raise DataError(f"dataset 'builtin' has no split {split!r}; leave split out")
    documents = [d for i, d in enumerate(builtin_documents()) if (i + 1) % _HELD_OUT_EVERY]
    random.Random(seed).shuffle(documents)
    yield from documents


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
    """Rows of all `splits` of a Hugging Face dataset in turn, shuffled within a moving buffer."""
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
