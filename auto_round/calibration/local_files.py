"""Documents from local files: json, jsonl, txt, parquet, or a folder of them.

Each reader gives its documents in an order drawn from a seed, and reads or parses as little as it can: lines of a
jsonl and row groups of a parquet file are read only when they are asked for.

json: a list of strings or objects; one object with lists (columns), e.g. `{"text": [...]}`; or one object.
jsonl: one string or object per line.
txt: documents are separated by two blank lines or more when the text has such a place; else by one blank line; else
each line is a document.
parquet: one row per document.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_round.calibration.documents import Document, document_from_row
from auto_round.errors import DataError, nearest
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
            raise DataError(f"folder {name!r} holds no {_endings()} file; name the file, or put one there")
        random.Random(f"{seed}:{len(files)}").shuffle(files)
        for file in files:
            yield from read_local(str(file), seed)
        return
    if not path.is_file():
        raise DataError(f"dataset file {name!r} does not exist{_neighbours(path)}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"dataset file {name!r} has the ending {path.suffix!r}; use {_endings()}")
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
    rows = _rows(data, path)
    order = list(range(len(rows)))
    rng.shuffle(order)
    for i in order:
        yield document_from_row(rows[i], f"entry {i} of {str(path)!r}")


def _rows(data: Any, path: Path) -> list[Any]:
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


def _endings() -> str:
    return ", ".join(READERS)


def _neighbours(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f": there is no folder {str(path.parent)!r}; check the path"
    return nearest(path.name, names) or "; check the path"
