"""Parse AutoRound's keyword arguments: reject unknown ones, choose the algorithm, resolve the scheme."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from auto_round.algorithms.base import ALGORITHMS
from auto_round.algorithms.gptq import GPTQConfig
from auto_round.algorithms.quantization.rtn.config import RegisteredConfig, RTNConfig
from auto_round.algorithms.quantization.sign_round.config import AdamRoundConfig, SignRoundConfig
from auto_round.algorithms.transforms.base import split_transforms
from auto_round.codecs.base import Scheme
from auto_round.codecs.ggml.types import ggml_type_of
from auto_round.codecs.kinds import codec_of
from auto_round.config import ALIASES, ON_NAN, TUNED_NAMES, QuantConfig, plain
from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.formats.base import none_if_16_bits, parse_cache_scheme
from auto_round.later import REFUSED, refuse_algorithm, refuse_keyword
from auto_round.layer_config import INFO_KEYS, parse_ignore_layers, parse_layer_config
from auto_round.logger import logger
from auto_round.run.settings import (
    Settings,
    check_whole_number,
    names_tuple,
    parse_budget,
    parse_scale_dtype,
    resolve_device,
)
from auto_round.schemes import SCHEME_KEYS, QuantizationScheme, mixed_preset, normalize_preset_name, parse_scheme

AlgorithmConfig = RTNConfig | SignRoundConfig

_DEFAULTS: Mapping[str, Any] = QuantConfig().keywords()
_SHARED_KEYS = ("batch_size", "gradient_accumulate_steps")  # fields of a configuration, and arguments of `AutoRound`
_TUNING_KEYS = ("lr", "minmax_lr", "momentum", "enable_minmax_tuning", "enable_quanted_input", "not_use_best_mse")
_CACHE_KEYS = (
    "static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity",
)  # fmt: skip
_UNRESOLVED_KEYS = (
    "ignore_layers", "quant_lm_head", "to_quant_block_names", "amp", "enable_deterministic_algorithms",
    "low_gpu_mem_usage", "verify", "strict", "save_imatrix",
)  # fmt: skip
# Arguments of older scripts that are accepted and ignored, with the reason.
_NO_EFFECT = {"mllm": "the kind of a model is found from its files"}
# Flags that switch another one off: that one, and how an error calls both.
_OPPOSITES = {
    "disable_model_free": ("model_free", "model_free and disable_model_free"),
    "disable_deterministic_algorithms": (
        "enable_deterministic_algorithms", "enable_ and disable_deterministic_algorithms",
    ),
    "enable_opt_rtn": ("disable_opt_rtn", "enable_opt_rtn and disable_opt_rtn"),
}  # fmt: skip


def resolve_settings(keywords: Mapping[str, Any], alg_configs: Any = None) -> Settings:
    """The settings of a run from the keywords of `AutoRound`, with all errors that need no model."""
    options = checked_options(keywords)
    chosen = given_algorithm(alg_configs, options)
    if options["model_free"]:
        check_rtn_only(chosen, options)
    algorithm, optimized = choose_algorithm(chosen, options)
    scheme = resolve_scheme(options["scheme"], options)
    device = resolve_device(options["device_map"])
    if isinstance(options["layer_config"], str):
        options["layer_config"] = parse_layer_config(options["layer_config"])
    layer_config = options["layer_config"] = dict(options["layer_config"] or {})
    options |= {name: none_if_16_bits(options[name]) for name in _CACHE_KEYS}
    cache = parse_cache_scheme(*(options[name] for name in _CACHE_KEYS))
    gptq = chosen if isinstance(chosen, GPTQConfig) else None
    if options["damping"] is not None and gptq is None:
        raise ConfigError(f"damping={options['damping']!r} belongs to algorithm='gptq'; give both, or leave it out")
    searches = not isinstance(algorithm, RTNConfig) or algorithm.optimized
    needs_samples = searches or gptq is not None or cache is not None
    for name, low in (("nsamples", int(needs_samples)), ("seqlen", 2), ("seed", 0)):
        check_whole_number(name, options[name], low)
    if (on_nan := options["on_nan"]) not in ON_NAN:
        raise ConfigError(f"on_nan={on_nan!r} is not allowed; use {', '.join(ON_NAN)}{nearest(str(on_nan), ON_NAN)}")
    # The keywords that give this algorithm again; `algorithm` names what the number of steps does not tell.
    fields = {k: v for k, v in vars(algorithm).items() if k in _DEFAULTS and k not in SCHEME_KEYS}
    names = list(options["transforms"])
    if gptq is not None:
        names.append("gptq")
        fields["damping"] = gptq.damping
    elif isinstance(chosen, RegisteredConfig):
        names.append(chosen.quantizer)
    config = _plain_config({**options, "iters": 0, **fields, "algorithm": ",".join(names) or None})
    plain_values = config.keywords()
    compiles = plain_values["enable_torch_compile"]
    given, mixed = options["scheme"], mixed_preset(options["scheme"])
    named = isinstance(given, str) and (parse_scheme(given) == scheme or mixed is not None)
    return Settings(
        **vars(config.source), **vars(config.data), **{name: plain_values[name] for name in _UNRESOLVED_KEYS},
        config=config, scheme=scheme,
        scheme_name=normalize_preset_name(given) if named else codec_of(scheme).label,
        algorithm=algorithm, mixed=mixed, optimized_start=optimized, transforms=options["transforms"], gptq=gptq,
        layer_config=layer_config, device=device,
        enable_torch_compile=device.type == "cuda" if compiles is None else compiles,
        scale_dtype=parse_scale_dtype(options["scale_dtype"]), cache=cache, on_nan=on_nan,
        max_memory=parse_budget(options["max_memory"], device),
    )  # fmt: skip


def without_tuning(settings: Settings) -> Settings:
    """The settings of the same run with `iters=0, algorithm="gptq"`."""
    gptq, given = settings.gptq or GPTQConfig(), settings.config.keywords()
    names = ",".join([*settings.transforms, "gptq"])
    config = QuantConfig.from_keywords({**given, "iters": 0, "algorithm": names, "damping": gptq.damping})
    return replace(
        settings, algorithm=RTNConfig(disable_opt_rtn=given["disable_opt_rtn"]), gptq=gptq, config=config,
        asked_algorithm=settings.algorithm_name,
    )  # fmt: skip


def _plain_config(options: Mapping[str, Any]) -> QuantConfig:
    """The configuration as plain values, whatever types the keywords had. `dataset` may be an object."""
    values: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = options[name]
        if isinstance(default, bool) and value != "auto":  # of model_free
            values[name] = bool(value)
        else:
            values[name] = default if value is None else _PLAIN.get(name, lambda same: same)(value)
    return QuantConfig.from_keywords(values)


def _plain_scheme(scheme: Any) -> Any:
    return scheme if isinstance(scheme, str) else {k: plain(v) for k, v in scheme.items() if v is not None}


def _plain_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Schemes as mappings; what `AutoRound.layer_config` tells beside them is left out."""
    found: dict[str, Any] = dict(config)
    for name, entry in config.items():
        if isinstance(entry, QuantizationScheme):
            found[name] = {"scheme": _plain_scheme(entry)}
        elif isinstance(entry, Mapping):
            found[name] = {k: plain(v) for k, v in entry.items() if k not in INFO_KEYS}
    return found


def _plain_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "scheme": _plain_scheme, "layer_config": _plain_layers, "ignore_layers": parse_ignore_layers,
    "to_quant_block_names": names_tuple, "scale_dtype": _plain_dtype, "model_dtype": _plain_dtype, "imatrix": os.fspath,
    "save_imatrix": os.fspath, "max_memory": plain, "enable_torch_compile": bool,
    "device_map": lambda value: value if isinstance(value, int) else str(value),
    "format": lambda value: value if isinstance(value, str) else ",".join(value),
}  # fmt: skip


def checked_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords of `AutoRound`, with the defaults of `QuantConfig`. Raises ConfigError or UnsupportedError for
    options that are unknown, contradict each other, or come later."""
    defaults = {**_DEFAULTS, "enable_opt_rtn": None}
    known = (*defaults, *ALIASES, *_OPPOSITES)
    for name, value in kwargs.items():
        refuse_keyword(name, value)
        if name in _NO_EFFECT:
            logger.warning("%s has no effect: %s", name, _NO_EFFECT[name])
        elif name == "backend":
            raise ConfigError("backend belongs to loading a quantized model: transformers.AutoRoundConfig(backend=...)")
        elif name not in known and name not in REFUSED:
            hint = nearest(name, [*defaults, *ALIASES, "model", "tokenizer", "alg_configs"])
            raise ConfigError(f"AutoRound has no argument {name!r}{hint}")
    for name, (other, message) in _OPPOSITES.items():
        if kwargs.get(name) and kwargs.get(other):
            raise ConfigError(f"{message} contradict each other; give one")
    options = {**defaults, **{k: v for k, v in kwargs.items() if k in defaults}}
    options |= {ALIASES[k]: v for k, v in kwargs.items() if k in ALIASES and v is not None}
    if options["enable_opt_rtn"]:
        options["disable_opt_rtn"] = False
    if options["strict"] not in (None, True, False):
        raise ConfigError(f"strict={options['strict']!r} is not allowed; use True, False or None")
    if options["gradient_accumulate_steps"] is None:
        options["gradient_accumulate_steps"] = defaults["gradient_accumulate_steps"]
    size = options["group_size"]
    if isinstance(size, str):
        parts = [part.strip() for part in size.split(",")]
        if not all(part.lstrip("-").isdigit() for part in parts):
            raise ConfigError(f"group_size={size!r}: give a whole number, or two as ROWS,COLUMNS")
        options["group_size"] = int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
    return options


def given_algorithm(alg_configs: Any, options: dict[str, Any]) -> AlgorithmConfig | GPTQConfig | str | None:
    """The configuration or name given as `alg_configs` or `algorithm`, or None. The scheme fields of a configuration
    are moved to `options`, and one with `iters=0` becomes an `RTNConfig`."""
    if options["algorithm"] is not None:
        if alg_configs is not None:
            raise ConfigError("algorithm and alg_configs mean the same and cannot be used together; give one")
        alg_configs = options["algorithm"]
    given = [part.strip() for part in alg_configs.split(",")] if isinstance(alg_configs, str) else alg_configs
    entries = list(given) if isinstance(given, (list, tuple)) else [given]
    options["transforms"], entries = split_transforms(entries)
    for entry in entries:
        if isinstance(entry, str):
            refuse_algorithm(f"algorithm {entry!r}", entry)
    if len(entries) > 1:
        raise ConfigError(f"alg_configs={alg_configs!r}: give one algorithm, auto_round, gptq or rtn")
    one = entries[0] if entries else None
    if one is None:
        return None
    if isinstance(one, str):
        if one in ALGORITHMS:
            return RegisteredConfig(quantizer=one)
        name = one.lower().replace("-", "_")
        known = ("rtn", "gptq", *TUNED_NAMES, *ALGORITHMS)
        if name not in known:
            names = " or ".join(("auto_round", "gptq", "rtn", *ALGORITHMS))
            raise ConfigError(f"unknown algorithm {one!r}{nearest(name, known) or ';'} Use {names}")
        if name == "gptq":
            return GPTQConfig() if options["damping"] is None else GPTQConfig(damping=options["damping"])
        return "rtn" if name == "rtn" else "auto_round"
    if not isinstance(one, (RTNConfig, SignRoundConfig, GPTQConfig)):
        raise ConfigError(
            f"alg_configs={one!r}: give auto_round, gptq, rtn, or one RTNConfig, GPTQConfig or SignRoundConfig"
        )
    for key, value in one.scheme_overrides().items():
        if options[key] not in (None, value):
            raise ConfigError(f"{key}={options[key]!r} contradicts alg_configs={one!r}; give one of them")
        options[key] = value
    if isinstance(one, SignRoundConfig) and one.iters == 0:
        return RTNConfig(disable_opt_rtn=options["disable_opt_rtn"])
    return one.without_scheme()


def check_rtn_only(given: AlgorithmConfig | GPTQConfig | str | None, options: dict[str, Any]) -> None:
    """Switch tuning and the search for scales off in `options` for a model-free run. When they were asked for too, that
    is a ConfigError, or ends model-free mode if it was only offered ("auto"). `given`: see `given_algorithm`."""
    if options["model_free"] not in (True, "auto"):
        raise ConfigError(f"model_free={options['model_free']!r} is not allowed; use True or False")
    given = options["algorithm"] if given is None else given  # transforms alone are no algorithm
    if isinstance(given, RTNConfig) and not given.optimized:
        return
    reason = None
    if given is not None and str(given).lower() != "rtn":
        reason = f"model_free=True rounds to nearest without calibration data, and the algorithm {given!r} does more"
    elif options["iters"]:
        reason = f"iters={options['iters']} contradicts model_free=True, which does no tuning; leave one out"
    elif options["disable_opt_rtn"] is False:
        reason = "enable_opt_rtn contradicts model_free=True: the search for scales needs calibration data"
        reason += "; leave one out"
    if reason is None:
        options |= {"disable_opt_rtn": True, "iters": 0}
    elif options["model_free"] is True:
        raise ConfigError(reason)
    else:
        options["model_free"] = False


def choose_algorithm(
    given: AlgorithmConfig | GPTQConfig | str | None, options: Mapping[str, Any]
) -> tuple[AlgorithmConfig, bool]:
    """The algorithm's configuration, and whether scales are searched. `given`: see `given_algorithm`; with GPTQ the
    configuration of the tuning that starts from it, or of rounding without tuning."""
    optimized = not options["disable_opt_rtn"]
    if isinstance(given, RegisteredConfig):
        for name in ("iters", "disable_opt_rtn"):
            if options[name]:
                raise ConfigError(
                    f"{name}={options[name]!r} has no effect with algorithm {given.quantizer!r}; leave it out"
                )
        return given, given.optimized
    if isinstance(given, RTNConfig):
        _check_not_twice(given, options)
        return given, given.optimized
    if isinstance(given, SignRoundConfig):
        taken: dict[str, Any] = {k: options[k] for k in _SHARED_KEYS if getattr(given, k) == _DEFAULTS[k]}
        given = replace(given, **taken)
        _check_not_twice(given, options)
        return given, optimized
    steps = 200 if options["iters"] is None else check_whole_number("iters", options["iters"], 0)
    if steps == 0 or given == "rtn":
        return RTNConfig(disable_opt_rtn=options["disable_opt_rtn"]), optimized
    kind = AdamRoundConfig if options["enable_adam"] else SignRoundConfig
    values = {name: options[name] for name in (*_TUNING_KEYS, *_SHARED_KEYS)}
    return kind(iters=steps, **values), optimized


def _check_not_twice(config: AlgorithmConfig, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a single setting that contradicts `config`."""
    names = [*_TUNING_KEYS, "enable_adam", "iters", *_SHARED_KEYS]
    if isinstance(config, RTNConfig):  # the search of initial scales is not a field of SignRoundConfig
        names.append("disable_opt_rtn")
    own = {"iters": 0, **vars(config)}
    for name in names:
        value = options[name]
        if value != _DEFAULTS[name] and own.get(name) != value and (name in own or isinstance(config, SignRoundConfig)):
            raise ConfigError(
                f"{name}={value!r} contradicts alg_configs={config!r}; give it in {type(config).__name__} only"
            )


def resolve_scheme(scheme: Any, options: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme with its fields overridden by `options`."""
    base = parse_scheme(scheme)
    overrides = {key: options[key] for key in SCHEME_KEYS if options[key] is not None}
    changed = base.with_overrides(overrides)
    typed = isinstance(scheme, str) and normalize_preset_name(scheme).startswith("GGUF:")
    if typed and changed != base and ggml_type_of(changed) is None:
        logger.warning("%s not used: scheme %s has types of its own", ", ".join(overrides), scheme)
        changed = base
    details = [name for name in overrides if name.startswith("act_") and name != "act_bits"]
    if details and not changed.quantizes_activations:
        logger.warning("%s has no effect: activations are not quantized without act_bits", ", ".join(details))
    settled, fields = symmetric_if_required(changed)
    for field in fields:
        logger.warning("%s=False is not used: %s", field, no_zero_point(settled, field))
    return settled


def symmetric_if_required(scheme: QuantizationScheme) -> tuple[QuantizationScheme, list[str]]:
    """Set `sym` and `act_sym` to True for data types without a zero point: (scheme, changed fields)."""

    def symmetric_only(scheme: Scheme) -> bool:
        try:
            return codec_of(scheme).symmetric_only
        except UnsupportedError:  # an unknown type or width, which the check of the scheme reports
            return False

    changed = []
    if scheme.quantizes_weights and not scheme.sym and symmetric_only(scheme):
        changed.append("sym")
    activations = scheme.activations
    if activations is not None and not activations.sym and symmetric_only(activations):
        if scheme.act_sym is False or "sym" not in changed:  # None takes the weights' value
            changed.append("act_sym")
    return (scheme.with_overrides(dict.fromkeys(changed, True)) if changed else scheme), changed


def no_zero_point(scheme: QuantizationScheme, field: str) -> str:
    """Why `sym` or `act_sym` stays True."""
    name = scheme.data_type if field == "sym" else scheme.act_data_type or scheme.data_type
    return f"data type {name} has no zero point, so it stays symmetric"
