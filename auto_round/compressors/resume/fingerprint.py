"""What has to be the same for a run to be gone on with, by readable names."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from auto_round import envs
from auto_round._version import __version__
from auto_round.calibration.spill import SpilledTensor
from auto_round.compressors.job import Job
from auto_round.compressors.resume.tensor_file import raw_bytes
from auto_round.compressors.settings import Settings
from auto_round.modeling.one_expert import expert_of
from auto_round.modeling.source import ModelSource, direct_tensors

# Of the settings, what does not decide the result, or is said in another way below.
_LEFT_OUT = (
    "algorithm", "dataset", "device", "imatrix", "layer_config", "ignore_layers", "to_quant_block_names", "mixed",
    "low_gpu_mem_usage", "max_memory", "platform", "strict", "trust_remote_code", "verify",
)  # fmt: skip
TUNED_ALONE, TUNED_TOGETHER = "tuned one at a time", "tuned with their block"
_VARIABLES = ("AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE", "AR_ENABLE_UNIFY_MOE_INPUT_SCALE", "AR_GGUF_PRE_TOKENIZER")


def fingerprint(job: Job, settings: Settings, source: ModelSource, shard: int | str) -> dict[str, Any]:
    """All that decides the result and is known before any data is read, but the weights. Plain values.

    Everything in the settings counts unless it is known not to, so that a new setting cannot be forgotten here.
    """
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _LEFT_OUT}
    scheme = own.pop("scheme").to_dict()
    values = {**own, **vars(settings.algorithm), **scheme}
    values["algorithm"] = type(settings.algorithm).__name__
    values["imatrix"] = None if settings.imatrix is None else _file_digest(Path(settings.imatrix))
    values["layers"] = {
        name: plan.described + json.dumps(plan.scheme.to_dict(), default=str) + (plan.reason or "")
        for name, plan in job.layers.items()
    }
    values["formats"] = list(job.formats)
    values["max_shard_size"] = str(shard)
    if settings.tunes and any(map(expert_of, job.layers)):
        alone = job.memory_plan is not None and job.memory_plan.streams_experts
        values["experts"] = TUNED_ALONE if alone else TUNED_TOGETHER
    values["model_dtype"] = str(source.dtype).removeprefix("torch.")
    values["compute"] = job.compute if settings.device.type == "cpu" else f"{job.compute} {_accelerator(settings)}"
    values["config.json"] = _file_digest(Path(getattr(source, "folder", "")) / "config.json")
    values |= {name: envs.get(name) for name in _VARIABLES}
    values |= {f"version of {name}": version for name, version in _versions().items()}
    return plain(values)


def weight_files(source: ModelSource) -> dict[str, list[Any]]:
    """`input_identity` of every weight file of a checkpoint, by file name."""
    files = getattr(source, "files", None)
    stored = getattr(files, "stored", files)
    if stored is None:
        return {}
    paths = sorted({tensor.file for tensor in stored.tensors.values()})
    return {path.relative_to(stored.folder).as_posix(): input_identity(path) for path in paths}


def input_identity(file: Path) -> list[Any]:
    """Size, time of the last change and digest of the header of a local file: cheap, and any other file differs."""
    stat = file.stat()
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        head = handle.read(min(length, stat.st_size))
    return [stat.st_size, stat.st_mtime_ns, hashlib.sha256(head).hexdigest()]


def samples_digest(samples: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Of token ids, masks and labels."""
    digest = hashlib.sha256()
    for sample in samples:
        for key in sorted(sample):
            digest.update(f"{key}{list(sample[key].shape)}".encode())
            digest.update(raw_bytes(sample[key]))
    return digest.hexdigest()[:16]


def tensors_checksum(tensors: Iterable[torch.Tensor | SpilledTensor]) -> int:
    """CRC-32 of tensors one after the other, a sample or row at a time where they are not in memory."""
    crc = 0
    for tensor in tensors:
        parts: Iterable[torch.Tensor]
        if isinstance(tensor, SpilledTensor):
            parts = (tensor[row] for row in range(tensor.shape[0]))
        else:
            parts = [tensor] if tensor.device.type == "cpu" or tensor.dim() < 3 else tensor.unbind(0)
        for part in parts:
            crc = zlib.crc32(raw_bytes(part), crc)
    return crc


def block_checksum(source: ModelSource, name: str) -> int:
    """CRC-32 of the parameters and persistent buffers of a module; those that are not loaded are read, one at a
    time."""
    return tensors_checksum(
        source.read(".".join(part for part in (name, inner, leaf) if part)) if tensor.is_meta else tensor
        for inner, child in source.model.get_submodule(name).named_modules()
        for leaf, tensor in direct_tensors(child)
    )


def outside_checksum(source: ModelSource) -> int:
    """CRC-32 of all tensors that are in no block."""
    blocks, tied = tuple(f"{block}." for block in source.blocks), source.tied()
    names = [name for name in source.tensor_names() if not name.startswith(blocks) and name not in tied]
    return tensors_checksum(source.read(name) for name in names)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Which values of two sets of plain values differ, as words."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in sorted({*one, *other}):
            found += differences(one.get(key), other.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if one == other else [f"{where}: {_short(one)} then, {_short(other)} now"]


def plain(values: Mapping[str, Any]) -> Any:
    """Values as they are read back from JSON."""
    return json.loads(json.dumps(dict(values), default=str))


def listed(found: Sequence[str], most: int = 8) -> str:
    """Differences as one line."""
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _file_digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def _accelerator(settings: Settings) -> str:
    return torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else settings.device.type


def _versions() -> dict[str, str]:
    return {"auto_round": __version__} | {name: metadata.version(name) for name in ("torch", "transformers")}
