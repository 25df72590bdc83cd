"""Calibration data: token samples of equal length from a dataset string, texts, token ids or a DataLoader.

`prepare_calibration` is the entry point, `register_dataset` adds a dataset; docs/datasets.md describes dataset strings.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from auto_round import envs
from auto_round.calibration.data import documents as docs
from auto_round.calibration.data import sources
from auto_round.calibration.data.documents import DocumentStats, Sample, TokenDocument
from auto_round.calibration.data.sources import DEFAULT_DATASET, READERS, looks_like_path
from auto_round.calibration.data.spec import (
    DATASETS,
    DatasetSpec,
    parse_dataset_string,
    register_dataset,
    samples_per_dataset,
)
from auto_round.errors import ConfigError, DataError, nearest
from auto_round.logger import logger

__all__ = [
    "DATASETS", "DEFAULT_DATASET", "CalibrationData", "DatasetSpec", "available_datasets", "parse_dataset_string",
    "prepare_calibration", "register_dataset",
]  # fmt: skip

# Least number of documents read from a dataset before giving up; limits the time spent on a set of short texts.
_MIN_DOCUMENT_LIMIT = 50_000
OpenDataset = tuple[DocumentStats, Iterator[Sample]]  # statistics of its documents, and its samples


@dataclass(frozen=True)
class CalibrationData:
    """Samples and their sources."""

    samples: list[Sample]  # all of them with `labels` when the user gave some
    seqlen: int  # tokens per sample; may be less than requested
    sources: tuple[tuple[str, int], ...]  # name and number of samples of each dataset used


def prepare_calibration(
    dataset: Any, tokenizer: Any, *, seqlen: int, nsamples: int, seed: int, model_max_length: int | None = None,
    vocab_size: int | None = None, platform: str = "hf",
) -> CalibrationData:  # fmt: skip
    """Read, tokenize and cut calibration data. The same arguments give the same samples.

    Args:
        dataset: None for the default set, a dataset string, a list of strings, a list of token ids (lists, tensors,
            or dicts with `input_ids` and optional `attention_mask` and `labels`), or an iterable of batches of those.
        tokenizer: a Transformers tokenizer; may be None for token ids.
        seqlen: tokens per sample. Lowered, with a log line, to `model_max_length` (positions of the model), and to the
            common length of given token ids when that is shorter.
        nsamples: samples requested. When there are fewer, a warning gives the reason.
        vocab_size: rows of the model's embedding; larger token ids raise DataError.

    Raises ConfigError for a wrong argument or dataset string, DataError when data cannot be read or no sample is left.
    When the default set cannot be downloaded, the bundled text is used, with a log line.
    """
    if seqlen < 1 or nsamples < 1:
        raise ConfigError(f"seqlen={seqlen} and nsamples={nsamples} must both be 1 or more")
    if model_max_length is not None and seqlen > model_max_length:
        message = "seqlen=%d is more than the model's %d positions; using %d"
        logger.warning(message, seqlen, model_max_length, model_max_length)
        seqlen = model_max_length
    reader = _Reader(tokenizer, seqlen, nsamples, seed)
    named = dataset is None or isinstance(dataset, str)
    opened = reader.open_named(dataset, platform) if named else [reader.open_object(dataset)]
    samples, sources = _collect(opened, nsamples, seed)
    if vocab_size is not None:
        largest = max(int(s["input_ids"].max()) for s in samples)
        if largest >= vocab_size:
            raise DataError(
                f"the calibration data holds token id {largest}, and the model knows ids below {vocab_size}; "
                "use the model's own tokenizer"
            )
    return CalibrationData(samples, opened[0][0].seqlen, sources)


def available_datasets() -> list[tuple[str, str, str]]:
    """`(name, description, source)` of every registered dataset by name, then of the other kinds of dataset string."""
    return [
        *sorted(((e.name, e.description, e.where) for e in DATASETS.values()), key=lambda row: row[0].lower()),
        (f"a path ({', '.join(READERS)})", "your own texts, conversations or token ids", "local file or folder"),
        ("any hub id org/name", "a set with a column such as text or messages", "Hugging Face hub"),
    ]


@dataclass(frozen=True)
class _Reader:
    """Opens datasets for samples of `seqlen` tokens."""

    tokenizer: Any
    seqlen: int
    nsamples: int
    seed: int

    def _open(self, documents: Iterator[Any], stats: DocumentStats, *template: Any) -> OpenDataset:
        limit = max(_MIN_DOCUMENT_LIMIT, 100 * self.nsamples)
        return stats, docs.samples_of(itertools.islice(documents, limit), self.tokenizer, stats, *template)

    def open_object(self, dataset: Any) -> OpenDataset:
        """Open a Python object. A list of strings is shuffled; token ids and iterables keep their order."""
        documents = docs.documents_from_object(dataset, self.seed)
        head = list(itertools.islice(documents, self.nsamples))
        if not head:
            raise DataError("the given dataset is empty; give some strings or token ids")
        if isinstance(dataset, (list, tuple)) and isinstance(head[0], str):
            head.extend(documents)
            random.Random(self.seed).shuffle(head)
        seqlen = self.seqlen
        lengths = {len(d.ids) if isinstance(d, TokenDocument) else 0 for d in head}
        if len(lengths) == 1 and 0 < (length := lengths.pop()) < seqlen:
            logger.info("all given samples have %d tokens; using seqlen=%d instead of %d", length, length, seqlen)
            seqlen = length
        return self._open(itertools.chain(head, documents), DocumentStats("the given data", seqlen, named=False))

    def open_named(self, dataset: str | None, platform: str) -> list[OpenDataset]:
        """Open the datasets of a dataset string, and read the first document of each.

        None, or the bare name of the default dataset, is replaced by the packaged text when it cannot be read.
        """
        default = (
            sources.MODELSCOPE_DEFAULT
            if platform == "model_scope" or envs.get("AR_USE_MODELSCOPE")
            else DEFAULT_DATASET
        )
        specs = [DatasetSpec(default)] if dataset is None else parse_dataset_string(dataset)
        for spec in specs:
            if spec.name in DATASETS:
                continue
            if looks_like_path(spec.name):
                if spec.splits:
                    raise ConfigError(
                        f"dataset {spec.name!r} is a local file and has no splits, but {'+'.join(spec.splits)!r} was "
                        "given; leave it out"
                    )
            elif spec.name.count("/") != 1 or not all(spec.name.split("/")):
                raise DataError(
                    f"dataset {spec.name!r} is not known{nearest(spec.name, DATASETS)} Known: {', '.join(DATASETS)}; "
                    f"or a {', '.join(READERS)} file, or a hub id such as org/name"
                )
        if specs not in ([DatasetSpec(default)], [DatasetSpec(DEFAULT_DATASET)]):
            return [self._open_spec(spec) for spec in specs]
        try:
            return [self._open_spec(DatasetSpec(default))]
        except DataError as error:
            reason = error.reason if isinstance(error, sources.HubUnreachable) else str(error)
            message = "the default calibration set %s cannot be used (%s); calibrating with the packaged text (builtin)"
            logger.warning(message, default, reason)
            return [self._open_spec(DatasetSpec(sources.BUILTIN))]

    def _open_spec(self, spec: DatasetSpec) -> OpenDataset:
        """Open one dataset of a dataset string: a registered one, a local file, or a hub id."""
        entry, split, template = DATASETS.get(spec.name), "+".join(spec.splits) or None, spec.apply_chat_template
        concat = bool(spec.concat)
        documents: Iterator[Any]
        if entry is not None:
            rows = entry.documents(
                tokenizer=self.tokenizer, seqlen=self.seqlen, dataset_name=spec.name, split=split, seed=self.seed,
                apply_chat_template=template, system_prompt=spec.system_prompt,
            )  # fmt: skip
            items = ((row, f"row {i} of dataset {spec.name!r}") for i, row in enumerate(rows))
            documents = itertools.chain.from_iterable(itertools.starmap(docs.documents_from_item, items))
            concat = entry.concat if spec.concat is None else spec.concat
            template = template and "apply_chat_template" not in entry.takes
        elif looks_like_path(spec.name):
            documents = sources.read_local(spec.name, self.seed)
        else:
            documents = sources.HubDataset((spec.name,), column=None).documents(spec.name, split, self.seed)
        first = list(itertools.islice(documents, 1))  # an unreadable dataset raises here
        stats = DocumentStats(spec.name, self.seqlen, concat, num=spec.num)
        return self._open(itertools.chain(first, documents), stats, template, spec.system_prompt)


def _collect(opened: list[OpenDataset], nsamples: int, seed: int) -> tuple[list[Sample], tuple[tuple[str, int], ...]]:
    """Read each dataset's share of the samples; a shortfall is taken from the datasets without `num=`."""
    wanted = samples_per_dataset([stats.num for stats, _ in opened], nsamples)
    taken = [list(itertools.islice(stream, n)) for (_, stream), n in zip(opened, wanted, strict=True)]
    for (stats, stream), part in zip(opened, taken, strict=True):
        missing = sum(wanted) - sum(map(len, taken))
        if missing and stats.num is None:
            part.extend(itertools.islice(stream, missing))
    total = sum(map(len, taken))
    reports = [stats.explain() for stats, _ in opened]
    if not total:
        advice = "; ".join(dict.fromkeys(stats.advice() for stats, _ in opened))
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
                sample["labels"] = sample["input_ids"].masked_fill(padded, docs.IGNORED_LABEL)
    return samples, tuple((stats.name, len(part)) for (stats, _), part in zip(opened, taken, strict=True) if part)
