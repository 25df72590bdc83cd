"""`AutoRound`, the entry point for Python users, and its deprecated names (`AutoRoundLLM` and others)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round import envs
from auto_round.algorithms.gptq import GPTQConfig
from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.formats.base import OutputFormat, parse_formats
from auto_round.formats.cache_scales import none_if_16_bits, parse_cache_scheme
from auto_round.later import DIFFUSION
from auto_round.layer_config import parse_ignore_layers, parse_layer_config
from auto_round.logger import ensure_logging, logger, warn_once
from auto_round.modeling.source import ModelSource, open_source
from auto_round.plugins import load_plugins
from auto_round.run.driver import Run
from auto_round.run.folders import default_format, split_runs
from auto_round.run.keywords import (
    checked_options,
    choose_algorithm,
    given_algorithm,
    needs_samples,
    resolve_scheme,
    scheme_label,
)
from auto_round.run.model_free.driver import check_rtn_only, open_model_free
from auto_round.run.planner import check_before_opening
from auto_round.run.saving import Saving
from auto_round.run.settings import (
    Settings,
    check_on_nan,
    check_whole_number,
    names_tuple,
    parse_budget,
    parse_scale_dtype,
    resolve_device,
)
from auto_round.run.settings_view import SettingsView, job_fields
from auto_round.schemes import QuantizationScheme, mixed_preset

if TYPE_CHECKING:
    from auto_round.run.plan import Job


_CACHE_OPTIONS = (
    "static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity",
)  # fmt: skip


class AutoRound(Saving, SettingsView):
    """Quantizes a causal language model.

    Args:
        model: a folder, a hub id, or a Transformers model object. A model given by path is read block by block; an
            object is changed in place.
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
        low_cpu_mem_usage: read a model given by path block by block; False loads it completely (except FP8 and MXFP4
            checkpoints).
        alg_configs: an `RTNConfig` or `SignRoundConfig` instead of the single settings, or "rtn", "auto_round". "gptq"
            or a `GPTQConfig`: codes by error feedback (docs/tuning.md), alone with `iters=0`, else as the start of
            tuning. A configuration may include the scheme's fields.
        **kwargs: fields of the scheme (`bits`, `group_size`, `sym`, `data_type`, ...), of the algorithm (`lr`,
            `minmax_lr`, `momentum`, `enable_adam`, `enable_minmax_tuning`, `enable_quanted_input`, `not_use_best_mse`,
            `disable_opt_rtn`), and `ignore_layers`, `quant_lm_head`, `scale_dtype`, `to_quant_block_names`, `amp`,
            `enable_deterministic_algorithms`, `trust_remote_code`, `model_dtype`, `verify`; and for static FP8 scales
            of the key-value cache and of attention, `static_kv_dtype`, `static_kv_granularity`,
            `static_attention_dtype`, `static_attention_granularity`; for GGUF files `imatrix` (a file of llama.cpp to
            use) and `save_imatrix` (a file to write); `on_nan` ("fail", "rtn", "keep"), for layers with NaN or Inf
            (docs/faults.md); `allow_pickle`, which reads pytorch_model.bin; `max_memory`, the memory limit of a run
            (docs/memory.md): "4GB" of RAM, or "cpu=4GB,0=10GB". `model_free=True` rounds to nearest tensor by tensor,
            without a model (docs/model-free.md), with `parallelism`. `format` is the default format of
            `quantize_and_save`, `save_quantized` and `plan`. `plugins` are Python files that register data types,
            formats and others (docs/plugins.md). `strict=True`: a layer name that matches nothing is an error (by
            default a warning; an error in `plan`).

    The settings, with every default filled in, can be read as attributes: `ar.bits`, `ar.layer_config`, `ar.iters`
    (docs/python-api.md).

    Raises:
        ConfigError: an unknown or contradictory argument; the message names the nearest.
        ModelError, DeviceError, UnsupportedError: the model, device or combination is not supported.
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
        for sentence in envs.without_effect():
            warn_once("%s", sentence)
        options = checked_options(kwargs, inspect.signature(AutoRound.__init__).parameters)
        load_plugins(options["plugins"] or ())
        algorithm_given = given_algorithm(alg_configs, options)
        if options["model_free"]:
            iters = check_rtn_only(algorithm_given, iters, options)
        steps = gradient_accumulate_steps if gradient_accumulate_steps is not None else 1
        algorithm, optimized = choose_algorithm(algorithm_given, iters, options["bs"] or batch_size, steps, options)
        gptq = algorithm_given if isinstance(algorithm_given, GPTQConfig) else None
        resolved = resolve_scheme(scheme, options)
        self._named_formats = None if options["format"] is None else parse_formats(options["format"])
        device = resolve_device(device_map if options["device"] is None else options["device"])
        config = parse_layer_config(layer_config) if isinstance(layer_config, str) else dict(layer_config or {})
        cache = {name: none_if_16_bits(options[name]) for name in _CACHE_OPTIONS}
        needs_data = gptq is not None or parse_cache_scheme(*cache.values()) is not None
        self.settings = Settings(
            scheme=resolved,
            scheme_name=scheme_label(scheme, resolved),
            algorithm=algorithm,
            mixed=mixed_preset(scheme),
            optimized_start=optimized,
            transforms=options["transforms"],
            gptq=gptq,
            layer_config=config,
            ignore_layers=parse_ignore_layers(options["ignore_layers"]),
            quant_lm_head=bool(options["quant_lm_head"]),
            to_quant_block_names=names_tuple(options["to_quant_block_names"]),
            dataset=dataset,
            nsamples=check_whole_number("nsamples", nsamples, int(needs_samples(algorithm) or needs_data)),
            seqlen=check_whole_number("seqlen", seqlen, 2),
            seed=check_whole_number("seed", seed, 0),
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
            strict=options["strict"],
            **cache,
        )
        check_before_opening(self.settings, self._named_formats)
        self._batch_size, self._accumulate = options["bs"] or batch_size, steps
        self._low_cpu_mem_usage = bool(low_cpu_mem_usage)
        self._layers_seen = None
        Saving.__init__(self)
        self._free = open_model_free(model, self.settings, options)
        if self._free is not None:
            self.tokenizer = tokenizer
            return
        self._source = _open_model(model, self.settings, options["model_dtype"], low_cpu_mem_usage)
        self.tokenizer = tokenizer if tokenizer is not None else self._load_tokenizer()

    def plan(self, format: str | Sequence[str] | None = None, output_dir: str | None = None) -> Job:
        """The plan of a run: layers, bytes on disk, memory, steps. `.render()` returns it as text.

        A name in `layer_config` or `ignore_layers` that matches nothing is an error, unless `strict=False` was given.

        Raises ConfigError for formats that need several runs; `plans` gives them all.
        """
        jobs = self.plans(format, output_dir)
        if len(jobs) > 1:
            raise ConfigError(f"{format!r} takes {len(jobs)} runs; use plans() for a list, or name fewer formats")
        return jobs[0]

    def plans(self, format: str | Sequence[str] | None = None, output_dir: str | None = None) -> list[Job]:
        """The plans of all runs: one run for each GGUF format, and one for all other formats."""
        strict = replace(self.settings, strict=self.settings.strict is not False)
        if self._free is not None:
            return [replace(self._free, settings=strict).plan(self._formats(format), output_dir)]
        runs = split_runs(strict, self._formats(format))
        return [
            Run(self._source, settings, self.tokenizer).checked_plan(formats, output_dir) for settings, formats in runs
        ]

    def _formats(self, given: str | Sequence[str] | None) -> list[OutputFormat]:
        if given is not None or self._named_formats is None:
            self._named_formats = parse_formats(default_format(self.settings) if given is None else given)
        return list(self._named_formats)

    def _planned(self) -> Job:
        return self._planned_for(self._named_formats)

    def _layer_fields_getter(self) -> Callable[[], Mapping[str, Mapping[str, Any]]]:
        formats = self._named_formats
        return lambda: job_fields(self._planned_for(formats), self.settings)

    def _layer_fields_now(self) -> Mapping[str, Mapping[str, Any]]:
        return self._layer_config()

    def _planned_for(self, formats: Sequence[OutputFormat] | None) -> Job:
        if self._free is not None:
            return self._free.plan(formats if formats is not None else parse_formats(default_format(self.settings)))
        if formats is None:
            return self._run().memory_plan()
        settings, group = split_runs(self.settings, formats, quiet=True)[0]
        return Run(self._source, settings, self.tokenizer).plan(group)

    def _load_tokenizer(self) -> Any:
        folder = getattr(self._source, "folder", None)
        name = folder if folder is not None else self._source.name_or_path
        if folder is None and not Path(str(name)).is_dir():
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self.settings.trust_remote_code)
        except Exception as error:  # tokenizers raise errors of any type
            dataset = self.settings.dataset
            if self.settings.needs_data and (dataset is None or isinstance(dataset, str)):
                raise ModelError(
                    f"the tokenizer in {name} cannot be read ({error}); give tokenizer=..., or token ids as dataset"
                ) from error
            logger.warning("the tokenizer in %s cannot be read; continuing without it", name)
            return None


def _refuse_diffusion_pipeline(model: Any) -> None:
    """Raise UnsupportedError for a diffusion pipeline: an object of diffusers, or a folder of one."""
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model).expanduser()
        if (folder / "model_index.json").is_file() and not (folder / "config.json").exists():
            raise UnsupportedError(DIFFUSION.sentence(f"{os.fspath(model)} holds a diffusion pipeline"))
    elif type(model).__module__.partition(".")[0] == "diffusers":
        raise UnsupportedError(DIFFUSION.sentence(f"a model of class {type(model).__name__}"))


def _open_model(model: Any, settings: Settings, dtype: Any, low_cpu_mem_usage: bool) -> ModelSource:
    _refuse_diffusion_pipeline(model)
    source = open_source(
        model, dtype=dtype, trust_remote_code=settings.trust_remote_code, platform=settings.platform,
        allow_pickle=settings.allow_pickle,
    )  # fmt: skip
    source.bounded = settings.max_memory is not None
    for note in getattr(source, "notes", ()):
        logger.warning("%s", note)
    if source.stored_as:
        logger.info("the model is quantized already (%s); it is dequantized while it is read", source.stored_as)
    if low_cpu_mem_usage or not source.lazy or source.stored_as:
        return source  # a quantized checkpoint is always read block by block
    from transformers import AutoModelForCausalLM

    folder = getattr(source, "folder", model)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=source.dtype, trust_remote_code=settings.trust_remote_code
    )
    return open_source(loaded)


class AutoRoundLLM(AutoRound):
    """`AutoRound` under an older name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _deprecated(type(self).__name__, "AutoRound")
        super().__init__(*args, **kwargs)


class AutoRoundAdam(AutoRound):
    """`AutoRound` with `enable_adam=True`, under an older name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _deprecated(type(self).__name__, "AutoRound with enable_adam=True")
        super().__init__(*args, **{"enable_adam": True, **kwargs})


class AutoRoundMLLM(AutoRoundLLM):
    """`AutoRound` under an older name. Multimodal models are refused."""


class AutoRoundDiffusion(AutoRoundLLM):
    """`AutoRound` under an older name. Diffusion models are refused."""


def _deprecated(old: str, new: str) -> None:
    warn_once("%s is an older name; use %s", old, new)
