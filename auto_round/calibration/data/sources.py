"""Open a calibration dataset by name or from a Python object, and return a stream of token samples.

A name is a registered dataset, a hub id, or a local file or folder. File readers yield documents in an order drawn
from a seed, and read as little as possible:

json: a list of strings or objects; one object with lists (columns), e.g. `{"text": [...]}`; or one object.
jsonl: one string or object per line.
txt: documents are separated by two or more blank lines if the text has any; else by one blank line; else each line is
a document.
parquet: one row per document.

`builtin` is the text inside the package: 1.3 MB of public-domain English (see `data/SOURCES.md`), enough for 128
samples of 2048 tokens. Its documents have about a thousand tokens, so they are joined by default (`concat=True`).
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from auto_round import envs
from auto_round.calibration.data.documents import (
    Document,
    TokenDocument,
    document_from_row,
    documents_from_item,
    documents_from_object,
)
from auto_round.calibration.data.hub import DEFAULT_DATASET, MODELSCOPE_DEFAULT, HubUnreachable, unlisted_hub_documents
from auto_round.calibration.data.spec import DATASETS, DatasetSpec, parse_dataset_string, register_dataset
from auto_round.calibration.data.tokens import DocumentStats, Sample, samples_of
from auto_round.errors import ConfigError, DataError, nearest
from auto_round.logger import logger


def looks_like_path(name: str) -> bool:
    """Whether a dataset name is a local file: it exists, has a file suffix, or is written as a path."""
    return (
        Path(name).suffix.lower() in (*READERS, ".csv", ".arrow", ".gz", ".zst", ".bin", ".pt", ".tsv")
        or name.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or "\\" in name
        or Path(name).expanduser().exists()
    )


def read_local(name: str, seed: int) -> Iterator[Document]:
    """Yield the documents of the file or folder `name` (`~` is expanded) in an order fixed by `seed`.

    Raises DataError for a missing or damaged file, an unknown suffix, or rows without text.
    """
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
        raise DataError(f"dataset file {name!r} does not exist{_similar_names(path)}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"dataset file {name!r} has the suffix {path.suffix!r}; use {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix.lower()](path, random.Random(seed))
    except UnicodeDecodeError as error:
        raise DataError(f"dataset file {name!r} is not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise DataError(f"dataset file {name!r} cannot be read: {error}") from error


def split_text(text: str) -> list[str]:
    """Split plain text into documents; the module docstring describes the separators."""
    text = text.replace("\r\n", "\n")
    if "\n\n\n" in text:
        parts, kind = text.split("\n\n\n"), "two blank lines"
    elif "\n\n" in text:
        parts, kind = text.split("\n\n"), "a blank line"
    else:
        parts, kind = text.split("\n"), "line breaks"
    documents = [p.strip("\n") for p in parts if p.strip()]
    logger.debug("text split at %s into %d documents", kind, len(documents))
    return documents


def _read_txt(path: Path, rng: random.Random) -> Iterator[Document]:
    documents = split_text(path.read_text(encoding="utf-8"))
    rng.shuffle(documents)
    yield from documents


def _read_json(path: Path, rng: random.Random) -> Iterator[Document]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if _is_jsonl(path):
            yield from _read_jsonl(path, rng)
            return
        raise DataError(
            f"dataset file {str(path)!r} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "write a list of strings, or a list of objects with a 'text' key"
        ) from error
    yield from _shuffled(_json_rows(data, path), rng, "entry {} of " + repr(str(path)))


def _shuffled(rows: Sequence[Any], rng: random.Random, where: str) -> Iterator[Document]:
    """Yield the documents of rows in random order; `where` has a place for the row's index."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    for i in order:
        yield document_from_row(rows[i], where.replace("{}", str(i), 1))


def _json_rows(data: Any, path: Path) -> list[Any]:
    """Rows of a parsed JSON value. An object whose lists have equal lengths is a table of columns."""
    if isinstance(data, list):
        return data
    if not isinstance(data, Mapping):
        raise DataError(f"dataset file {str(path)!r} has a {type(data).__name__}; write a list or an object of lists")
    if data.get("messages") and isinstance(data["messages"][0], Mapping):
        return [data]
    columns = {k: v for k, v in data.items() if isinstance(v, list)}
    if not columns or ("input_ids" in data and data["input_ids"] and isinstance(data["input_ids"][0], int)):
        return [data]
    lengths = {k: len(v) for k, v in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"dataset file {str(path)!r} has columns of different lengths: {lengths}; make them equal")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _is_jsonl(path: Path) -> bool:
    """Whether the first non-empty line is a JSON value by itself (many `.json` files are jsonl)."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    return isinstance(json.loads(line), (dict, str, list))
                except json.JSONDecodeError:
                    return False
    return False


def _read_jsonl(path: Path, rng: random.Random) -> Iterator[Document]:
    offsets: list[tuple[int, int]] = []  # (byte offset, line number) of every non-empty line
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append((offset, number))
            offset += len(line)
        rng.shuffle(offsets)
        for offset, number in offsets:
            file.seek(offset)
            where = f"line {number} of {str(path)!r}"
            try:
                row = json.loads(file.readline().decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not valid JSON: {error.msg}; write one object per line") from error
            yield document_from_row(row, where)


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
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
"""Reader of each file suffix."""


def _similar_names(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f": there is no folder {str(path.parent)!r}; check the path"
    return nearest(path.name, names) or "; check the path"


# The calibration text inside the package.

BUILTIN = "builtin"
_HELD_OUT_EVERY = 16  # every sixteenth document is held out for evaluation, so that each source is represented


def held_out_documents() -> list[str]:
    """The documents that calibration never reads, about 20 thousand tokens. Raises DataError as `builtin_documents`."""
    return builtin_documents()[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]


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


@register_dataset(
    BUILTIN,
    description="mixed public-domain English text, short documents joined",
    where="inside the package",
    concat=True,
)
def builtin(seed: int, split: str | None) -> Iterator[str]:
    """Yield the documents of the packaged text in an order fixed by `seed`. The only split is `train`."""
    if split not in (None, "train"):
        raise DataError(f"dataset 'builtin' has no split {split!r}; leave split out")
    documents = [d for i, d in enumerate(builtin_documents()) if (i + 1) % _HELD_OUT_EVERY]
    random.Random(seed).shuffle(documents)
    yield from documents


# Least number of documents read from a dataset before giving up; limits the time spent on a set of short texts.
_MIN_DOCUMENT_LIMIT = 50_000


@dataclass(frozen=True)
class SampleRequest:
    """What is requested of every dataset: tokens per sample, number of samples, seed, and the tokenizer."""

    tokenizer: Any
    seqlen: int
    nsamples: int
    seed: int

    @property
    def document_limit(self) -> int:
        """Most documents read from one dataset."""
        return max(_MIN_DOCUMENT_LIMIT, 100 * self.nsamples)


@dataclass(frozen=True)
class OpenDataset:
    """A dataset being read: its specification, the stream of samples, and statistics of the documents read."""

    spec: DatasetSpec
    tally: DocumentStats
    stream: Iterator[Sample]


def open_named(dataset: str | None, request: SampleRequest, platform: str) -> list[OpenDataset]:
    """Open the datasets of a dataset string, and read the first document of each.

    None, or the bare name of the default dataset, is replaced by the packaged text when it cannot be read, with a
    warning. Names are checked before data is read. Raises ConfigError and DataError as `prepare_calibration` does.
    """
    default = MODELSCOPE_DEFAULT if platform == "model_scope" or envs.get("AR_USE_MODELSCOPE") else DEFAULT_DATASET
    specs = [DatasetSpec(default)] if dataset is None else parse_dataset_string(dataset)
    for spec in specs:
        _check_name(spec)
    if len(specs) > 1 or not specs[0].bare or specs[0].name not in (default, DEFAULT_DATASET):
        return [_open(spec, request) for spec in specs]
    try:
        return [_open(DatasetSpec(default), request)]
    except DataError as error:
        logger.warning(
            "the default calibration set %s cannot be used (%s); calibrating with the packaged text (builtin)",
            default,
            error.reason if isinstance(error, HubUnreachable) else str(error),
        )
        return [_open(DatasetSpec(BUILTIN), request)]


def open_object(dataset: Any, request: SampleRequest) -> tuple[OpenDataset, int]:
    """Open a Python object as a dataset; returns it and the tokens per sample.

    These are fewer than `request.seqlen` when all samples are token ids of one shorter length. A list of strings is
    shuffled; token ids and iterables keep their order.
    """
    documents: Iterator[Document] = documents_from_object(dataset, request.seed)
    head = list(itertools.islice(documents, request.nsamples))
    if not head:
        raise DataError("the given dataset is empty; give some strings or token ids")
    if isinstance(dataset, (list, tuple)) and isinstance(head[0], str):
        head.extend(documents)
        random.Random(request.seed).shuffle(head)
    seqlen = request.seqlen
    lengths = {len(d.ids) if isinstance(d, TokenDocument) else 0 for d in head}
    if len(lengths) == 1 and 0 < (length := lengths.pop()) < seqlen:
        logger.info("all given samples have %d tokens; using seqlen=%d instead of %d", length, length, seqlen)
        seqlen = length
    spec = DatasetSpec("the given data")
    tally = DocumentStats(spec.name, seqlen, named=False)
    stream = itertools.chain(head, documents)
    samples = samples_of(stream, request.tokenizer, tally, most_documents=request.document_limit)
    return OpenDataset(spec, tally, samples), seqlen


def _open(spec: DatasetSpec, request: SampleRequest) -> OpenDataset:
    documents = _documents(spec, request)
    first = list(itertools.islice(documents, 1))  # an unreadable dataset raises here
    entry = DATASETS.get(spec.name)
    concat = spec.concat if spec.concat is not None else bool(entry and entry.concat)
    tally = DocumentStats(spec.name, request.seqlen, concat)
    renders_itself = entry is not None and "apply_chat_template" in entry.takes
    stream = samples_of(
        itertools.chain(first, documents),
        request.tokenizer,
        tally,
        apply_chat_template=spec.apply_chat_template and not renders_itself,
        system_prompt=spec.system_prompt,
        most_documents=request.document_limit,
    )
    return OpenDataset(spec, tally, stream)


def _check_name(spec: DatasetSpec) -> None:
    """Raise when a name cannot be a dataset, before any data is read."""
    if spec.name in DATASETS:
        return
    if looks_like_path(spec.name):
        if spec.splits:
            raise ConfigError(
                f"dataset {spec.name!r} is a local file and has no splits, but {'+'.join(spec.splits)!r} was given; "
                "leave it out"
            )
    elif spec.name.count("/") != 1 or not all(spec.name.split("/")):
        raise DataError(
            f"dataset {spec.name!r} is not known{nearest(spec.name, DATASETS)} Known: {', '.join(DATASETS)}; "
            f"or a {', '.join(READERS)} file, or a hub id such as org/name"
        )


def _documents(spec: DatasetSpec, request: SampleRequest) -> Iterator[Document]:
    split = "+".join(spec.splits) or None
    entry = DATASETS.get(spec.name)
    if entry is not None:
        rows = entry.documents(
            tokenizer=request.tokenizer,
            seqlen=request.seqlen,
            dataset_name=spec.name,
            split=split,
            seed=request.seed,
            apply_chat_template=spec.apply_chat_template,
            system_prompt=spec.system_prompt,
        )
        for i, row in enumerate(rows):
            if isinstance(row, (str, TokenDocument)):
                yield row
            else:
                yield from documents_from_item(row, f"row {i} of dataset {spec.name!r}")
    elif looks_like_path(spec.name):
        yield from read_local(spec.name, request.seed)
    else:
        yield from unlisted_hub_documents(spec.name, split, request.seed)
