"""`AutoRound`: the entry point for Python users."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.sign_round.config import AdamRoundConfig, SignRoundConfig
from auto_round.compressors.budget import parse_budget
from auto_round.compressors.device import resolve_device
from auto_round.compressors.format_runs import default_format, split_runs
from auto_round.compressors.model_free.entry import open_model_free, rounding_only
from auto_round.compressors.run import Run
from auto_round.compressors.saving import Saving
from auto_round.compressors.settings import Settings, check_on_nan, check_whole, names_tuple, parse_scale_dtype
from auto_round.errors import ConfigError, ModelError, UnsupportedError, nearest
from auto_round.export.cache_scales import parse_cache_scheme
from auto_round.export.formats import OutputFormat, parse_formats
from auto_round.layer_config import parse_ignore_layers, parse_layer_config
from auto_round.logger import ensure_logging, logger
from auto_round.modeling.source import ModelSource, open_source
from auto_round.schemes import SCHEME_KEYS, QuantizationScheme, mixed_preset, normalize_preset_name, parse_scheme

if TYPE_CHECKING:
    from auto_round.compressors.job import Job

_ALGORITHM_DEFAULTS: dict[str, Any] = {
    "lr": None, "minmax_lr": None, "momentum": 0.0, "enable_minmax_tuning": True, "enable_quanted_input": True,
    "not_use_best_mse": False, "enable_adam": False, "disable_opt_rtn": None,
}  # fmt: skip
_OTHER_DEFAULTS: dict[str, Any] = {
    "ignore_layers": "", "quant_lm_head": False, "scale_dtype": "fp16", "to_quant_block_names": None, "amp": True,
    "enable_deterministic_algorithms": False, "trust_remote_code": False, "model_dtype": None, "verify": True,
    "device": None, "adam": None, "enable_opt_rtn": None, "bs": None, "algorithm": None, "static_kv_dtype": None,
    "static_kv_granularity": "tensor", "static_attention_dtype": None, "static_attention_granularity": "tensor",
    "imatrix": None, "save_imatrix": None, "on_nan": "fail", "allow_pickle": False,
    "model_free": False, "parallelism": None, "max_memory": None,
}  # fmt: skip
_CACHE_OPTIONS = (
    "static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity",
)  # fmt: skip
_NOT_YET = {
    "rotation_config": "rotation", "avg_bits": "AutoScheme",
    "processor": "multimodal models", "image_processor": "multimodal models", "enable_alg_ext": "SignRound v2",
    "enable_norm_bias_tuning": "norm tuning", "nblocks": "tuning several blocks as one",
}  # fmt: skip


class AutoRound(Saving):
    """Quantizes a causal language model.

    Args:
        model: a folder, a hub id, or a Transformers model object. A model given by path is never whole in memory; an
            object is worked on in place.
        tokenizer: read from the model's folder when None.
        platform: "hf" or "model_scope", where hub ids are looked up.
        scheme: preset name, dict of fields, or QuantizationScheme.
        layer_config: {name, partial name or regular expression: preset name or fields} for layers that differ.
        dataset: calibration data: a dataset string, list of texts, list of token ids or a DataLoader; None for the
            default set.
        iters: tuning steps for each block; None means 200, 0 means rounding only.
        seqlen, nsamples: tokens in a sample, and how many samples.
        batch_size, gradient_accumulate_steps: samples in a forward pass, and passes in a step.
        low_gpu_mem_usage: keep activations on the CPU.
        device_map: the device to tune on: 0, "cuda:0", "cpu", "auto".
        enable_torch_compile: compile the rounding step; None: on GPUs only.
        seed: of sample choice and order. The same seed gives the same files.
        low_cpu_mem_usage: read a model given by path block by block; False loads it whole (a checkpoint in FP8 or MXFP4
            is read block by block all the same).
        alg_configs: an `RTNConfig` or `SignRoundConfig` instead of the single settings, or "rtn", "auto_round".
        **kwargs: fields of the scheme (`bits`, `group_size`, `sym`, `data_type`, ...), of the algorithm (`lr`,
            `minmax_lr`, `momentum`, `enable_adam`, `enable_minmax_tuning`, `enable_quanted_input`, `not_use_best_mse`,
            `disable_opt_rtn`), and `ignore_layers`, `quant_lm_head`, `scale_dtype`, `to_quant_block_names`, `amp`,
            `enable_deterministic_algorithms`, `trust_remote_code`, `model_dtype`, `verify`; and for static FP8 scales
            of the key-value cache and of attention, `static_kv_dtype`, `static_kv_granularity`,
            `static_attention_dtype`, `static_attention_granularity`; for GGUF files `imatrix` (an importance file of
            llama.cpp's to use) and `save_imatrix` (where to write one); `on_nan` ("fail", "rtn", "keep"), what is done
            about layers whose numbers are not finite (docs/faults.md); `allow_pickle`, which reads pytorch_model.bin;
            `max_memory`, which bounds what a run holds (docs/memory.md): "4GB" of RAM, or "cpu=4GB,0=10GB".
            `model_free=True` rounds to nearest tensor by tensor, without a model (docs/model-free.md), with
            `parallelism`.

    Raises:
        ConfigError: an unknown or contradictory argument; the message names the nearest.
        ModelError, DeviceError, UnsupportedError: the model or device cannot be used so.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module,
        tokenizer: Any = None,
        platform: str = "hf",
        scheme: str | Mapping[str, Any] | QuantizationScheme = "W4A16",
        layer_config: Mapping[str, Any] | str | None = None,
        dataset: Any = None,
        iters: int | None = None,
        seqlen: int = 2048,
        nsamples: int = 128,
        batch_size: int = 8,
        gradient_accumulate_steps: int | None = None,
        low_gpu_mem_usage: bool = False,
        device_map: Any = 0,
        enable_torch_compile: bool | None = None,
        seed: int = 42,
        low_cpu_mem_usage: bool = True,
        alg_configs: Any = None,
        **kwargs: Any,
    ) -> None:
        ensure_logging()
        options = _checked_options(kwargs)
        if options["model_free"]:
            iters = rounding_only(alg_configs, iters, options)
        steps = gradient_accumulate_steps if gradient_accumulate_steps is not None else 1
        algorithm, optimized = _algorithm(alg_configs, iters, options["bs"] or batch_size, steps, options)
        resolved = _resolve_scheme(scheme, options)
        device = resolve_device(device_map if options["device"] is None else options["device"])
        config = parse_layer_config(layer_config) if isinstance(layer_config, str) else dict(layer_config or {})
        cache = {name: options[name] for name in _CACHE_OPTIONS}
        wants_cache = parse_cache_scheme(*cache.values()) is not None
        self.settings = Settings(
            scheme=resolved,
            scheme_name=_scheme_name(scheme, resolved),
            algorithm=algorithm,
            mixed=mixed_preset(scheme),
            optimized_start=optimized,
            layer_config=config,
            ignore_layers=parse_ignore_layers(options["ignore_layers"]),
            quant_lm_head=bool(options["quant_lm_head"]),
            to_quant_block_names=names_tuple(options["to_quant_block_names"]),
            dataset=dataset,
            nsamples=check_whole("nsamples", nsamples, int(_tunes_or_searches(algorithm) or wants_cache)),
            seqlen=check_whole("seqlen", seqlen, 2),
            seed=check_whole("seed", seed, 0),
            device=device,
            amp=bool(options["amp"]),
            low_gpu_mem_usage=bool(low_gpu_mem_usage),
            enable_torch_compile=device.type == "cuda" if enable_torch_compile is None else bool(enable_torch_compile),
            deterministic=bool(options["enable_deterministic_algorithms"]),
            scale_dtype=parse_scale_dtype(options["scale_dtype"]),
            platform=platform,
            trust_remote_code=bool(options["trust_remote_code"]),
            verify=bool(options["verify"]),
            imatrix=None if options["imatrix"] is None else os.fspath(options["imatrix"]),
            save_imatrix=None if options["save_imatrix"] is None else os.fspath(options["save_imatrix"]),
            on_nan=check_on_nan(options["on_nan"]),
            allow_pickle=bool(options["allow_pickle"]),
            max_memory=parse_budget(options["max_memory"], device),
            **cache,
        )
        Saving.__init__(self)
        self._free = open_model_free(model, self.settings, options)
        if self._free is not None:
            self.tokenizer = tokenizer
            return
        self._source = _open(model, self.settings, options["model_dtype"], low_cpu_mem_usage)
        self.tokenizer = tokenizer if tokenizer is not None else self._load_tokenizer()

    @property
    def scheme(self) -> QuantizationScheme:
        return self.settings.scheme

    def plan(self, format: str | Sequence[str] | None = None, output_dir: str | None = None) -> Job:
        """What would be done: layers, bytes on disk, memory, steps. `.render()` gives it as text.

        Raises ConfigError for formats that need several runs; `plans` gives them all.
        """
        jobs = self.plans(format, output_dir)
        if len(jobs) > 1:
            raise ConfigError(f"{format!r} takes {len(jobs)} runs; use plans() for a list, or name fewer formats")
        return jobs[0]

    def plans(self, format: str | Sequence[str] | None = None, output_dir: str | None = None) -> list[Job]:
        """`plan` of every run: each GGUF format is one of its own, and the other formats are one together."""
        if self._free is not None:
            return [self._free.plan(self._formats(format), output_dir)]
        runs = split_runs(self.settings, self._formats(format))
        return [
            Run(self._source, settings, self.tokenizer).checked_plan(formats, output_dir) for settings, formats in runs
        ]

    def _formats(self, given: str | Sequence[str] | None) -> list[OutputFormat]:
        return parse_formats(default_format(self.settings) if given is None else given)

    def _load_tokenizer(self) -> Any:
        folder = getattr(self._source, "folder", None)
        name = folder if folder is not None else self._source.name_or_path
        if folder is None and not Path(str(name)).is_dir():
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self.settings.trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            dataset = self.settings.dataset
            if self.settings.needs_data and (dataset is None or isinstance(dataset, str)):
                raise ModelError(
                    f"the tokenizer in {name} cannot be read ({error}); give tokenizer=..., or token ids as dataset"
                ) from error
            logger.warning("the tokenizer in %s cannot be read; going on without it", name)
            return None


def _open(model: Any, settings: Settings, dtype: Any, low_cpu_mem_usage: bool) -> ModelSource:
    source = open_source(
        model, dtype=dtype, trust_remote_code=settings.trust_remote_code, platform=settings.platform,
        allow_pickle=settings.allow_pickle,
    )  # fmt: skip
    for note in getattr(source, "notes", ()):
        logger.warning("%s", note)
    if source.stored_as:
        logger.info("the model is quantized already (%s); it is dequantized as it is read", source.stored_as)
    if low_cpu_mem_usage or not source.lazy or source.stored_as:
        return source  # a quantized checkpoint is always read block by block
    from transformers import AutoModelForCausalLM

    folder = getattr(source, "folder", model)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=source.dtype, trust_remote_code=settings.trust_remote_code
    )
    return open_source(loaded)


def _checked_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All keyword options with their defaults. Raises ConfigError for an unknown one."""
    defaults = {**_ALGORITHM_DEFAULTS, **_OTHER_DEFAULTS, **dict.fromkeys(SCHEME_KEYS)}
    for name, value in kwargs.items():
        if name in _NOT_YET:
            one_block = name == "nblocks" and value == 1
            if value is not None and value is not False and not one_block:
                raise UnsupportedError(f"{name}={value!r}: {_NOT_YET[name]} is not available in this version")
        elif name == "disable_model_free":
            if value and kwargs.get("model_free"):
                raise ConfigError("model_free and disable_model_free contradict each other; give one")
        elif name not in defaults:
            named = [p for p in inspect.signature(AutoRound.__init__).parameters if p not in ("self", "kwargs")]
            known = [*defaults, *named]
            raise ConfigError(f"AutoRound has no argument {name!r}{nearest(name, known)}")
    options = {**defaults, **{k: v for k, v in kwargs.items() if k in defaults}}
    if options["adam"] is not None:
        options["enable_adam"] = bool(options["adam"])
    if options["enable_opt_rtn"]:
        if options["disable_opt_rtn"]:
            raise ConfigError("enable_opt_rtn and disable_opt_rtn contradict each other; give one")
        options["disable_opt_rtn"] = False
    return options


def _algorithm(
    alg_configs: Any, iters: int | None, batch_size: int, accumulate: int, options: Mapping[str, Any]
) -> tuple[RTNConfig | SignRoundConfig, bool]:
    """The algorithm's settings, and whether scales are searched."""
    optimized = not options["disable_opt_rtn"]
    if isinstance(alg_configs, (list, tuple)) and len(alg_configs) == 1:
        alg_configs = alg_configs[0]
    if options["algorithm"] is not None:
        if alg_configs is not None:
            raise ConfigError("algorithm and alg_configs mean the same; give one")
        alg_configs = options["algorithm"]
    if isinstance(alg_configs, (RTNConfig, SignRoundConfig)):
        _check_not_twice(alg_configs, iters, batch_size, accumulate, options)
        return alg_configs, alg_configs.optimized if isinstance(alg_configs, RTNConfig) else optimized
    if isinstance(alg_configs, str):
        name = alg_configs.lower().replace("-", "_")
        if name == "rtn":
            iters = 0
        elif name not in ("auto_round", "autoround", "sign_round", "signround"):
            raise UnsupportedError(f"algorithm {alg_configs!r} is not available in this version; use auto_round or rtn")
    elif alg_configs is not None:
        raise UnsupportedError(f"alg_configs={alg_configs!r}: give one RTNConfig or SignRoundConfig")
    steps = 200 if iters is None else check_whole("iters", iters, 0)
    if steps == 0:
        return RTNConfig(disable_opt_rtn=options["disable_opt_rtn"]), optimized
    kind = AdamRoundConfig if options["enable_adam"] else SignRoundConfig
    names = ("lr", "minmax_lr", "momentum", "enable_minmax_tuning", "enable_quanted_input", "not_use_best_mse")
    values = {name: options[name] for name in names}
    return kind(iters=steps, batch_size=batch_size, gradient_accumulate_steps=accumulate, **values), optimized


def _check_not_twice(
    config: RTNConfig | SignRoundConfig, iters: int | None, batch_size: int, accumulate: int, options: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a single setting that says something else than `config` does."""
    given = {k: v for k, v in options.items() if k in _ALGORITHM_DEFAULTS and v != _ALGORITHM_DEFAULTS[k]}
    given |= {"iters": iters} if iters is not None else {}
    given |= {"batch_size": batch_size} if batch_size != 8 else {}
    given |= {"gradient_accumulate_steps": accumulate} if accumulate != 1 else {}
    if isinstance(config, SignRoundConfig):
        given.pop("disable_opt_rtn", None)  # where the scales start from is no field of it
    own = {"iters": 0, **vars(config)}
    for name, value in given.items():
        if own.get(name) != value and (name in own or isinstance(config, SignRoundConfig)):
            raise ConfigError(
                f"{name}={value!r} contradicts alg_configs={config!r}; say it in {type(config).__name__} alone"
            )


def _tunes_or_searches(algorithm: RTNConfig | SignRoundConfig) -> bool:
    return isinstance(algorithm, SignRoundConfig) or algorithm.optimized


def _resolve_scheme(scheme: Any, options: Mapping[str, Any]) -> QuantizationScheme:
    base = parse_scheme(scheme)
    overrides = {key: options[key] for key in SCHEME_KEYS if options[key] is not None}
    if isinstance(overrides.get("group_size"), str):
        parts = [int(p) for p in str(overrides["group_size"]).split(",")]
        overrides["group_size"] = parts[0] if len(parts) == 1 else tuple(parts)
    return base.with_overrides(overrides)


def _scheme_name(scheme: Any, resolved: QuantizationScheme) -> str:
    if isinstance(scheme, str) and (parse_scheme(scheme) == resolved or mixed_preset(scheme) is not None):
        return normalize_preset_name(scheme)
    if resolved.data_type == "int" and not resolved.quantizes_activations:
        size = resolved.group_size
        group = f"G{size}" if isinstance(size, int) and size > 0 else ""
        return f"W{resolved.bits}A16{group}{'' if resolved.sym else ' asymmetric'}"
    return resolved.describe()
