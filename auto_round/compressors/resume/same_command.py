"""Whether an output folder holds what the same command made before: then nothing is left to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.calib_dataset import parse_dataset_string, prepare_calibration
from auto_round.calibration.registry import BY_PROGRAM, DATASETS
from auto_round.compressors.job import Job
from auto_round.compressors.resume.fingerprint import fingerprint, plain, samples_digest, weight_files
from auto_round.compressors.settings import Settings
from auto_round.errors import AutoRoundError
from auto_round.export.earlier_output import is_checked, made_from
from auto_round.modeling.source import ModelSource

_READ_WHOLE = 64 << 20  # bytes; of larger files of text size and time are compared


def recipe(
    job: Job, settings: Settings, source: ModelSource, shard: int | str, tokenizer: Any
) -> Mapping[str, str] | None:
    """Digests of all that decides a result: settings, weights and data. None where one cannot be known before the work
    begins: the weights of a model object, and data that can be read only once."""
    weights = weight_files(source)
    data = _data(settings, tokenizer)
    if not source.lazy or not weights or data is None:
        return None
    return digests_of(fingerprint(job, settings, source, shard), weights, data)


def digests_of(settings: Any, weights: Any, data: Any) -> Mapping[str, str]:
    """SHA-256 of plain values of each: nothing of the machine can be read from them."""
    parts = {"settings": settings, "weights": weights, "data": data}
    return {
        name: hashlib.sha256(json.dumps(plain({name: value})).encode()).hexdigest() for name, value in parts.items()
    }


def is_made(folders: Sequence[Path], made: Mapping[str, str] | None, settings: Settings) -> bool:
    """Whether each of these folders is a complete result of this recipe, checked if that is asked for."""
    if made is None or (settings.save_imatrix is not None and not Path(settings.save_imatrix).is_file()):
        return False
    return all(made_from(f) == made and (is_checked(f) or not settings.verify) for f in folders)


def _data(settings: Settings, tokenizer: Any) -> Any:
    """What tells one calibration set from another: the words of a dataset string, with the files it names; the samples
    of an object that can be read again. None where it cannot."""
    dataset = settings.dataset
    if not settings.needs_data:
        return "none"
    if dataset is None:
        return "default"
    if isinstance(dataset, str):
        try:
            named = [spec.name for spec in parse_dataset_string(dataset)]
        except AutoRoundError:
            return None  # the run itself says what is wrong
        if any(name in DATASETS and DATASETS[name].where == BY_PROGRAM for name in named):
            return None  # what a function gives may change
        return [dataset, *(_files(Path(name).expanduser()) for name in named)]
    if isinstance(dataset, Iterator):
        return None
    try:
        read = prepare_calibration(
            dataset, tokenizer, seqlen=settings.seqlen, nsamples=settings.nsamples, seed=settings.seed
        )
    except AutoRoundError:
        return None
    return samples_digest(read.samples)


def _files(path: Path) -> list[list[Any]]:
    """Name, size and contents (or, of large files, time) of a local file, or of all files in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    found: list[list[Any]] = []
    for file in files:
        stat = file.stat()
        large = stat.st_size > _READ_WHOLE
        content = stat.st_mtime_ns if large else hashlib.sha256(file.read_bytes()).hexdigest()
        found.append([file.name, stat.st_size, content])
    return found
