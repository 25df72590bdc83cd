"""Calibration data: token samples of equal length from a dataset string, texts, token ids or a DataLoader.

`prepare_calibration` is the entry point, `register_dataset` adds a dataset; docs/datasets.md describes dataset strings.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from auto_round import envs
from auto_round.calibration.data.documents import (
    IGNORED_LABEL,
    Document,
    TokenDocument,
    documents_from_item,
    documents_from_object,
)
from auto_round.calibration.data.hub import DEFAULT_DATASET, MODELSCOPE_DEFAULT, HubDataset, HubUnreachable
from auto_round.calibration.data.sources import BUILTIN, READERS, looks_like_path, read_local
from auto_round.calibration.data.spec import (
    DATASETS,
    DatasetSpec,
    parse_dataset_string,
    register_dataset,
    samples_per_dataset,
)
from auto_round.calibration.data.tokens import DocumentStats, Sample, samples_of
from auto_round.errors import ConfigError, DataError, nearest
from auto_round.logger import logger

__all__ = [
    "DATASETS",
    "DEFAULT_DATASET",
    "CalibrationData",
    "DatasetSpec",
    "available_datasets",
    "parse_dataset_string",
    "prepare_calibration",
    "register_dataset",
]

# Least number of documents read from a dataset before giving up; limits the time spent on a set of short texts.
_MIN_DOCUMENT_LIMIT = 50_000


@dataclass(frozen=True)
class CalibrationData:
    """Samples and their sources.

    Attributes:
        samples: one dict per sample: `input_ids` and `attention_mask` int64 [seqlen], and `labels` int64 [seqlen]
            (-100: ignored by the loss) in all of them when the user gave some.
        seqlen: tokens per sample; may be less than requested.
        sources: name and number of samples of each dataset used.
    """

    samples: list[Sample]
    seqlen: int
    sources: tuple[tuple[str, int], ...]


def prepare_calibration(
    dataset: Any, tokenizer: Any, *, seqlen: int, nsamples: int, seed: int, model_max_length: int | None = None,
    vocab_size: int | None = None, platform: str = "hf",
) -> CalibrationData:  # fmt: skip
    """Read, tokenize and cut calibration data. The same arguments give the same samples.

    Args:
        dataset: None for the default set, a dataset string, a list of strings, a list of token ids (lists, tensors,
            or dicts with `input_ids` and optional `attention_mask` and `labels`), or a DataLoader or other iterable of
            those. Batches are split into samples.
        tokenizer: a Transformers tokenizer; may be None for token ids.
        seqlen: tokens per sample. Lowered, with a log line, to `model_max_length`, and to the common length of given
            token ids when that is shorter.
        nsamples: samples requested. When there are fewer, a warning gives the reason.
        seed: determines the selection and order of samples.
        model_max_length: number of positions that the model supports.
        vocab_size: rows of the model's embedding; larger token ids raise DataError.
        platform: "hf" or "model_scope", where the default set is downloaded from; AR_USE_MODELSCOPE also selects
            ModelScope.

    Raises ConfigError for a wrong argument or dataset string, DataError when data cannot be read or no sample is left.
    When the default set cannot be downloaded, the bundled text is used, with a log line.
    """
    if seqlen < 1 or nsamples < 1:
        raise ConfigError(f"seqlen={seqlen} and nsamples={nsamples} must both be 1 or more")
    if model_max_length is not None and seqlen > model_max_length:
        logger.warning(
            "seqlen=%d is more than the model's %d positions; using %d", seqlen, model_max_length, model_max_length
        )
        seqlen = model_max_length
    request = _Request(tokenizer, seqlen, nsamples, seed)
    named = dataset is None or isinstance(dataset, str)
    opened = _open_named(dataset, request, platform) if named else [_open_object(dataset, request)]
    samples, sources = _collect(opened, nsamples, seed)
    if vocab_size is not None:
        largest = max(int(s["input_ids"].max()) for s in samples)
        if largest >= vocab_size:
            raise DataError(
                f"the calibration data holds token id {largest}, and the model knows ids below {vocab_size}; "
                "use the model's own tokenizer"
            )
    return CalibrationData(samples, opened[0].stats.seqlen, sources)


def available_datasets() -> list[tuple[str, str, str]]:
    """`(name, description, source)` of every registered dataset by name, then of the other kinds of dataset string."""
    rows = sorted(((e.name, e.description, e.where) for e in DATASETS.values()), key=lambda row: row[0].lower())
    rows.append(
        (f"a path ({', '.join(READERS)})", "your own texts, conversations or token ids", "local file or folder")
    )
    rows.append(("any hub id org/name", "a set with a column such as text or messages", "Hugging Face hub"))
    return rows


@dataclass(frozen=True)
class _Request:
    """What is requested of every dataset: tokens per sample, number of samples, seed, and the tokenizer."""

    tokenizer: Any
    seqlen: int
    nsamples: int
    seed: int


@dataclass(frozen=True)
class _OpenDataset:
    """A dataset being read: its specification, statistics of the documents read, and the stream of samples."""

    spec: DatasetSpec
    stats: DocumentStats
    stream: Iterator[Sample]


def _open(
    spec: DatasetSpec, documents: Iterable[Document], stats: DocumentStats, request: _Request, template: bool = False
) -> _OpenDataset:
    limit = max(_MIN_DOCUMENT_LIMIT, 100 * request.nsamples)
    stream = samples_of(itertools.islice(documents, limit), request.tokenizer, stats, template, spec.system_prompt)
    return _OpenDataset(spec, stats, stream)


def _open_object(dataset: Any, request: _Request) -> _OpenDataset:
    """Open a Python object as a dataset.

    Samples have fewer tokens than `request.seqlen` when all are token ids of one shorter length. A list of strings is
    shuffled; token ids and iterables keep their order.
    """
    documents = documents_from_object(dataset, request.seed)
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
    stats = DocumentStats(spec.name, seqlen, named=False)
    return _open(spec, itertools.chain(head, documents), stats, request)


def _open_named(dataset: str | None, request: _Request, platform: str) -> list[_OpenDataset]:
    """Open the datasets of a dataset string, and read the first document of each.

    None, or the bare name of the default dataset, is replaced by the packaged text when it cannot be read, with a
    warning. Names are checked before data is read.
    """
    default = MODELSCOPE_DEFAULT if platform == "model_scope" or envs.get("AR_USE_MODELSCOPE") else DEFAULT_DATASET
    specs = [DatasetSpec(default)] if dataset is None else parse_dataset_string(dataset)
    for spec in specs:
        _check_name(spec)
    if len(specs) > 1 or not specs[0].bare or specs[0].name not in (default, DEFAULT_DATASET):
        return [_open_spec(spec, request) for spec in specs]
    try:
        return [_open_spec(DatasetSpec(default), request)]
    except DataError as error:
        logger.warning(
            "the default calibration set %s cannot be used (%s); calibrating with the packaged text (builtin)",
            default,
            error.reason if isinstance(error, HubUnreachable) else str(error),
        )
        return [_open_spec(DatasetSpec(BUILTIN), request)]


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


def _open_spec(spec: DatasetSpec, request: _Request) -> _OpenDataset:
    """Open one dataset of a dataset string: a registered one, a local file, or a hub id."""
    entry = DATASETS.get(spec.name)
    split = "+".join(spec.splits) or None
    if entry is not None:
        rows = entry.documents(
            tokenizer=request.tokenizer, seqlen=request.seqlen, dataset_name=spec.name, split=split, seed=request.seed,
            apply_chat_template=spec.apply_chat_template, system_prompt=spec.system_prompt,
        )  # fmt: skip
        documents = _registered_documents(rows, spec.name)
    elif looks_like_path(spec.name):
        documents = read_local(spec.name, request.seed)
    else:
        documents = HubDataset((spec.name,), column=None).documents(spec.name, split, request.seed)
    first = list(itertools.islice(documents, 1))  # an unreadable dataset raises here
    concat = spec.concat if spec.concat is not None else entry is not None and entry.concat
    stats = DocumentStats(spec.name, request.seqlen, concat)
    template = spec.apply_chat_template and not (entry is not None and "apply_chat_template" in entry.takes)
    return _open(spec, itertools.chain(first, documents), stats, request, template)


def _registered_documents(rows: Iterable[Any], name: str) -> Iterator[Document]:
    for i, row in enumerate(rows):
        if isinstance(row, TokenDocument):
            yield row
        else:
            yield from documents_from_item(row, f"row {i} of dataset {name!r}")


def _collect(opened: list[_OpenDataset], nsamples: int, seed: int) -> tuple[list[Sample], tuple[tuple[str, int], ...]]:
    """Read each dataset's share of the samples; a shortfall is taken from the datasets without `num=`."""
    wanted = samples_per_dataset([o.spec.num for o in opened], nsamples)
    taken = [list(itertools.islice(o.stream, n)) for o, n in zip(opened, wanted, strict=True)]
    for o, part in zip(opened, taken, strict=True):
        missing = sum(wanted) - sum(map(len, taken))
        if missing and o.spec.num is None:
            part.extend(itertools.islice(o.stream, missing))
    total = sum(map(len, taken))
    reports = [o.stats.explain() for o in opened]
    if not total:
        advice = "; ".join(dict.fromkeys(o.stats.advice() for o in opened))
        raise DataError(f"no calibration sample is left from {'; '.join(reports)}. To get some, {advice}")
    if total < nsamples:
        logger.warning("calibrating with %d samples, %d were requested. %s", total, nsamples, "; ".join(reports))
    elif not all(taken):
        empty = [r for r, part in zip(reports, taken, strict=True) if not part]
        logger.warning("no calibration sample comes from %s", "; ".join(empty))
    samples = [s for part in taken for s in part]
    if len(opened) > 1:
        random.Random(seed).shuffle(samples)
    if any("labels" in s for s in samples):  # the others are labelled too: all tokens that are not padding
        for sample in samples:
            if "labels" not in sample:
                padded = sample["attention_mask"] == 0
                sample["labels"] = sample["input_ids"].masked_fill(padded, IGNORED_LABEL)
    return samples, tuple((o.spec.name, len(part)) for o, part in zip(opened, taken, strict=True) if part)
