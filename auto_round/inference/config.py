"""Read a checkpoint's `quantization_config`, of AutoRound, GPTQ, AWQ, GPTQModel or block-wise FP8: which layers are
quantized, and how each one is stored. Transformers' `AutoRoundConfig` replaces the `quant_method` of GPTQ and AWQ
configs and keeps their keys, so the kind of config is recognised by its keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from auto_round.codecs.activation import activation_function
from auto_round.errors import AutoRoundError, ConfigError, ModelError, UnsupportedError
from auto_round.inference.kernels import LayerSpec
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import AUTO_ROUND_FLOATS, COMPRESSED_TENSORS_FLOATS, float_family_of, layout_name
from auto_round.layouts.integers import AWQ, GPTQ_V1, GPTQ_V2, MLX, PLAIN_INT, IntegerLayout
from auto_round.logger import logger
from auto_round.schemes import ACTIVATION_KEYS, QuantizationScheme

_V1_NAME, _V2_NAME, _COMPRESSED_TENSORS = "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:llm_compressor"


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is stored in the checkpoint."""

    scheme: QuantizationScheme
    layout: Layout
    packing: str  # name in the table of backends
    packing_format: str  # the same in a config

    @classmethod
    def of(cls, scheme: QuantizationScheme, packing: Packing) -> LayerFormat:
        return cls(scheme, packing.layout, packing.name, packing.names[0])

    def columns_per_scale(self, in_features: int) -> int:
        """Input columns that share a scale in a layer of this width."""
        size = self.scheme.group_size if isinstance(self.scheme.group_size, int) else self.scheme.group_size[1]
        return size if 0 < size < in_features else in_features

    def spec(self, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> LayerSpec:
        """The values that a kernel needs to decide whether it can run a layer of this format."""
        columns, scheme = self.columns_per_scale(in_features), self.scheme
        return LayerSpec(scheme.bits, columns, scheme.sym, in_features, out_features, dtype, device)


@dataclass(frozen=True)
class Packing:
    """How integer layers are stored."""

    name: str  # in the table of backends
    layout: Layout
    names: tuple[str, ...]  # values of `packing_format` in a config that mean it, the one to write first

    def read(self, values: Mapping[str, Any], acts: dict[str, Any], where: str) -> LayerFormat:
        """The format of a layer that a config describes by `values` and, for its activations, `acts`. Raises
        UnsupportedError when there is none, ConfigError for malformed values; `where` names the layer."""
        bits, size, data_type = read_int(values, "bits", 4), values.get("group_size", 128), values.get("data_type")
        if type(size) is not int:
            raise UnsupportedError(f"{where} has group_size={size!r}; this version runs groups along the input only")
        assert isinstance(self.layout, IntegerLayout)
        if str(data_type or "int") not in self.layout.families:
            raise UnsupportedError(f"{where} has data type {data_type!r}; this version runs integer weights only")
        if bits not in self.layout.bits:
            raise UnsupportedError(f"{where} has {bits}-bit weights; this version runs {self.layout.bits}")
        if acts and not self.layout.activations:
            raise UnsupportedError(
                f"{where} has packed weights and activations of {acts['act_bits']} bits; this version runs packed "
                "weights with 16-bit activations only"
            )
        if acts and acts["act_group_size"] is None:
            acts["act_group_size"] = -1
        size, sym = size if size > 0 else -1, bool(values.get("sym", True))
        return LayerFormat.of(QuantizationScheme(bits, size, sym, "int", **acts), self)


class PluginPacking(Packing):
    """How layers of a plugin's format are stored, of data types of any kind."""

    def read(self, values: Mapping[str, Any], acts: dict[str, Any], where: str) -> LayerFormat:
        if acts:
            raise UnsupportedError(f"{where} quantizes activations, which packing_format {self.name!r} cannot have")
        fields = {key: values[key] for key in ("bits", "group_size", "sym", "data_type") if key in values}
        return LayerFormat.of(QuantizationScheme.from_dict(fields), self)


class FloatPacking(Packing):
    """How layers of small float types are stored, which have layouts of their own under names of integer packings."""

    def read(self, values: Mapping[str, Any], acts: dict[str, Any], where: str) -> LayerFormat:
        bits, sym, data_type = read_int(values, "bits", 4), bool(values.get("sym", True)), str(values["data_type"])
        if float_family_of(data_type) == "fp" and values.get("fmt") == "e5m2":
            data_type = "fp8_e5m2"
        # `weight_strategy` and `weight_block_size` take precedence over the key `group_size`.
        size = values.get("weight_block_size") or values.get("group_size", 32)
        if values.get("weight_strategy") == "tensor":
            size = 0
        elif isinstance(size, (list, tuple)):
            if len(size) != 2 or not all(type(part) is int and part > 0 for part in size):
                raise ConfigError(f"{where} has blocks of {size!r}; two positive whole numbers are needed")
            size = (size[0], size[1])
        elif type(size) is not int:
            raise ConfigError(f"{where} has group_size={size!r}, which is not a whole number")
        scheme = QuantizationScheme(bits, size, sym, data_type, **acts)
        try:
            problem = self.layout.problem(scheme)
        except UnsupportedError as error:  # no such width
            problem = str(error)
        if problem is not None:
            raise UnsupportedError(f"{where}: {problem}")
        packing_format = str(values["packing_format"])
        layout = COMPRESSED_TENSORS_FLOATS if packing_format == _COMPRESSED_TENSORS else self.layout
        return LayerFormat(scheme, layout, layout_name(scheme), packing_format)


_BUILT_IN = (
    Packing("gptq_zp+-1", GPTQ_V1, (_V1_NAME, "auto_round:gptq", "auto_gptq", "gptq")),
    Packing("gptq", GPTQ_V2, (_V2_NAME, "auto_round", "auto_round:auto_round", "gptqmodel")),
    Packing("mlx", MLX, ("auto_round:mlx", "mlx")),
    Packing("awq", AWQ, ("auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq")),
    Packing("int8", PLAIN_INT, (_COMPRESSED_TENSORS,)),
)
PACKINGS: dict[str, Packing] = {name: packing for packing in _BUILT_IN for name in packing.names}  # by `packing_format`
_FLOATS = FloatPacking("floats", AUTO_ROUND_FLOATS, ())


def _packing(values: Mapping[str, Any]) -> Packing | None:
    """The packing that a config's values mean; None where it is unknown."""
    packing = PACKINGS.get(str(values["packing_format"]))
    if isinstance(packing, PluginPacking):
        return packing
    return packing if float_family_of(str(values.get("data_type") or "int")) is None else _FLOATS


_BLOCK_KEYS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
# Leading parts of a module name that differ between versions of Transformers and between model wrappers.
_WRAPPERS = re.compile(r"^(?:(?:model|language_model|text_model|transformer)\.)+")
# Keys that only GPTQ and AWQ configs have.
GPTQ_AWQ_KEYS = (
    "checkpoint_format", "desc_act", "dynamic", "modules_in_block_to_quantize", "modules_to_not_convert",
    "q_group_size", "version", "w_bit", "zero_point",
)  # fmt: skip
_META = re.compile(r"[\\*+?^$|()\[\]{}]")


class CheckpointConfig:
    """A parsed `quantization_config`. Build it with `read_config`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.default = _layer_format(values, "the checkpoint")  # of quantized layers without an entry of their own
        for key in ("rotation_config", "spinquant_config"):
            if values.get(key):
                raise UnsupportedError(
                    f"the checkpoint has a {key}: its inputs must be rotated, which this version cannot do; "
                    "quantize the model without a rotation"
                )
        layout = self.default.layout
        is_awq = layout is AWQ and any(key in values for key in ("modules_to_not_convert", "version", "zero_point"))
        # Without block prefixes, all linear layers but the excluded ones are quantized.
        self.everywhere = is_awq or _method(values) == "fp8"
        is_gptq, packing_format = layout in (GPTQ_V1, GPTQ_V2), str(values["packing_format"])
        # Whether there may be a `g_idx` tensor for each layer.
        self.g_idx = is_gptq and ("desc_act" in values or packing_format.endswith("gptqmodel"))
        blocks = (_name_list(values.get(key)) for key in _BLOCK_KEYS)
        self.block_prefixes = next((found for found in blocks if found), ())
        self.backend = str(values.get("backend") or "auto")
        self._extra, rules = _mapping(values, "extra_config"), _mapping(values, "dynamic")
        self._excluded = _name_list(values.get("modules_to_not_convert")) if self.everywhere else ()
        self._only_suffixes = _name_list(values.get("modules_in_block_to_quantize"))
        self._lm_head = bool(values.get("lm_head", False))
        for name, entry in (*self._extra.items(), *rules.items()):
            if not isinstance(entry, Mapping) and entry not in (None, False):
                raise ConfigError(f"quantization_config has {entry!r} for {name!r}; it must be an object")
        for pattern in filter(_META.search, self._extra):
            re.compile(pattern)
        patterns = [re.compile(rule.removeprefix("+:").removeprefix("-:")) for rule in rules]
        excluding = [rule.startswith("-:") or entry is False for rule, entry in rules.items()]
        self._rules = list(zip(patterns, excluding, rules.values(), strict=True))

    def layer(self, name: str, in_block: bool, names: Sequence[str] = ()) -> LayerFormat | None:
        """The format of the layer `name`, called one of `names`; None in full precision, as unnamed outside blocks."""
        names = tuple(names) or (name,)
        entry = next((found for n in names if (found := self._entry(n, in_block)) is not None), None)
        if entry is not None:
            return _override(self.default, entry, name)
        if not in_block:
            return self._dynamic(names) if self._lm_head and name.rpartition(".")[2] == "lm_head" else None
        if any(f".{key}." in f".{n}." for key in self._excluded for n in names):
            return None
        if self._only_suffixes and not any(f".{n}".endswith(f".{s}") for s in self._only_suffixes for n in names):
            return None
        return self._dynamic(names)

    def _entry(self, name: str, in_block: bool) -> Mapping[str, Any] | None:
        if name in self._extra:
            return self._extra[name]
        bare = _WRAPPERS.sub("", name)
        # A partial name, such as `k_proj`, matches whole segments of a layer's name.
        matches = lambda key: re.search(key, name) if _META.search(key) else f".{key}." in f".{name}."
        whole = (key for key in self._extra if _WRAPPERS.sub("", key) == bare)
        parts = (key for key in self._extra if in_block and matches(key))
        return next((self._extra[key] for key in chain(whole, parts)), None)

    def _dynamic(self, names: Sequence[str]) -> LayerFormat | None:
        """GPTQModel's `dynamic`: `-:regex` excludes a layer, `+:regex` or `regex` overrides the default."""
        for pattern, excludes, entry in self._rules:
            if any(map(pattern.match, names)):
                return None if excludes else _override(self.default, entry or {}, names[0])
        return self.default


def read_config(config: Any) -> CheckpointConfig:
    """Parse a `quantization_config`. Raises UnsupportedError for what cannot run here, ConfigError if malformed."""
    with _malformed_as_config_error():
        return CheckpointConfig(_auto_round_values(config))


@contextmanager
def _malformed_as_config_error() -> Iterator[None]:
    try:
        yield
    except AutoRoundError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError, re.error) as error:
        raise ConfigError(f"the quantization_config is malformed ({error!r}); check config.json") from error


def _auto_round_values(config: Any) -> dict[str, Any]:
    """A config's values with those of GPTQ, AWQ and FP8 translated to AutoRound's keys; other keys stay."""
    values = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    for old, new in (("w_bit", "bits"), ("q_group_size", "group_size")):  # AutoAWQ's older keys
        if values.get(old) is not None:
            values[new] = values[old]
    method = _method(values)
    if method == "fp8":
        block = values.get("weight_block_size")
        if block is None or str(values.get("activation_scheme") or "dynamic").lower() != "dynamic":
            raise UnsupportedError(
                "the checkpoint is FP8 without two-dimensional blocks, or with static activations; Transformers opens "
                "it by itself"
            )
        usual = {
            "bits": 8, "data_type": "fp", "sym": True, "act_bits": 8, "act_data_type": "fp", "act_sym": True,
            "act_dynamic": True, "act_group_size": block[1],
        }  # fmt: skip
        values = usual | {key: value for key, value in values.items() if value is not None}
    values["packing_format"] = str(values.get("packing_format") or f"auto_round:{'awq' if method == 'awq' else 'gptq'}")
    layout = getattr(_packing(values), "layout", None)
    if layout is GPTQ_V1 and values.get("checkpoint_format") == "gptq_v2":
        values["packing_format"] = _V2_NAME
    if layout is AWQ and "zero_point" in values:
        values["sym"] = not values["zero_point"]
    return values


def _method(values: Mapping[str, Any]) -> str:
    """The quant_method, a text or Transformers' enumeration, in lower case."""
    return str(values.get("quant_method") or "").rpartition(".")[2].lower()


def is_gptq_or_awq(config: Any) -> bool:
    """Whether a `quantization_config` uses the keys of GPTQ or AWQ."""
    values = config if isinstance(config, Mapping) else vars(config)
    method = _method(values)
    return method != "fp8" and (method in ("gptq", "awq") or any(values.get(key) is not None for key in GPTQ_AWQ_KEYS))


def _override(default: LayerFormat, entry: Mapping[str, Any], name: str) -> LayerFormat | None:
    """The format of a layer with an entry of its own, which names what differs from the default."""
    values = {key: value for key, value in entry.items() if value is not None}
    if read_int(values, "bits", default.scheme.bits) >= 16:
        return None
    inherited = {key: value for key, value in default.scheme.items() if value is not None}
    inherited["packing_format"] = default.packing_format
    if _packing(inherited) is _FLOATS and _packing(inherited | values) is not _FLOATS:
        inherited["packing_format"] = _V1_NAME  # an integer layer in a file of small floats
    return _layer_format(inherited | values, f"layer {name}")


def _layer_format(values: Mapping[str, Any], where: str) -> LayerFormat:
    """The format that a config's values, or those of one layer, describe; `where` names it in messages."""
    packing = _packing(values)
    if packing is None:
        raise UnsupportedError(
            f"packing_format {values['packing_format']!r} cannot be loaded; known: {', '.join(sorted(PACKINGS))}"
        )
    acts: dict[str, Any] = {}
    if int(values.get("act_bits") or 16) < 16:
        acts = {key: tuple(v) if isinstance(v := values.get(key), list) else v for key in ACTIVATION_KEYS}
    found = packing.read(values, acts, where)
    if found.scheme.activations is not None:
        activation_function(found.scheme.activations)  # raises an error for types that it does not know
    return found


def read_int(values: Mapping[str, Any], key: str, default: int) -> int:
    """The whole number at `key`. Raises ConfigError for anything else."""
    value = values.get(key, default)
    if type(value) is not int:
        raise ConfigError(f"quantization_config has {key}={value!r}, which is not a whole number")
    return value


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"quantization_config has {key} of type {type(value).__name__}; it must be an object")
    return value


def _name_list(value: Any) -> tuple[str, ...]:
    """The names in None, a comma-separated text, a list of names or a list of lists of names."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if value and not isinstance(value, Iterable):
        raise ConfigError(f"quantization_config has {value!r} in place of a list of module names")
    return tuple(name for item in value or () for name in _name_list(item))


def resolve_layers(
    config: CheckpointConfig, names: Sequence[str], find_blocks: Callable[[], Sequence[str]],
    config_names: Callable[[str], Sequence[str]] = lambda name: (name,),
) -> dict[str, LayerFormat]:  # fmt: skip
    """The format of every quantized layer among `names`, the model's linear layers, which the config may call
    `config_names`. `find_blocks` is used when the config names no block that exists. Raises ModelError for no layer."""
    prefixes = tuple(f"{prefix}." for prefix in config.block_prefixes)
    inside = {n for n in names if any(called.startswith(prefixes) for called in config_names(n))}
    if not inside and config.everywhere and not prefixes:
        inside = set(names)
    elif not inside:
        blocks = find_blocks()
        if prefixes:
            given = ", ".join(config.block_prefixes)
            logger.warning("the checkpoint's blocks %s are not in this model; using %s", given, blocks[:1])
        inside = {n for n in names if n.startswith(tuple(f"{block}." for block in blocks))}
    with _malformed_as_config_error():
        found = {n: fmt for n in names if (fmt := config.layer(n, n in inside, config_names(n))) is not None}
    if not found:
        raise ModelError(
            "the quantization_config names no layer of this model as quantized "
            f"(blocks: {', '.join(config.block_prefixes) or 'not given'}); check config.json"
        )
    return found
