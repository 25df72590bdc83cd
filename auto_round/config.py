"""`QuantConfig`: all settings of a quantization run as frozen plain values, and the recipe files that hold them.

The fields here are the keywords of `AutoRound` with their defaults, and the flags of the command line with their help.
A recipe is a `QuantConfig` as YAML or JSON, and holds nothing of the machine: no path, no device, no permission.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from auto_round.errors import ConfigError, nearest
from auto_round.logger import logger
from auto_round.schemes import SCHEME_KEYS, SchemeFields, argument

RECIPE_VERSION = 1
"""Raised when a key changes its meaning or default, or is removed. A new key does not raise it, since older versions
refuse it by name."""
RECIPE_FILE = "recipe.yaml"

ALIASES = {"bs": "batch_size", "device": "device_map", "adam": "enable_adam"}
"""Older keywords of `AutoRound`, by what they are called now."""
TUNED_NAMES = ("auto_round", "autoround", "sign_round", "signround")
DTYPES = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
_FP8 = ("fp8", "float8_e4m3fn")
_GRANULARITIES = ("tensor", "head")
ON_NAN = ("fail", "rtn", "keep")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the model is found and read."""

    platform: str = argument("hf", "where models named by id come from", choices=("hf", "model_scope"))
    model_dtype: str | None = argument(
        None, "dtype to read the model in; default: the one it was saved in", choices=DTYPES
    )
    trust_remote_code: bool = argument(
        False, "allow the model's own Python files to run (default: no)", off="disable_trust_remote_code",
        local="only you can allow a model's Python files to run",
    )  # fmt: skip
    allow_pickle: bool = argument(
        False, "read pytorch_model.bin where there is no safetensors (default: no)", off="disable_allow_pickle",
        local="only you can allow pickles to be read",
    )  # fmt: skip
    plugins: Any = argument(None, local="only you can allow a plugin's Python files to run")


@dataclass(frozen=True, kw_only=True)
class _Preset:
    scheme: str | Mapping[str, Any] = argument("W4A16", 'named scheme, see "auto-round list scheme"', aliases="schemes")


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightsConfig(SchemeFields, _Preset):
    """What the weights become: the scheme, fields that change it, and the layers that differ."""

    layer_config: Mapping[str, Any] = argument(
        {}, 'settings of some layers, by full name, part of it or regex: "{k_proj:{bits:8}}"'
    )
    ignore_layers: tuple[str, ...] = argument((), "layers to leave unquantized, comma separated", aliases="fp_layers")
    quant_lm_head: bool = argument(False, "quantize lm_head too", off="no_quant_lm_head")
    to_quant_block_names: tuple[str, ...] = argument((), "quantize only the blocks under these names, comma separated")
    scale_dtype: str = argument(
        "fp16", "dtype of the stored scales", choices=("fp16", "float16", "bf16", "bfloat16", "fp32", "float32")
    )
    static_kv_dtype: str | None = argument(None, "save k_scale and v_scale for a cache in this type", choices=_FP8)
    static_kv_granularity: str = argument(
        "tensor", "one scale per tensor (default) or per head", choices=_GRANULARITIES
    )
    static_attention_dtype: str | None = argument(None, "save q_scale too, for attention in this type", choices=_FP8)
    static_attention_granularity: str = argument("tensor", "the same for q_scale", choices=_GRANULARITIES)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Calibration data. `dataset`: in a recipe a dataset string; None is the default set."""

    dataset: Any = argument(
        None, 'names or files: "a.json,NeelNanda/pile-10k:num=64:concat=True", see "auto-round list dataset"'
    )
    nsamples: int = argument(128, "samples", aliases="nsample")
    seqlen: int = argument(2048, "tokens per sample", aliases="seq_len")
    seed: int = argument(42, "seed of every random choice")
    imatrix: str | None = argument(
        None, "weigh inputs by an importance file of llama.cpp's instead of calibration data"
    )


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The algorithm. `iters=0` rounds to nearest; `algorithm` names what `iters` does not tell. `damping`: of gptq."""

    algorithm: str | None = argument(
        None, "auto_round (tuned rounding), gptq (error feedback, alone or before tuning) or rtn (same as --iters 0)",
        aliases="algorithms alg algs alg_config alg_configs",
    )  # fmt: skip
    damping: float | None = argument(None)
    iters: int | None = argument(None, "tuning steps per block, 0 for none (default 200)", aliases="iter")
    lr: float | None = argument(None, "step size of rounding; default: from the number of steps")
    minmax_lr: float | None = argument(None, "step size of scales; default: lr")
    momentum: float = argument(0.0, "momentum of the sign updates")
    batch_size: int = argument(8, "samples per tuning step", aliases="bs train_bs")
    gradient_accumulate_steps: int = argument(1, "batches per step")
    enable_adam: bool = argument(False, "AdamW instead of sign gradient descent", aliases="adam", off="no_enable_adam")
    enable_minmax_tuning: bool = argument(
        True, "tune the scales too", off="disable_minmax_tuning no_enable_minmax_tuning"
    )
    enable_quanted_input: bool = argument(
        True, "feed each block the output of the quantized blocks before it",
        off="disable_quanted_input no_enable_quanted_input",
    )  # fmt: skip
    not_use_best_mse: bool = argument(
        False, "keep the last step's result rather than the best one's", off="no_not_use_best_mse"
    )
    disable_opt_rtn: bool | None = argument(
        None, "scales from minimum and maximum only, no weighted search", off="enable_opt_rtn"
    )
    on_nan: str = argument(
        "fail",
        "a layer with NaN or Inf in weights, calibration or tuning: fail (default), rtn (rounded to nearest), keep "
        "(left unquantized)",
        choices=ON_NAN,
    )
    amp: bool = argument(True, "mixed precision in the tuning forward pass", off="disable_amp")
    enable_torch_compile: bool | None = argument(
        None, "compile the tuning step; default: where it helps", off="disable_torch_compile"
    )
    enable_deterministic_algorithms: bool = argument(
        False, "only deterministic GPU kernels", off="disable_deterministic_algorithms"
    )
    model_free: bool | str = argument(
        False, "round tensor by tensor, without a model; rounding only takes it by itself where it can",
        off="disable_model_free",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Where the run computes and what it may hold."""

    device_map: int | str | None = argument(
        0, 'where to compute: "0", "0,1", "cpu", "cuda:0", "auto" (default 0: the first accelerator, else the CPU)',
        aliases="device devices", quiet=True,
    )  # fmt: skip
    max_memory: int | str | Mapping[str, Any] | None = argument(
        None, 'what may be held: "4GB" of RAM, or "cpu=4GB,0=10GB"; activations go to files where needed'
    )
    low_gpu_mem_usage: bool = argument(
        False, "keep calibration activations in RAM, not on the GPU", off="disable_low_gpu_mem_usage", quiet=True
    )
    low_cpu_mem_usage: bool = argument(True, "one block in RAM at a time", off="disable_low_cpu_mem_usage", quiet=True)
    parallelism: int | None = argument(
        None, "tensors that are worked on at a time (default: one for each core, 8 at most)",
        local="it depends on the machine",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written. `format`: names separated by commas; None is auto_round, or the type of a GGUF scheme."""

    format: str | None = argument(
        None, 'formats, comma separated, see "auto-round list format" (default auto_round)', aliases="formats"
    )
    max_shard_size: int | str = argument("5GB", "largest file")
    verify: bool = argument(True, "reopen the saved files and verify them", off="no_verify disable_verify", quiet=True)
    strict: bool | None = argument(
        None, "a layer name or pattern that matches nothing is an error (default with --dry_run), not a warning",
        off="no_strict", quiet=True,
    )  # fmt: skip
    save_imatrix: str | None = argument(
        None, "write what calibration saw as such a file", local="it is a path of one machine"
    )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """All settings of a run, in parts."""

    version: int = RECIPE_VERSION
    model: str | None = None  # hub id, or name of the model's folder; None outside recipes
    supply: Mapping[str, str] = field(default_factory=dict)  # by keyword, what cannot be written and must be given
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that were set and change the result
    source: SourceConfig = field(default_factory=SourceConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @classmethod
    def from_keywords(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From keywords of `AutoRound`, as plain values. Keywords of no part are ignored."""
        made = {
            name: kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
            for name, kind in PARTS.items()
        }
        return cls(**made)

    def keywords(self) -> dict[str, Any]:
        """All settings as keywords of `AutoRound`."""
        parts = [getattr(self, part) for part in PARTS]
        return {f.name: getattr(part, f.name) for part in parts for f in fields(part)}

    def keywords_with(self, given: Mapping[str, Any], name: str = "the recipe") -> dict[str, Any]:
        """Keywords of `AutoRound`: those of this recipe, overridden by what is given beside it. The log says by what.

        A given scheme replaces the recipe's with all its fields, and so does the configuration of an algorithm. Raises
        ConfigError when something that the recipe could not hold is not given.
        """
        given = {ALIASES.get(key, key): value for key, value in given.items()}
        missing = {key: reason for key, reason in self.supply.items() if given.get(key) is None}
        if missing:
            told = "; ".join(f"{key} ({reason})" for key, reason in missing.items())
            raise ConfigError(f"{name} cannot hold {told}; give {', '.join(f'--{key}' for key in missing)} beside it")
        for variable, value in self.environment.items():
            if os.environ.get(variable) != value:
                logger.warning("%s was made with %s=%s, which changes the result; set it too", name, variable, value)
        kept = {key: value for key, value in self.keywords().items() if value is not None}
        replaced: set[str] = set(given)
        if "scheme" in given:
            replaced |= {*SCHEME_KEYS}
        if "enable_opt_rtn" in given:
            replaced.add("disable_opt_rtn")
        if "algorithm" in given or "alg_configs" in given:
            replaced |= {"algorithm", "damping"}
        algorithm = given.get("alg_configs", given.get("algorithm"))
        if isinstance(algorithm, SchemeFields):
            replaced |= {f.name for f in fields(TuningConfig)} | set(algorithm.scheme_overrides())
        changes = {key: kept.pop(key) for key in replaced & set(kept)}
        shown = [f"{k}={given.get(k, 'default')!r} instead of {v!r}" for k, v in changes.items() if given.get(k) != v]
        if shown:
            logger.info("%s is used, but for %s", name, ", ".join(sorted(shown)))
        return {**kept, **given}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML, without what is None, empty or not for recipes, and `quiet` defaults."""
        head = {name: plain(getattr(self, name)) for name in ("version", "model", "supply", "environment")}
        parts = {
            name: {
                f.name: plain(value)
                for f in fields(kind)
                if (value := getattr(getattr(self, name), f.name)) is not None
                and "local" not in f.metadata
                and not (f.metadata["quiet"] and value == f.default)
            }
            for name, kind in PARTS.items()
        }
        return {name: value for name, value in {**head, **parts}.items() if value}

    @classmethod
    def from_dict(cls, values: Any, name: str = "the recipe") -> QuantConfig:
        """What `to_dict` gave, or a part of it: what is left out takes its default. `name` is for messages.

        Raises ConfigError for a newer version, an unknown key and a value of another type; the message names the key.
        """
        if not isinstance(values, Mapping) or "version" not in values:
            raise ConfigError(f"{name} is no recipe of auto-round: it has no version; write version: {RECIPE_VERSION}")
        version = values["version"]
        if isinstance(version, int) and version > RECIPE_VERSION:
            raise ConfigError(
                f"{name} has version {version}, and this version of auto-round reads up to {RECIPE_VERSION}; update "
                "auto-round, or make the recipe again"
            )
        if version != 1 or isinstance(version, bool):
            raise ConfigError(f"{name}: version {version!r} is not allowed; give {RECIPE_VERSION}")
        made: QuantConfig = _build(cls, values, name, "")
        return made

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_yaml(cls, text: str, name: str = "the recipe") -> QuantConfig:
        """Read what `to_yaml` or `to_json` gave. Raises what `from_dict` raises, and ConfigError for no YAML."""
        import yaml

        class Loader(yaml.SafeLoader):
            """Refuses a key that is given twice."""

            def construct_mapping(self, node: Any, deep: bool = False) -> Any:
                keys = [self.construct_object(key, deep=True) for key, _ in node.value]
                twice = [key for key in keys if keys.count(key) > 1]
                if twice:
                    raise yaml.YAMLError(f"{twice[0]!r} is given twice{node.start_mark}")
                return super().construct_mapping(node, deep)

        try:
            values = yaml.load(text, Loader)
        except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
            raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(values, name)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    from_json = from_yaml  # YAML holds JSON


PARTS: dict[str, type[Any]] = {
    "source": SourceConfig, "weights": WeightsConfig, "data": DataConfig, "tuning": TuningConfig,
    "memory": MemoryConfig, "output": OutputConfig,
}  # fmt: skip


def read_recipe(path: str | os.PathLike[str]) -> QuantConfig:
    """The recipe in a file, or in `recipe.yaml` of a folder. Raises ConfigError when it cannot be read or is none."""
    file = Path(path).expanduser()
    file = file / RECIPE_FILE if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"recipe {file} cannot be read: {reason}") from error
    return QuantConfig.from_yaml(text, f"recipe {file}")


def plain(value: Any) -> Any:
    """`value` as JSON types; NaN, infinity and objects of other types become their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    known = value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def _build(kind: type[Any], values: Mapping[str, Any], name: str, part: str) -> Any:
    """A dataclass from a mapping; its parts too."""
    hints, own = get_type_hints(kind), {f.name: f for f in fields(kind)}
    made: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{part}.{key}" if part else str(key)
        if key not in own:
            home = [f"; it belongs under {other!r}" for other, one in PARTS.items() if key in one.__dataclass_fields__]
            raise ConfigError(f"{name}: unknown key {where!r}{home[0] if home else nearest(str(key), own)}")
        if "local" in own[key].metadata:
            raise ConfigError(f"{name}: {where} does not belong in a recipe: {own[key].metadata['local']}")
        if hints[key] in PARTS.values():
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: {where}={value!r} is not allowed; give a mapping")
            made[key] = _build(hints[key], value, name, where)
            continue
        try:
            made[key] = _converted(value, hints[key])
        except TypeError:
            types = get_args(hints[key]) if get_origin(hints[key]) in _UNIONS else (hints[key],)
            words = [_WORDS.get(one) or ("a list" if get_origin(one) is tuple else "a mapping") for one in types]
            allowed = " or ".join(dict.fromkeys(word for word in words if word != "null"))
            raise ConfigError(f"{name}: {where}={value!r} is not allowed; give {allowed}") from None
    return kind(**made)


_UNIONS = (Union, UnionType)
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null",
}  # fmt: skip


def _converted(value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint`, a list as tuple, `5e-3` (a text in YAML) as number; TypeError for others."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in _UNIONS:
        for one in args:
            with suppress(TypeError):
                return _converted(value, one)
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_converted(item, one) for item, one in zip(value, kinds, strict=True))
    elif origin is not None and origin is not tuple:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return value
    elif hint is float and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError
