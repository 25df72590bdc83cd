"""Options and job of a model-free run: workers and memory, unsupported settings, the reasons of skipped layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from auto_round import envs
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.base import OutputFormat
from auto_round.layer_config import scheme_from_entry
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.output.writer import parse_size
from auto_round.report.memory import format_bytes
from auto_round.run.model_free.units import plan_work
from auto_round.run.plan import Job, MemoryPlan
from auto_round.run.planner import make_job
from auto_round.run.settings import Settings, check_whole_number
from auto_round.schemes import QuantizationScheme

_MAX_WORKERS = 8
_WITHOUT = "leave model_free out (--disable_model_free) for the regular flow"
_GGUF = f"GGUF types are not written from tensors alone; {_WITHOUT}"
# Parts of module names in vision and audio towers, and the reason why their layers are left unquantized.
_TOWERS = ("vision", "visual", "vision_tower", "vision_model", "audio_tower", "audio_model", "image_newline",
           "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio")  # fmt: skip
_TOWER = "it reads images or sound"


@dataclass(frozen=True)
class ModelFreeOptions:
    """Parallelism of a model-free run.

    Attributes:
        workers: tensors that are processed at a time.
        memory: limit in bytes of all of them together.
        rank, world: index of this process, and number of processes, on a shared folder.
    """

    workers: int
    memory: int = 4_000_000_000
    rank: int = 0
    world: int = 1


def model_free_options(
    parallelism: int | None = None, max_memory: int | str | None = None, environ: Mapping[str, str] = os.environ
) -> ModelFreeOptions:
    """Options from the arguments, and ranks from the environment variables of `torchrun`.

    Raises ConfigError for a bad value.
    """
    if parallelism is not None:
        check_whole_number("parallelism", parallelism, 1)
    rank, world = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    if not 0 <= rank < max(1, world):
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world}")
    parallelism = parallelism or envs.get("AR_MODEL_FREE_SHARD_PARALLELISM")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = parallelism or max(1, min(_MAX_WORKERS, cores // max(1, _number(environ, "LOCAL_WORLD_SIZE", 1))))
    memory = parse_size(max_memory, "max_memory") if max_memory is not None else ModelFreeOptions.memory
    return ModelFreeOptions(workers, memory, rank, max(1, world))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name}={text!r} is no whole number")
    return int(text)


def check_settings(settings: Settings) -> None:
    """Raise UnsupportedError when the settings need a model or calibration data."""
    schemes = {settings.scheme_name: settings.scheme}
    for name, entry in settings.layer_config.items():
        schemes[f"of layer {name}"] = scheme_from_entry(name, entry, settings.scheme)
    for name, scheme in schemes.items():
        reason = unsupported_reason(scheme)
        if name.upper().startswith("GGUF"):
            reason = _GGUF
        if reason is not None:
            raise UnsupportedError(f"model-free mode cannot make scheme {name} ({scheme.describe()}): {reason}")
    if settings.on_nan == "keep":
        raise UnsupportedError(
            "model-free mode plans every byte before it reads a weight, so on_nan=keep is not possible; "
            f"name the layers in ignore_layers, or {_WITHOUT}"
        )
    if settings.cache is not None:
        raise UnsupportedError(
            "model-free mode cannot make static scales of the key-value cache or of attention, which come from "
            f"calibration data; {_WITHOUT}"
        )
    if settings.tunes or settings.needs_data:
        raise UnsupportedError(f"model-free mode rounds to nearest and neither tunes nor searches; {_WITHOUT}")


def unsupported_reason(scheme: QuantizationScheme) -> str | None:
    """Why a scheme needs more than the weights, and the alternative; None when it does not."""
    if not scheme.quantizes_weights:
        return None
    if scheme.super_bits is not None:
        return _GGUF
    activations = scheme.activations
    if activations is not None and activations.calibrated:
        return (
            "the scales of its activations come from calibration data; set act_bits=16 (--act_bits 16) for its weights "
            f"alone, or {_WITHOUT}"
        )
    if scheme.rotation_config is not None:
        return f"rotations change the weights of several layers at once; {_WITHOUT}"
    return None


@dataclass(frozen=True)
class ModelFreeJob(Job):
    """The job of a model-free run.

    Attributes:
        workers, memory: see `ModelFreeOptions`.
    """

    workers: int = 1
    memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_free": True}

    def render(self) -> str:
        text = super().render()
        head, _, rest = text.partition("\nmemory ")
        how = f"{'model-free':<18} {self.workers} tensors at a time, at most {format_bytes(self.memory)} together"
        lines = [f"{head}\n{how}\nmemory {rest}"] if rest else [text, how]
        return "\n".join(lines)


def model_free_job(
    settings: Settings, source: CheckpointSource, formats: Sequence[OutputFormat], options: ModelFreeOptions,
    output_dir: str | None = None, notes: Sequence[str] = (),
) -> ModelFreeJob:  # fmt: skip
    """The job of `make_job`, with reasons for unquantized layers in towers, and the memory of model-free work.

    Raises what `make_job` raises.
    """
    # max_memory limits the tensors that are processed at a time (ModelFreeOptions); there are no activations.
    job = make_job(replace(settings, max_memory=None), source, formats, output_dir)
    layers = dict(job.layers)
    for name, plan in job.layers.items():
        if not plan.scheme.quantizes_weights and plan.reason is None and not set(_TOWERS).isdisjoint(name.split(".")):
            layers[name] = replace(plan, reason=_TOWER)
    values = {f.name: getattr(job, f.name) for f in fields(Job)}
    values |= {"layers": layers, "notes": (*job.notes, *notes), "journal_bytes": 0, "memory_plan": MemoryPlan()}
    made = ModelFreeJob(**values, workers=options.workers, memory=options.memory)
    largest = max((u.memory for fmt in formats for u in plan_work(made, source, fmt).units), default=0)
    return replace(made, peak_ram=max(largest, min(options.memory, options.workers * largest)), peak_vram=0)
