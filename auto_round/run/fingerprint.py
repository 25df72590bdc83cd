"""Fingerprints of a run's settings, data and weights, to decide whether it can be resumed or is up to date."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from auto_round import envs
from auto_round._version import __version__
from auto_round.calib_dataset import parse_dataset_string, prepare_calibration
from auto_round.calibration.data.spec import BY_PROGRAM, DATASETS
from auto_round.calibration.disk_store import DiskTensor
from auto_round.errors import AutoRoundError
from auto_round.files import bytes_of
from auto_round.modeling.source import ModelSource, direct_tensors
from auto_round.output.folders import PARTIAL, inspect_folder, read_report
from auto_round.output.verify import shorten
from auto_round.plugins import loaded_plugins
from auto_round.run.plan import Job
from auto_round.run.settings import Settings

# Settings that do not change the result, or are covered by other entries below.
_LEFT_OUT = (
    "algorithm", "config", "dataset", "device", "imatrix", "layer_config", "ignore_layers", "to_quant_block_names",
    "mixed", "low_gpu_mem_usage", "max_memory", "platform", "plugins", "strict", "trust_remote_code", "verify",
)  # fmt: skip
VARIABLES = ("AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE", "AR_ENABLE_UNIFY_MOE_INPUT_SCALE", "AR_GGUF_PRE_TOKENIZER")
_MAX_HASHED_BYTES = 64 << 20  # larger text files are compared by size and time


def fingerprint(job: Job, settings: Settings, source: ModelSource, shard: int | str) -> dict[str, Any]:
    """Everything that changes the result and is known before data is read, except the weights, as plain values. Every
    setting is included unless it is in `_LEFT_OUT`, so that a new one cannot be forgotten here."""
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _LEFT_OUT}
    scheme = own.pop("scheme").to_dict()
    values = {**own, **vars(settings.algorithm), **scheme}
    values["algorithm"] = type(settings.algorithm).__name__
    values["imatrix"] = None if settings.imatrix is None else _file_digest(Path(settings.imatrix))
    values["layers"] = {
        name: plan.description + json.dumps(plan.scheme.to_dict(), default=str) + (plan.reason or "")
        for name, plan in job.layers.items()
    }
    values["formats"] = list(job.formats)
    values["max_shard_size"] = str(shard)
    values["model_dtype"] = str(source.dtype).removeprefix("torch.")
    device = settings.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    values["compute"] = job.compute if device.type == "cpu" else f"{job.compute} {card}"
    values["config.json"] = _file_digest(Path(source.folder or "") / "config.json")
    values |= {name: envs.get(name) for name in VARIABLES}
    values["version of auto_round"] = __version__
    values |= {f"version of {name}": metadata.version(name) for name in ("torch", "transformers")}
    values |= {f"plugin {name}": version for name, version in loaded_plugins().items()}
    return as_json(values)


def weight_files(source: ModelSource) -> dict[str, list[Any]]:
    """`TensorFiles.identity` of every weight file of a checkpoint, by file name."""
    if source.files is None:
        return {}
    stored = source.files.stored
    paths = sorted({tensor.file for tensor in stored.tensors.values()})
    return {path.relative_to(stored.folder).as_posix(): stored.identity(path) for path in paths}


def samples_digest(samples: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 (16 digits) of token ids, masks and labels."""
    digest = hashlib.sha256()
    for sample in samples:
        for key in sorted(sample):
            digest.update(f"{key}{list(sample[key].shape)}".encode())
            digest.update(bytes_of(sample[key]))
    return digest.hexdigest()[:16]


def tensors_checksum(tensors: Iterable[torch.Tensor | DiskTensor]) -> int:
    """CRC-32 of the concatenated bytes of tensors; those on disk or on a device are read one row at a time."""
    crc = 0
    for tensor in tensors:
        parts: Iterable[torch.Tensor]
        if isinstance(tensor, DiskTensor):
            parts = (tensor[row] for row in range(tensor.shape[0]))
        else:
            parts = [tensor] if tensor.device.type == "cpu" or tensor.dim() < 3 else tensor.unbind(0)
        for part in parts:
            crc = zlib.crc32(bytes_of(part), crc)
    return crc


def weights_checksum(source: ModelSource, block: str | None) -> int:
    """CRC-32 of the parameters and persistent buffers of a block, or of all tensors outside the blocks; tensors that
    are not loaded are read one by one."""
    if block is None:
        blocks, tied = tuple(f"{block}." for block in source.blocks), source.tied()
        names = [name for name in source.tensor_names() if not name.startswith(blocks) and name not in tied]
        return tensors_checksum(source.read(name) for name in names)
    return tensors_checksum(
        source.read(".".join(part for part in (block, inner, leaf) if part)) if tensor.is_meta else tensor
        for inner, child in source.model.get_submodule(block).named_modules()
        for leaf, tensor in direct_tensors(child)
    )


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Messages that name every difference between two nested dictionaries of plain values."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in sorted({*one, *other}):
            found += differences(one.get(key), other.get(key), f"{where}.{key}" if where else str(key))
        return found
    before, now = (shorten(json.dumps(value, default=str), 57) for value in (one, other))
    return [] if one == other else [f"{where}: {before} then, {now} now"]


def file_differences(before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> list[str]:
    """Weight files with another size or header, which cannot hold the same weights. Their times may differ."""
    found = []
    for name in sorted({*before, *now}):
        one, other = before.get(name), now.get(name)
        if one is None or other is None:
            found.append(f"weight file {name}: {'not there' if one is None else 'there'} then")
        elif one[0] != other[0]:
            found.append(f"weight file {name}: {one[0]} bytes then, {other[0]} now")
        elif one[2] != other[2]:
            found.append(f"weight file {name}: another header then")
    return found


def as_json(values: Mapping[str, Any]) -> Any:
    """Values after a round trip through JSON."""
    return json.loads(json.dumps(dict(values), default=str))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _file_digest(path: Path) -> str | None:
    return _sha256(path)[:16] if path.is_file() else None


def run_digests(
    job: Job, settings: Settings, source: ModelSource, shard: int | str, tokenizer: Any
) -> Mapping[str, str] | None:
    """Digests of everything that changes the result: settings, weights and data.

    None when one is unknown before the work begins: the weights of a model object, data that can be read only once.
    """
    weights = weight_files(source)
    data = _data_identity(settings, tokenizer)
    if not weights or data is None:
        return None
    parts = {"settings": fingerprint(job, settings, source, shard), "weights": weights, "data": data}
    return {  # not the values: report.json reveals nothing of the machine
        name: hashlib.sha256(json.dumps(as_json({name: value})).encode()).hexdigest() for name, value in parts.items()
    }


def is_up_to_date(folders: Sequence[Path], made: Mapping[str, str] | None, settings: Settings) -> bool:
    """Whether each folder holds the complete result of inputs with these digests, verified if the settings ask so."""
    if made is None or (settings.save_imatrix is not None and not Path(settings.save_imatrix).is_file()):
        return False
    for folder in folders:
        report = read_report(folder)
        if report is None or (folder / PARTIAL).exists() or inspect_folder(folder).missing:
            return False
        if report.get("made_from") != made or (settings.verify and report.get("verify") is None):
            return False
    return True


def _data_identity(settings: Settings, tokenizer: Any) -> Any:
    """Plain values that identify a calibration set: the dataset string with digests of the files that it names, or a
    digest of the samples of an object. None when it cannot be read twice."""
    dataset = settings.dataset
    if not settings.needs_data:
        return "none"
    if dataset is None:
        return "default"
    if isinstance(dataset, str):
        try:
            named = [spec.name for spec in parse_dataset_string(dataset)]
        except AutoRoundError:
            return None  # the run will raise it
        if any(name in DATASETS and DATASETS[name].where == BY_PROGRAM for name in named):
            return None  # the result of a function may change
        found: list[Any] = [dataset]
        for path in (Path(name).expanduser() for name in named):
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            stats = [(file, file.stat()) for file in files]
            found.append([
                [file.name, stat.st_size, stat.st_mtime_ns if stat.st_size > _MAX_HASHED_BYTES else _sha256(file)]
                for file, stat in stats
            ])  # fmt: skip
        return found
    if isinstance(dataset, Iterator):
        return None
    try:
        data = prepare_calibration(
            dataset, tokenizer, seqlen=settings.seqlen, nsamples=settings.nsamples, seed=settings.seed
        )
        return samples_digest(data.samples)
    except AutoRoundError:
        return None
