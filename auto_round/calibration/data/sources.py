"""Documents of local files and folders, and of the text inside the package, in an order drawn from a seed.

`builtin` is the text inside the package: 1.3 MB of public-domain English (see `data/SOURCES.md`), enough for 128
samples of 2048 tokens. Its documents have about a thousand tokens, so they are joined by default.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from auto_round.calibration.data.documents import Document, documents_from_item
from auto_round.calibration.data.spec import register_dataset
from auto_round.errors import DataError, nearest
from auto_round.logger import logger

BUILTIN = "builtin"
_HELD_OUT_EVERY = 16  # every sixteenth document is held out for evaluation, so that each source is represented


def looks_like_path(name: str) -> bool:
    """Whether a dataset name is a local file: it exists, has a file suffix, or is written as a path."""
    return (
        Path(name).suffix.lower() in (*READERS, ".csv", ".arrow", ".gz", ".zst", ".bin", ".pt", ".tsv")
        or name.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or "\\" in name
        or Path(name).expanduser().exists()
    )


def read_local(name: str, seed: int) -> Iterator[Document]:
    """Yield the documents of the file or folder `name` (`~` is expanded), reading only as far as needed.

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


_DESCRIPTION = "mixed public-domain English text, short documents joined"


@register_dataset(BUILTIN, description=_DESCRIPTION, where="inside the package", concat=True)
def builtin(seed: int, split: str | None) -> Iterator[str]:
    """Yield the documents of the packaged text in an order fixed by `seed`. The only split is `train`."""
    if split not in (None, "train"):
        raise DataError(f"dataset 'builtin' has no split {split!r}; leave split out")
    documents = [d for i, d in enumerate(builtin_documents()) if (i + 1) % _HELD_OUT_EVERY]
    random.Random(seed).shuffle(documents)
    yield from documents
