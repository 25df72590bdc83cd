"""Opening a dataset: from its name or from a Python object to a stream of samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from auto_round import envs
from auto_round.calibration.builtin import BUILTIN
from auto_round.calibration.documents import Document, TokenDocument
from auto_round.calibration.grammar import DatasetSpec, parse_dataset_string
from auto_round.calibration.hub_access import HubUnreachable
from auto_round.calibration.hub_sets import DEFAULT_DATASET, MODELSCOPE_DEFAULT, any_hub_set
from auto_round.calibration.local_files import READERS, looks_like_path, read_local
from auto_round.calibration.registry import DATASETS
from auto_round.calibration.tokens import Sample, Tally, samples_of
from auto_round.calibration.user_data import documents_of, expand
from auto_round.errors import ConfigError, DataError, nearest
from auto_round.logger import logger

# Documents read from one dataset before giving up on it, at least; a set of short texts would else be read to its end.
_MOST_DOCUMENTS = 50_000


@dataclass(frozen=True)
class Request:
    """What is wanted of every dataset: tokens per sample, samples in all, seed, and the tokenizer that makes them."""

    tokenizer: Any
    seqlen: int
    nsamples: int
    seed: int


@dataclass(frozen=True)
class OpenDataset:
    """A dataset being read: what was asked, the samples as they are made, and the count of what was read."""

    spec: DatasetSpec
    tally: Tally
    stream: Iterator[Sample]


def open_named(dataset: str | None, request: Request, platform: str) -> list[OpenDataset]:
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


def open_object(dataset: Any, request: Request) -> tuple[OpenDataset, int]:
    """A user's Python object as a dataset, and the tokens per sample, which may be fewer than requested.

    They are fewer when the samples are token ids that all have one length below `request.seqlen`: whoever made them
    chose that length. A list of strings is shuffled; token ids and iterables keep their order.
    """
    documents: Iterator[Document] = documents_of(dataset, request.seed)
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
    tally = Tally(spec.name, seqlen, named=False)
    chained = itertools.chain(head, documents)
    return OpenDataset(
        spec, tally, samples_of(chained, request.tokenizer, tally, most_documents=_limit(request))
    ), seqlen


def _open(spec: DatasetSpec, request: Request) -> OpenDataset:
    documents = _documents(spec, request)
    first = list(itertools.islice(documents, 1))  # a set that cannot be read says so here
    entry = DATASETS.get(spec.name)
    concat = spec.concat if spec.concat is not None else bool(entry and entry.concat)
    tally = Tally(spec.name, request.seqlen, concat)
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


def _limit(request: Request) -> int:
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


def _documents(spec: DatasetSpec, request: Request) -> Iterator[Document]:
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
    return any_hub_set(spec.name, split, request.seed)


def _registered(rows: Iterable[Any], name: str) -> Iterator[Document]:
    """Documents of what a registered function gives: these, or rows and batches as users give them."""
    for i, row in enumerate(rows):
        if isinstance(row, (str, TokenDocument)):
            yield row
        else:
            yield from expand(row, f"row {i} of dataset {name!r}")
