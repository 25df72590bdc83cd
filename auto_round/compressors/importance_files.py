"""llama.cpp's importance files: the second moments of every layer's inputs, by the names of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.calibration.imatrix_file import read_imatrix, write_imatrix
from auto_round.compressors.gguf_job import weight_name
from auto_round.compressors.job import Job
from auto_round.errors import DataError
from auto_round.export.gguf.plan import GgufPlan
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource


def given_importance(path: str, job: Job, source: ModelSource) -> dict[str, torch.Tensor]:
    """The importance of the job's layers, float32 [in] by layer name, from a file; without the layers it
    does not name.

    Raises:
        DataError: the file is damaged, of another model, or names none of the layers.
    """
    plan = _plan(job)
    file = read_imatrix(path)
    found: dict[str, torch.Tensor] = {}
    for layer in job.quantized():
        for place in plan.places[weight_name(source, layer)]:
            values = file.of(place.tensor, plan.shapes[place.tensor])
            if values is not None:
                found[layer] = values if place.slot is None else values[place.slot]
    if not found:
        raise DataError(f"{path} has no importance for any layer of this model; it was made for another one")
    return found


def say_what_is_missing(path: str, job: Job, found: Mapping[str, torch.Tensor]) -> None:
    """Log how many of the job's layers a file has no importance for."""
    missing = [name for name in job.quantized() if name not in found]
    if missing:
        logger.info(
            "%s says nothing of %d layers, such as %s: all of their inputs weigh alike", path, len(missing), missing[0]
        )


def save_importance(
    path: str,
    job: Job,
    source: ModelSource,
    sums: Mapping[str, torch.Tensor],
    tokens: Mapping[str, int],
    chunk_size: int,
) -> None:
    """Write what calibration saw: sums of squares [in] and numbers of tokens by layer name."""
    plan = _plan(job)
    stacked: dict[str, dict[int, str]] = {}
    for layer in sums:
        for place in plan.places[weight_name(source, layer)]:
            stacked.setdefault(place.tensor, {})[place.slot or 0] = layer
    all_sums = {name: torch.stack([sums[layers[i]].cpu() for i in sorted(layers)]) for name, layers in stacked.items()}
    counts = {name: torch.tensor([tokens[layers[i]] for i in sorted(layers)]) for name, layers in stacked.items()}
    write_imatrix(path, all_sums, counts, chunk_size)
    logger.info("saved the importance of %d tensors to %s", len(all_sums), path)


def _plan(job: Job) -> GgufPlan:
    assert job.gguf is not None  # planning refuses the options without
    return job.gguf
