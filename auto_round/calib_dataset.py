"""Calibration data: token samples of equal length from a dataset string, texts, token ids or a DataLoader.

`load_calibration` is the entry point, `register_dataset` adds a dataset; docs/datasets.md describes dataset strings.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from auto_round.calibration.data.documents import IGNORED_LABEL
from auto_round.calibration.data.hub import DEFAULT_DATASET
from auto_round.calibration.data.sources import READERS, OpenDataset, SampleRequest, open_named, open_object
from auto_round.calibration.data.spec import (
    DATASETS,
    DatasetSpec,
    parse_dataset_string,
    register_dataset,
    samples_per_dataset,
)
from auto_round.calibration.data.tokens import Sample
from auto_round.errors import ConfigError, DataError
from auto_round.logger import logger

__all__ = [
    "DATASETS",
    "DEFAULT_DATASET",
    "CalibrationData",
    "DatasetSpec",
    "available_datasets",
    "load_calibration",
    "parse_dataset_string",
    "prepare_calibration",
    "register_dataset",
]


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


def load_calibration(
    dataset: Any, tokenizer: Any, *, seqlen: int, nsamples: int, seed: int, model_max_length: int | None = None,
    vocab_size: int | None = None, platform: str = "hf",
) -> list[Sample]:  # fmt: skip
    """The samples of `prepare_calibration`."""
    return prepare_calibration(
        dataset, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, model_max_length=model_max_length,
        vocab_size=vocab_size, platform=platform,
    ).samples  # fmt: skip


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
    request = SampleRequest(tokenizer, seqlen, nsamples, seed)
    if dataset is None or isinstance(dataset, str):
        opened = open_named(dataset, request, platform)
    else:
        single, seqlen = open_object(dataset, request)
        opened = [single]
    samples, sources = _collect(opened, nsamples, seed)
    if vocab_size is not None:
        largest = max(int(s["input_ids"].max()) for s in samples)
        if largest >= vocab_size:
            raise DataError(
                f"the calibration data holds token id {largest}, and the model knows ids below {vocab_size}; "
                "use the model's own tokenizer"
            )
    return CalibrationData(samples, seqlen, sources)


def available_datasets() -> list[tuple[str, str, str]]:
    """`(name, description, source)` of every registered dataset by name, then of the other kinds of dataset string."""
    rows = sorted(((e.name, e.description, e.where) for e in DATASETS.values()), key=lambda row: row[0].lower())
    rows.append(
        (f"a path ({', '.join(READERS)})", "your own texts, conversations or token ids", "local file or folder")
    )
    rows.append(("any hub id org/name", "a set with a column such as text or messages", "Hugging Face hub"))
    return rows


def _collect(opened: list[OpenDataset], nsamples: int, seed: int) -> tuple[list[Sample], tuple[tuple[str, int], ...]]:
    """Read each dataset's share of the samples; a shortfall is taken from the datasets without `num=`."""
    wanted = samples_per_dataset([o.spec.num for o in opened], nsamples)
    taken = [list(itertools.islice(o.stream, n)) for o, n in zip(opened, wanted, strict=True)]
    for o, part in zip(opened, taken, strict=True):
        missing = sum(wanted) - sum(map(len, taken))
        if missing and o.spec.num is None:
            part.extend(itertools.islice(o.stream, missing))
    total = sum(map(len, taken))
    reports = [o.tally.explain() for o in opened]
    if not total:
        advice = "; ".join(dict.fromkeys(o.tally.advice() for o in opened))
        raise DataError(f"no calibration sample is left from {'; '.join(reports)}. To get some, {advice}")
    if total < nsamples:
        logger.warning("calibrating with %d samples, %d were requested. %s", total, nsamples, "; ".join(reports))
    elif not all(taken):
        empty = [r for r, part in zip(reports, taken, strict=True) if not part]
        logger.warning("no calibration sample comes from %s", "; ".join(empty))
    samples = [s for part in taken for s in part]
    if len(opened) > 1:
        random.Random(seed).shuffle(samples)
    _complete_labels(samples)
    return samples, tuple((o.spec.name, len(part)) for o, part in zip(opened, taken, strict=True) if part)


def _complete_labels(samples: list[Sample]) -> None:
    """When some samples have labels, label the others too: all tokens that are not padding."""
    if any("labels" in s for s in samples):
        for sample in samples:
            if "labels" not in sample:
                padded = sample["attention_mask"] == 0
                sample["labels"] = sample["input_ids"].masked_fill(padded, IGNORED_LABEL)
