"""Settings of a run: one frozen, checked value from the user's arguments, with the device and memory limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from auto_round.algorithms.gptq import GPTQConfig
from auto_round.algorithms.quantization.rtn.config import RegisteredConfig, RTNConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.transforms.base import TRANSFORMS
from auto_round.calibration.data.spec import redact_dataset
from auto_round.config import DataConfig, QuantConfig, SourceConfig
from auto_round.errors import ConfigError, DeviceError, UnsupportedError
from auto_round.formats.base import CacheScheme
from auto_round.layer_config import scheme_from_entry
from auto_round.output.writer import parse_size
from auto_round.schemes import MixedPreset, QuantizationScheme


def resolve_device(value: Any) -> torch.device:
    """The device that `device_map` names: a number (that accelerator, or the CPU on a machine without any), "auto",
    "cpu", "cuda", "cuda:1", "xpu", a torch.device, or a map or list of a single device."""
    if isinstance(value, dict):
        value = sorted({str(v) for v in value.values()})
    if isinstance(value, (list, tuple)):
        value = ",".join(str(v) for v in value)
    names = {part.strip().lower() for part in str(0 if value is None else value).split(",")}
    if len(names - {""}) > 1:
        raise UnsupportedError(
            f"device_map={value!r} names several devices; this version tunes on one: give one, such as 'cuda:0'. "
            "A block at a time is on it, so it needs about ten times the memory of one block"
        )
    text, kind, count, cpu = max(names), "cuda", 0, torch.device("cpu")
    for kind in ("cuda", "xpu"):
        library = getattr(torch, kind, None)
        if library is not None and library.is_available():
            count = int(library.device_count())
            break
    else:
        kind = "cuda"
    if text in ("auto", "tp", "0"):
        return torch.device(kind, 0) if count else cpu
    found = f"devices here: {', '.join(['cpu', *(f'{kind}:{i}' for i in range(count))])}"
    try:
        device = torch.device(f"{kind}:{text}" if text.isdigit() else text)
    except RuntimeError as error:
        raise DeviceError(f"device_map={value!r} is no device; {found}") from error
    if device.type == "cpu":
        return cpu
    if device.type != kind or not count or (device.index or 0) >= count:
        raise DeviceError(f"device_map={value!r} is not on this machine; {found}")
    return torch.device(device.type, device.index or 0)


class MemoryBudget(NamedTuple):
    """Memory limits of a run in bytes, or None: of the process, and of tensors on a device that is not the CPU."""

    ram: int | None = None
    device: int | None = None


def parse_budget(value: Any, device: torch.device) -> MemoryBudget | None:
    """A budget from `4_000_000_000`, "4GB" (RAM), "cpu=4GB,0=10GB" or {"cpu": "4GB", 0: "10GB"}; None for None."""
    if value is None:
        return None
    pairs = value
    if isinstance(value, str) and "=" in value:
        pairs = {name.strip(): size.strip() for name, _, size in (part.partition("=") for part in value.split(","))}
    elif not isinstance(value, Mapping):
        pairs = {"ram": value}
    found: dict[str, int] = {}
    own = {str(device), device.type, str(device.index or 0)} if device.type != "cpu" else set()
    for name, size in pairs.items():
        key = str(name).strip().lower()
        which = "ram" if key in ("cpu", "ram") else "device" if key in own else None
        if which is None:
            raise ConfigError(
                f"max_memory names {name!r}; this run uses {', '.join(sorted({'cpu', str(device)}))}: give such as "
                f'"cpu=4GB{"" if device.type == "cpu" else f",{device.index or 0}=10GB"}"'
            )
        if which in found:
            raise ConfigError(f"max_memory={value!r} gives {name!r} twice")
        if isinstance(size, bool) or not isinstance(size, int | str):
            raise ConfigError(f"max_memory={size!r} is not a size; give bytes, or a text such as '4GB'")
        found[which] = parse_size(size, "max_memory")
    return MemoryBudget(**found)


_SCALE_DTYPES = {
    "fp16": torch.float16, "float16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(SourceConfig, DataConfig):
    """The run's settings, resolved from `config` by `keywords.resolve_settings`. `asked_algorithm`: what was asked for,
    if `max_memory` is too low for it."""

    config: QuantConfig = field(compare=False)
    scheme: QuantizationScheme
    scheme_name: str
    algorithm: RTNConfig | SignRoundConfig
    mixed: MixedPreset | None
    optimized_start: bool
    transforms: tuple[str, ...]
    gptq: GPTQConfig | None
    layer_config: Mapping[str, Any]
    ignore_layers: tuple[str, ...]
    quant_lm_head: bool
    to_quant_block_names: tuple[str, ...]
    scale_dtype: torch.dtype
    cache: CacheScheme | None
    on_nan: str
    amp: bool
    enable_torch_compile: bool
    enable_deterministic_algorithms: bool
    device: torch.device
    low_gpu_mem_usage: bool
    max_memory: MemoryBudget | None
    verify: bool
    strict: bool | None
    save_imatrix: str | None
    asked_algorithm: str = ""

    @property
    def tunes(self) -> bool:
        return isinstance(self.algorithm, SignRoundConfig)

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed: by tuning, the weighted search, or static scales."""
        searches = isinstance(self.algorithm, RTNConfig) and self.algorithm.optimized and self.imatrix is None
        wanted = (self.gptq, self.save_imatrix, self.cache)
        if self.tunes or searches or any(value is not None for value in wanted):
            return True
        entries = [scheme_from_entry(name, entry, self.scheme) for name, entry in self.layer_config.items()]
        calibrated = any(scheme.calibrated for scheme in (self.scheme, *entries))
        return calibrated or any(TRANSFORMS[name].needs_data for name in self.transforms)

    @property
    def weighs(self) -> bool:
        """Whether rounding is weighted by importance, from calibration data or an importance file."""
        return self.tunes or self.optimized_start

    @property
    def algorithm_name(self) -> str:
        if isinstance(self.algorithm, SignRoundConfig):
            start = "" if self.gptq is None else "GPTQ, then "
            return start + ("SignRound (AdamW)" if self.algorithm.enable_adam else "SignRound")
        if isinstance(self.algorithm, RegisteredConfig):
            return self.algorithm.quantizer
        if self.gptq is not None:
            return "GPTQ"
        return "opt-RTN" if self.algorithm.optimized else "RTN"

    def recorded(self) -> dict[str, Any]:
        """The settings for the report and the files, as plain values."""
        values: dict[str, Any] = {"algorithm": self.algorithm_name, "seed": self.seed}
        names: tuple[str, ...] = ()
        if isinstance(self.algorithm, SignRoundConfig):
            names = ("iters", "lr", "minmax_lr", "batch_size", "gradient_accumulate_steps", "enable_minmax_tuning")
        values |= {"iters": 0} | {name: getattr(self.algorithm, name) for name in names}
        values["enable_quanted_input"] = getattr(self.algorithm, "enable_quanted_input", False)
        if self.gptq is not None:
            values |= {"damping": self.gptq.damping, "disable_opt_rtn": not self.optimized_start}
        if self.needs_data:
            values |= {"nsamples": self.nsamples, "seqlen": self.seqlen}
            values["dataset"] = redact_dataset(self.dataset) if isinstance(self.dataset, str) else None
        values["amp"] = self.amp
        values["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
        for what in ("kv", "attention"):
            if getattr(self.config.weights, f"static_{what}_dtype") is not None:
                values[f"static_{what}_dtype"] = "fp8"
                values[f"static_{what}_granularity"] = getattr(self.config.weights, f"static_{what}_granularity")
        if self.on_nan != "fail":
            values["on_nan"] = self.on_nan
        return values


def check_whole_number(name: str, value: Any, low: int) -> int:
    """`value`, if it is an integer of at least `low`; else a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}={value!r}: give a whole number of at least {low}")
    return value


def parse_scale_dtype(value: str | torch.dtype) -> torch.dtype:
    """The dtype of stored scales."""
    if isinstance(value, torch.dtype) and value in _SCALE_DTYPES.values():
        return value
    key = str(value).removeprefix("torch.").lower()
    if key not in _SCALE_DTYPES:
        raise ConfigError(f"scale_dtype={value!r} is not allowed; use {', '.join(_SCALE_DTYPES)}")
    return _SCALE_DTYPES[key]


def names_tuple(value: Any) -> tuple[str, ...]:
    """`"a,b"`, a list (nested as older configurations have it) or None, as a tuple of names."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(name for item in value or () for name in names_tuple(item))
