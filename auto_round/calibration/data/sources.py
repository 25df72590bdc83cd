"""Open a calibration dataset by name or from a Python object, and return a stream of token samples.

A name is a registered dataset, a hub id, or a local file (json, jsonl, txt, parquet, or a folder of them). Each
file reader yields documents in an order drawn from a seed, and reads as little as possible:

json: a list of strings or objects; one object with lists (columns), e.g. `{"text": [...]}`; or one object.
jsonl: one string or object per line.
txt: documents are separated by two or more blank lines if the text has any; else by one blank line; else each
line is a document.
parquet: one row per document.

`builtin` is the text inside the package, for machines without a hub: 1.3 MB of public-domain English (see
`data/SOURCES.md`), enough for 128 samples of 2048 tokens. Its documents have about a thousand tokens, so they
are joined by default (`concat=True`).
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """Whether a dataset name can only mean a local file: it exists, has a file's ending, or is written as a path."""
    return (
        Path(name).suffix.lower() in (*READERS, ".csv", ".arrow", ".gz", ".zst", ".bin", ".pt", ".tsv")
        or name.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or "\\" in name
        or Path(name).expanduser().exists()
    )


def read_local(name: str, seed: int) -> Iterator[Document]:
    """Documents of the file or folder `name` (`~` is expanded), in an order that `seed` fixes.

    The file is opened when the first document is asked for. Raises DataError for a missing or damaged file, an
    unknown ending, or rows without text.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise DataError(f"folder {name!r} holds no {_suffixes()} file; name the file, or put one there")
        random.Random(f"{seed}:{len(files)}").shuffle(files)
        for file in files:
            yield from read_local(str(file), seed)
        return
    if not path.is_file():
        raise DataError(f"dataset file {name!r} does not exist{_similar_names(path)}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"dataset file {name!r} has the ending {path.suffix!r}; use {_suffixes()}")
    try:
        yield from READERS[path.suffix.lower()](path, random.Random(seed))
    except UnicodeDecodeError as error:
        raise DataError(f"dataset file {name!r} is not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise DataError(f"dataset file {name!r} cannot be read: {error}") from error


def split_text(text: str) -> list[str]:
    """Documents of a plain text; see the module's text for what separates them."""
    text = text.replace("\r\n", "\n")
    if "\n\n\n" in text:
        parts, kind = text.split("\n\n\n"), "two blank lines"
    elif "\n\n" in text:
        parts, kind = text.split("\n\n"), "a blank line"
    else:
        parts, kind = text.split("\n"), "line ends"
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
    rows = _json_rows(data, path)
    order = list(range(len(rows)))
    rng.shuffle(order)
    for i in order:
        yield document_from_row(rows[i], f"entry {i} of {str(path)!r}")


def _json_rows(data: Any, path: Path) -> list[Any]:
    """Rows of a parsed JSON value. An object whose lists are of one length is a table of columns."""
    if isinstance(data, list):
        return data
    if not isinstance(data, Mapping):
        raise DataError(f"dataset file {str(path)!r} holds a {type(data).__name__}; write a list or an object of lists")
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
    """Whether the first line that is not blank is a JSON value by itself (many `.json` files are jsonl)."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    return isinstance(json.loads(line), (dict, str, list))
                except json.JSONDecodeError:
                    return False
    return False


def _read_jsonl(path: Path, rng: random.Random) -> Iterator[Document]:
    places: list[tuple[int, int]] = []  # (byte offset, line number) of every line that is not blank
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                places.append((offset, number))
            offset += len(line)
        rng.shuffle(places)
        for offset, number in places:
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
            order = list(range(len(rows)))
            rng.shuffle(order)
            for i in order:
                yield document_from_row(rows[i], f"row {i} of group {group} of {str(path)!r}")


READERS: dict[str, Callable[[Path, random.Random], Iterator[Document]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
"""Reader of each file ending."""


def _suffixes() -> str:
    return ", ".join(READERS)


def _similar_names(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f": there is no folder {str(path.parent)!r}; check the path"
    return nearest(path.name, names) or "; check the path"


# `builtin`: the calibration text inside the package, for machines that reach no hub.
#
# 1.3 MB of public-domain English: reference, technical, fiction and scripture (see `data/SOURCES.md`), enough for 128
# samples of 2048 tokens. Documents are about a thousand tokens long, so they are joined by default (`concat=True`).

BUILTIN = "builtin"
"""The name of the packaged text."""


HELD_OUT_EVERY = 16
"""Every sixteenth document is kept for measuring, so that each source has its share there too."""


def _held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def held_out_documents() -> list[str]:
    """The documents that calibration never reads, about 20 thousand tokens. Raises DataError as `builtin_documents`."""
    return [d for i, d in enumerate(builtin_documents()) if _held_out(i)]


def builtin_documents() -> list[str]:
    """All documents of the packaged text, in the order of the file. Raises DataError when the file is not there."""
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
    """The packaged text's documents in an order that `seed` fixes. There is one split, `train`."""
    if split not in (None, "train"):
        raise DataError(f"dataset 'builtin' has no split {split!r}; leave split out")
    documents = [d for i, d in enumerate(builtin_documents()) if not _held_out(i)]
    random.Random(seed).shuffle(documents)
    yield from documents


# Opening a dataset: from its name or from a Python object to a stream of samples.

# Documents read from one dataset before giving up on it, at least; a set of short texts would else be read to its end.
_MOST_DOCUMENTS = 50_000


@dataclass(frozen=True)
class SampleRequest:
    """What is wanted of every dataset: tokens per sample, samples in all, seed, and the tokenizer that makes them."""

    tokenizer: Any
    seqlen: int
    nsamples: int
    seed: int


@dataclass(frozen=True)
class OpenDataset:
    """A dataset being read: what was asked, the samples as they are made, and the count of what was read."""

    spec: DatasetSpec
    tally: DocumentStats
    stream: Iterator[Sample]


def open_named(dataset: str | None, request: SampleRequest, platform: str) -> list[OpenDataset]:
    """The datasets of a dataset string, each with its first document read.

    None, or the bare name of the default set, may be replaced by the packaged text when it cannot be read; a line in
    the log says so. Names are checked before any data is read. Raises ConfigError and DataError as
    `prepare_calibration` says.
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
        reason = error.reason if isinstance(error, HubUnreachable) else str(error)
        logger.warning(
            "the default calibration set %s cannot be used (%s); calibrating with the packaged text (builtin)",
            default,
            reason,
        )
        return [_open(DatasetSpec(BUILTIN), request)]


def open_object(dataset: Any, request: SampleRequest) -> tuple[OpenDataset, int]:
    """A user's Python object as a dataset, and the tokens per sample, which may be fewer than requested.

    They are fewer when the samples are token ids that all have one length below `request.seqlen`: whoever made them
    chose that length. A list of strings is shuffled; token ids and iterables keep their order.
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
        logger.info("all given samples have %d tokens; using seqlen=%d in place of %d", length, length, seqlen)
        seqlen = length
    spec = DatasetSpec("the given data")
    tally = DocumentStats(spec.name, seqlen, named=False)
    chained = itertools.chain(head, documents)
    return OpenDataset(
        spec, tally, samples_of(chained, request.tokenizer, tally, most_documents=_limit(request))
    ), seqlen


def _open(spec: DatasetSpec, request: SampleRequest) -> OpenDataset:
    documents = _documents(spec, request)
    first = list(itertools.islice(documents, 1))  # a set that cannot be read says so here
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
        most_documents=_limit(request),
    )
    return OpenDataset(spec, tally, stream)


def _limit(request: SampleRequest) -> int:
    return max(_MOST_DOCUMENTS, 100 * request.nsamples)


def _check_name(spec: DatasetSpec) -> None:
    """Raise when a name can mean nothing, before any data is read."""
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
        return _registered(rows, spec.name)
    if looks_like_path(spec.name):
        return read_local(spec.name, request.seed)
    return unlisted_hub_documents(spec.name, split, request.seed)


def _registered(rows: Iterable[Any], name: str) -> Iterator[Document]:
    """Documents of what a registered function gives: these, or rows and batches as users give them."""
    for i, row in enumerate(rows):
        if isinstance(row, (str, TokenDocument)):
            yield row
        else:
            yield from documents_from_item(row, f"row {i} of dataset {name!r}")
