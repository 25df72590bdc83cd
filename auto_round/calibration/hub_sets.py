"""The data sets that have a name here, and any other text set of the Hugging Face hub.

One row of a table per set: which hub, which splits, which columns. Loading scripts of a set are never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.calibration.documents import Document, document_from_row
from auto_round.calibration.hub_access import hub_rows, modelscope_rows
from auto_round.calibration.registry import register_dataset
from auto_round.errors import DataError

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


def any_hub_set(name: str, split: str | None, seed: int) -> Iterator[Document]:
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
