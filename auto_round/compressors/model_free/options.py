"""What model-free mode is told besides the settings of every run, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auto_round import envs
from auto_round.compressors.settings import Settings, check_whole
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.export.shard_writer import parse_size
from auto_round.layer_config import scheme_from_entry
from auto_round.schemes import QuantizationScheme

_MOST_WORKERS = 8
_WITHOUT = "leave model_free out (--disable_model_free) for the regular flow"


_GGUF = f"GGUF types are not written from tensors alone; {_WITHOUT}"


@dataclass(frozen=True)
class ModelFreeOptions:
    """How the work is spread.

    Attributes:
        workers: tensors that are worked on at a time.
        memory: bytes that they may hold together.
        rank, world: which of how many processes this one is, on a folder that all of them see.
    """

    workers: int
    memory: int = 4_000_000_000
    rank: int = 0
    world: int = 1


def model_free_options(
    parallelism: int | None = None, max_memory: int | str | None = None, environ: Mapping[str, str] = os.environ
) -> ModelFreeOptions:
    """Options from what was given, and the ranks from the variables that `torchrun` sets.

    Raises ConfigError for a bad value.
    """
    if parallelism is not None:
        check_whole("parallelism", parallelism, 1)
    rank, world = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    if not 0 <= rank < max(1, world):
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world}")
    parallelism = parallelism or envs.get("AR_MODEL_FREE_SHARD_PARALLELISM")
    workers = parallelism or max(1, min(_MOST_WORKERS, _cores() // max(1, _number(environ, "LOCAL_WORLD_SIZE", 1))))
    memory = parse_size(max_memory, "max_memory") if max_memory is not None else ModelFreeOptions.memory
    return ModelFreeOptions(workers, memory, rank, max(1, world))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name}={text!r} is no whole number")
    return int(text)


def check_settings(settings: Settings) -> None:
    """Raise UnsupportedError when the settings ask for something that needs a model or calibration data."""
    schemes = {settings.scheme_name: settings.scheme}
    for name, entry in settings.layer_config.items():
        schemes[f"of layer {name}"] = scheme_from_entry(name, entry, settings.scheme)
    for name, scheme in schemes.items():
        reason = refusal(scheme)
        if name.upper().startswith("GGUF"):
            reason = _GGUF
        if reason is not None:
            raise UnsupportedError(f"model-free mode cannot make scheme {name} ({scheme.describe()}): {reason}")
    if settings.on_nan == "keep":
        raise UnsupportedError(
            "model-free mode plans every byte before it reads a weight, so on_nan=keep cannot keep what holds NaN; "
            f"name the layers in ignore_layers, or {_WITHOUT}"
        )
    if settings.cache is not None:
        raise UnsupportedError(
            "model-free mode cannot make static scales of the key-value cache or of attention, which come from "
            f"calibration data; {_WITHOUT}"
        )
    if settings.tunes or settings.needs_data:
        raise UnsupportedError(f"model-free mode rounds to nearest and neither tunes nor searches; {_WITHOUT}")


def refusal(scheme: QuantizationScheme) -> str | None:
    """Why a scheme needs more than the weights, and what works instead; None when it does not."""
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


def check_model(model: Any) -> str:
    """The folder or hub id. Raises ConfigError for a model object."""
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    raise ConfigError("model_free=True reads the files of a folder or hub id; give its name, not a model object")
