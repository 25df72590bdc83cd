"""Parse AutoRound's keyword arguments: reject unknown ones, choose the algorithm, resolve the scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from auto_round.algorithms.base import ALGORITHMS
from auto_round.algorithms.gptq import GPTQConfig
from auto_round.algorithms.quantization.rtn.config import RegisteredConfig, RTNConfig
from auto_round.algorithms.quantization.sign_round.config import AdamRoundConfig, SignRoundConfig
from auto_round.algorithms.transforms.base import split_transforms
from auto_round.codecs.block_float import block_float_spec
from auto_round.codecs.ggml.types import ggml_type_of
from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.later import feature_of, refuse_algorithm, refuse_keyword
from auto_round.logger import logger
from auto_round.run.settings import check_whole_number
from auto_round.schemes import SCHEME_KEYS, QuantizationScheme, mixed_preset, normalize_preset_name, parse_scheme

AlgorithmConfig = RTNConfig | SignRoundConfig

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
    "model_free": False, "parallelism": None, "max_memory": None, "format": None, "strict": None,
    "plugins": None,
}  # fmt: skip
_TUNED_NAMES = ("auto_round", "autoround", "sign_round", "signround")
# Arguments of older scripts that are accepted and ignored, with the reason.
_NO_EFFECT = {"mllm": "the kind of a model is found from its files"}
# Fields of a configuration that are also arguments of `AutoRound`, with their common defaults.
_SHARED = {"batch_size": 8, "gradient_accumulate_steps": 1}


def checked_options(kwargs: Mapping[str, Any], arguments: Iterable[str] = ()) -> dict[str, Any]:
    """All keyword options with their defaults.

    Args:
        kwargs: given options.
        arguments: names of the other arguments, for suggestions.

    Raises:
        ConfigError: an unknown option, or two that contradict each other.
        UnsupportedError: an option of a feature that this version does not have.
    """
    defaults = {**_ALGORITHM_DEFAULTS, **_OTHER_DEFAULTS, **dict.fromkeys(SCHEME_KEYS)}
    for name, value in kwargs.items():
        refuse_keyword(name, value)
        if name in _NO_EFFECT:
            logger.warning("%s has no effect: %s", name, _NO_EFFECT[name])
        elif name == "disable_model_free":
            if value and kwargs.get("model_free"):
                raise ConfigError("model_free and disable_model_free contradict each other; give one")
        elif name == "disable_deterministic_algorithms":
            if value and kwargs.get("enable_deterministic_algorithms"):
                raise ConfigError("enable_ and disable_deterministic_algorithms contradict each other; give one")
        elif name == "backend":
            raise ConfigError("backend belongs to loading a quantized model: transformers.AutoRoundConfig(backend=...)")
        elif name not in defaults and feature_of(name) is None:
            raise ConfigError(f"AutoRound has no argument {name!r}{nearest(name, [*defaults, *arguments])}")
    options = {**defaults, **{k: v for k, v in kwargs.items() if k in defaults}}
    if options["adam"] is not None:
        options["enable_adam"] = bool(options["adam"])
    if options["enable_opt_rtn"]:
        if options["disable_opt_rtn"]:
            raise ConfigError("enable_opt_rtn and disable_opt_rtn contradict each other; give one")
        options["disable_opt_rtn"] = False
    if options["strict"] not in (None, True, False):
        raise ConfigError(f"strict={options['strict']!r} is not allowed; use True, False or None")
    return options


def given_algorithm(alg_configs: Any, options: dict[str, Any]) -> AlgorithmConfig | GPTQConfig | str | None:
    """The configuration or name given as `alg_configs` or `algorithm`, or None.

    The scheme fields of a configuration are moved to `options`, and one with `iters=0` becomes an `RTNConfig`.

    Raises:
        ConfigError: no such algorithm, several of them, or fields that contradict `options`.
        UnsupportedError: an algorithm that this version does not have.
    """
    if options["algorithm"] is not None:
        if alg_configs is not None:
            raise ConfigError("algorithm and alg_configs mean the same and cannot be used together; give one")
        alg_configs = options["algorithm"]
    given = [part.strip() for part in alg_configs.split(",")] if isinstance(alg_configs, str) else alg_configs
    entries = list(given) if isinstance(given, (list, tuple)) else [given]
    options["transforms"], entries = split_transforms(entries)
    entries = entries or [None]
    for entry in entries:
        if isinstance(entry, str):
            refuse_algorithm(f"algorithm {entry!r}", entry)
    if len(entries) != 1:
        raise ConfigError(f"alg_configs={alg_configs!r}: give one algorithm, auto_round, gptq or rtn")
    one = entries[0]
    if one is None:
        return None
    if isinstance(one, str):
        if one in ALGORITHMS:
            return RegisteredConfig(quantizer=one)
        name = one.lower().replace("-", "_")
        known = ("rtn", "gptq", *_TUNED_NAMES, *ALGORITHMS)
        if name not in known:
            names = " or ".join(("auto_round", "gptq", "rtn", *ALGORITHMS))
            raise ConfigError(f"unknown algorithm {one!r}{nearest(name, known) or ';'} Use {names}")
        if name == "gptq":
            return GPTQConfig()
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


def choose_algorithm(
    given: AlgorithmConfig | GPTQConfig | str | None, iters: int | None, batch_size: int, accumulate: int,
    options: Mapping[str, Any],
) -> tuple[AlgorithmConfig, bool]:  # fmt: skip
    """The algorithm's configuration, and whether scales are searched. `given`: see `given_algorithm`; with GPTQ the
    configuration of the tuning that starts from it, or of rounding without tuning.

    Raises:
        ConfigError: settings that contradict each other.
    """
    optimized = not options["disable_opt_rtn"]
    if isinstance(given, RegisteredConfig):
        for name, value in (("iters", iters), ("disable_opt_rtn", options["disable_opt_rtn"])):
            if value:
                raise ConfigError(f"{name}={value!r} has no effect with algorithm {given.quantizer!r}; leave it out")
        return given, given.optimized
    if isinstance(given, (RTNConfig, SignRoundConfig)):
        if isinstance(given, SignRoundConfig):
            arguments = {"batch_size": batch_size, "gradient_accumulate_steps": accumulate}
            taken: dict[str, Any] = {k: v for k, v in arguments.items() if getattr(given, k) == _SHARED[k]}
            given = replace(given, **taken)
        _check_not_twice(given, iters, batch_size, accumulate, options)
        return given, given.optimized if isinstance(given, RTNConfig) else optimized
    steps = 200 if iters is None else check_whole_number("iters", iters, 0)
    if steps == 0 or given == "rtn":
        return RTNConfig(disable_opt_rtn=options["disable_opt_rtn"]), optimized
    kind = AdamRoundConfig if options["enable_adam"] else SignRoundConfig
    names = ("lr", "minmax_lr", "momentum", "enable_minmax_tuning", "enable_quanted_input", "not_use_best_mse")
    values = {name: options[name] for name in names}
    return kind(iters=steps, batch_size=batch_size, gradient_accumulate_steps=accumulate, **values), optimized


def _check_not_twice(
    config: AlgorithmConfig, iters: int | None, batch_size: int, accumulate: int, options: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a single setting that contradicts `config`."""
    given = {k: v for k, v in options.items() if k in _ALGORITHM_DEFAULTS and v != _ALGORITHM_DEFAULTS[k]}
    given |= {"iters": iters} if iters is not None else {}
    given |= {"batch_size": batch_size} if batch_size != _SHARED["batch_size"] else {}
    given |= {"gradient_accumulate_steps": accumulate} if accumulate != 1 else {}
    if isinstance(config, SignRoundConfig):
        given.pop("disable_opt_rtn", None)  # the search of initial scales is not a field of SignRoundConfig
    own = {"iters": 0, **vars(config)}
    for name, value in given.items():
        if own.get(name) != value and (name in own or isinstance(config, SignRoundConfig)):
            raise ConfigError(
                f"{name}={value!r} contradicts alg_configs={config!r}; give it in {type(config).__name__} only"
            )


def needs_samples(algorithm: AlgorithmConfig) -> bool:
    """Whether the algorithm uses calibration data."""
    return isinstance(algorithm, SignRoundConfig) or algorithm.optimized


def resolve_scheme(scheme: Any, options: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme with its fields overridden by `options`. Raises ConfigError for an invalid value."""
    base = parse_scheme(scheme)
    overrides = {key: options[key] for key in SCHEME_KEYS if options[key] is not None}
    if isinstance(overrides.get("group_size"), str):
        parts = [part.strip() for part in str(overrides["group_size"]).split(",")]
        if not all(part.lstrip("-").isdigit() for part in parts):
            raise ConfigError(f"group_size={overrides['group_size']!r}: give a whole number, or two as ROWS,COLUMNS")
        overrides["group_size"] = int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
    changed = base.with_overrides(overrides)
    is_gguf = isinstance(scheme, str) and normalize_preset_name(scheme).startswith("GGUF:")
    if is_gguf and changed != base and ggml_type_of(changed) is None:
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
    changed = []
    if scheme.quantizes_weights and not scheme.sym and _is_float(scheme.data_type, scheme.bits):
        changed.append("sym")
    activations = scheme.activations
    if activations is not None and not activations.sym and _is_float(activations.data_type, activations.bits):
        if scheme.act_sym is False or "sym" not in changed:  # None takes the weights' value
            changed.append("act_sym")
    return (scheme.with_overrides(dict.fromkeys(changed, True)) if changed else scheme), changed


def _is_float(data_type: str, bits: int) -> bool:
    try:
        return block_float_spec(data_type, bits) is not None
    except UnsupportedError:  # an invalid width, which the check of the scheme reports
        return False


def no_zero_point(scheme: QuantizationScheme, field: str) -> str:
    """Why `sym` or `act_sym` stays True."""
    name = scheme.data_type if field == "sym" else scheme.act_data_type or scheme.data_type
    return f"data type {name} has no zero point, so it stays symmetric"


def scheme_label(scheme: Any, resolved: QuantizationScheme) -> str:
    """Name of a scheme: the preset's name, else a description."""
    if isinstance(scheme, str) and (parse_scheme(scheme) == resolved or mixed_preset(scheme) is not None):
        return normalize_preset_name(scheme)
    if resolved.data_type == "int" and not resolved.quantizes_activations:
        size = resolved.group_size
        group = f"G{size}" if isinstance(size, int) and size > 0 else ""
        return f"W{resolved.bits}A16{group}{'' if resolved.sym else ' asymmetric'}"
    return resolved.describe()
