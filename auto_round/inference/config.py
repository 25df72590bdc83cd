"""Read a checkpoint's `quantization_config`: which layers are quantized, and how each one is stored.

Supported are AutoRound's own keys, those of GPTQ, AWQ and GPTQModel, and block-wise FP8. Transformers'
`AutoRoundConfig` replaces the `quant_method` of GPTQ and AWQ configs and keeps their keys, so the kind of config is
recognised by its keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from auto_round.codecs.activation import activation_function
from auto_round.errors import AutoRoundError, ConfigError, ModelError, UnsupportedError
from auto_round.inference.float_config import (
    float_scheme,
    is_float_config,
    naming_of,
    normalize_native_fp8,
    read_int,
    scheme_values,
)
from auto_round.inference.kernels import LayerSpec
from auto_round.layouts.base import Layout
from auto_round.layouts.floats import AUTO_ROUND_FLOATS, layout_name
from auto_round.schemes import ACTIVATION_KEYS, ActivationScheme, QuantizationScheme

INT_BITS = (2, 3, 4, 8)
INT8_BITS = (2, 3, 4, 5, 6, 7, 8)
MLX_BITS = (2, 3, 4, 5, 6, 8)
# packing_format -> (layout, offset subtracted from the zero points)
PACKINGS: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq", "auto_gptq", "gptq"), ("gptq", 1)),
    **dict.fromkeys(("auto_round", "auto_round:auto_round", "auto_round:gptqmodel", "gptqmodel"), ("gptq", 0)),
    **dict.fromkeys(("mlx", "auto_round:mlx"), ("mlx", 0)),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq"), ("awq", 0)),
    "auto_round:llm_compressor": ("int8", 0),
}
# packing_format -> layout of a plugin, see `table.register_layout`.
USER_LAYOUTS: dict[str, Layout] = {}
_BLOCK_KEYS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
# Leading parts of a module name that differ between versions of Transformers and between model wrappers.
_WRAPPERS = re.compile(r"^(?:(?:model|language_model|text_model|transformer)\.)+")
# Keys that only GPTQ and AWQ configs have.
GPTQ_AWQ_KEYS = (
    "checkpoint_format", "desc_act", "dynamic", "modules_in_block_to_quantize", "modules_to_not_convert",
    "q_group_size", "version", "w_bit", "zero_point",
)  # fmt: skip
_META = re.compile(r"[\\*+?^$|()\[\]{}]")


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is stored in the checkpoint.

    Attributes:
        bits: 2, 3, 4 or 8; in the MLX layout 5 and 6 too.
        group_size: along the input dimension; -1 is one group per output channel, or what `scheme` says.
        sym: whether the zero point is the same for all groups.
        layout: "gptq", "awq", "mlx" or "int8"; of small float types such as "mxfp4", see `layout_name`.
        zero_offset: subtracted from the zero points when they were stored, modulo 2**bits.
        activation: how the layer's inputs are quantized; None: not at all.
        scheme: of a layer of a small float type or in a plugin's layout, else None.
        naming: the layout of such a layer in the file.
    """

    bits: int
    group_size: int
    sym: bool
    layout: str
    zero_offset: int
    activation: ActivationScheme | None = None
    scheme: QuantizationScheme | None = None
    naming: Layout = AUTO_ROUND_FLOATS

    @property
    def packing(self) -> str:
        """The name in the table of backends: gptq, gptq_zp+-1, awq, mlx or int8; of small float types the layout's."""
        return f"{self.layout}_zp+-1" if self.zero_offset else self.layout

    def columns_per_scale(self, in_features: int) -> int:
        """Input columns that share a scale in a layer of this width."""
        return self.group_size if 0 < self.group_size < in_features else in_features

    def spec(self, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> LayerSpec:
        """The values that a kernel needs to decide whether it can run a layer of this format."""
        group_size = self.columns_per_scale(in_features)
        return LayerSpec(self.bits, group_size, self.sym, in_features, out_features, dtype, device)


@dataclass(frozen=True)
class CheckpointConfig:
    """A parsed `quantization_config`. Build it with `read_config`.

    Attributes:
        default: format of a quantized layer without an entry of its own.
        block_prefixes: modules that hold the quantized blocks; empty when the config names none.
        everywhere: without block prefixes, all linear layers but the excluded ones are quantized (AWQ's rule).
        g_idx: the layout may include a `g_idx` tensor for each layer (GPTQ).
        backend: the backend requested by the user or the file.
    """

    default: LayerFormat
    block_prefixes: tuple[str, ...]
    everywhere: bool
    g_idx: bool
    backend: str
    extra: Mapping[str, Mapping[str, Any]]
    dynamic: Mapping[str, Any]
    excluded: tuple[str, ...]
    only_suffixes: tuple[str, ...]
    lm_head: bool

    def layer(self, name: str, in_block: bool, names: Sequence[str] = ()) -> LayerFormat | None:
        """The format of the linear layer `name`, or None when it is in full precision.

        Args:
            in_block: whether it is in a quantized block. Outside blocks a layer is quantized only when it is named.
            names: names that the config may use for it; default: `name` alone.
        """
        names = tuple(names) or (name,)
        entry = next((found for n in names if (found := self._entry(n, in_block)) is not None), None)
        if entry is not None:
            return _override(self.default, entry, name)
        if not in_block:
            return self._dynamic(names) if self.lm_head and name.rpartition(".")[2] == "lm_head" else None
        if any(f".{key}." in f".{n}." for key in self.excluded for n in names):
            return None
        if self.only_suffixes and not any(f".{n}".endswith(f".{s}") for s in self.only_suffixes for n in names):
            return None
        return self._dynamic(names)

    def _entry(self, name: str, in_block: bool) -> Mapping[str, Any] | None:
        if name in self.extra:
            return self.extra[name]
        bare = _WRAPPERS.sub("", name)
        for key, entry in self.extra.items():
            if _WRAPPERS.sub("", key) == bare:
                return entry
        if in_block:
            for key, entry in self.extra.items():
                # A partial name, such as `k_proj`, matches whole segments of a layer's name.
                if re.search(key, name) if _META.search(key) else f".{key}." in f".{name}.":
                    return entry
        return None

    def _dynamic(self, names: Sequence[str]) -> LayerFormat | None:
        """GPTQModel's `dynamic`: `-:regex` excludes a layer, `+:regex` or `regex` overrides the default."""
        for rule, entry in self.dynamic.items():
            if any(re.match(_rule_pattern(rule), name) for name in names):
                excluded = rule.startswith("-:") or entry is False
                return None if excluded else _override(self.default, entry or {}, names[0])
        return self.default


def read_config(config: Any) -> CheckpointConfig:
    """Parse a `quantization_config`: a mapping or an object such as Transformers' AutoRoundConfig.

    Raises:
        UnsupportedError: a data type, packing, rotation or activation scheme that this version cannot run.
        ConfigError: malformed values.
    """
    with _malformed_as_config_error():
        found = _read_config(config)
        for pattern in (*filter(_META.search, found.extra), *(_rule_pattern(rule) for rule in found.dynamic)):
            re.compile(pattern)
        for name, entry in (*found.extra.items(), *found.dynamic.items()):
            if not isinstance(entry, Mapping) and entry not in (None, False):
                raise ConfigError(f"quantization_config has {entry!r} for {name!r}; it must be an object")
    return found


@contextmanager
def _malformed_as_config_error() -> Iterator[None]:
    """Turn the errors that malformed values of a configuration cause into a ConfigError."""
    try:
        yield
    except AutoRoundError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError, re.error) as error:
        raise ConfigError(f"the quantization_config is malformed ({error!r}); check config.json") from error


def _rule_pattern(rule: str) -> str:
    """The regular expression of a rule of GPTQModel's `dynamic`."""
    return rule.removeprefix("+:").removeprefix("-:")


def _read_config(config: Any) -> CheckpointConfig:
    values = normalize_native_fp8(_plain(config))
    method = str(values.get("quant_method")).lower()
    packing = str(values.get("packing_format") or f"auto_round:auto_{'awq' if method == 'awq' else 'gptq'}")
    is_fp8 = method.rpartition(".")[2] == "fp8"
    own = packing in USER_LAYOUTS or is_float_config(values)
    layout, offset = ("float", 0) if own else _packing(packing)
    if layout == "gptq" and values.get("checkpoint_format") == "gptq_v2":
        offset = 0
    awq_keys = [key for key in ("modules_to_not_convert", "version", "zero_point") if key in values]
    is_awq = layout == "awq" and bool(awq_keys)
    sym = not values["zero_point"] if "zero_point" in awq_keys and is_awq else values.get("sym", True)
    if own:
        default = _scheme_format(values, packing, "the checkpoint")
    else:
        default = LayerFormat(
            read_int(values, "bits", 4), _group_size(values.get("group_size", 128), "the checkpoint"),
            bool(sym), layout, offset, _activation(values, layout, "the checkpoint"),
        )  # fmt: skip
        _check_values(values, "the checkpoint")
        _check_bits(default.bits, layout, "the checkpoint")
    for key in ("rotation_config", "spinquant_config"):
        if values.get(key):
            raise UnsupportedError(
                f"the checkpoint has a {key}: its inputs must be rotated, which this version cannot do; "
                "quantize the model without a rotation"
            )
    prefixes = next((found for key in _BLOCK_KEYS if (found := _name_list(values.get(key)))), ())
    excluded = _name_list(values.get("modules_to_not_convert")) if is_awq or is_fp8 else ()
    return CheckpointConfig(
        default=default,
        block_prefixes=prefixes,
        everywhere=is_awq or is_fp8,
        g_idx=layout == "gptq" and ("desc_act" in values or packing.endswith("gptqmodel")),
        backend=str(values.get("backend") or "auto"),
        extra=_mapping(values, "extra_config"),
        dynamic=_mapping(values, "dynamic"),
        excluded=excluded,
        only_suffixes=_name_list(values.get("modules_in_block_to_quantize")),
        lm_head=bool(values.get("lm_head", False)),
    )


def is_gptq_or_awq(config: Any) -> bool:
    """Whether a `quantization_config` uses the keys of GPTQ or AWQ."""
    values = _plain(config)
    method = str(values.get("quant_method") or "").rpartition(".")[2].lower()
    if method == "fp8":
        return False
    return method in ("gptq", "awq") or any(values.get(key) is not None for key in GPTQ_AWQ_KEYS)


def packing_format_name(fmt: LayerFormat) -> str:
    """The value of AutoRound's `packing_format` for a layer in GPTQ or AWQ layout."""
    if fmt.layout == "awq":
        return "auto_round:auto_awq"
    return "auto_round:auto_gptq" if fmt.zero_offset else "auto_round:gptqmodel"


def _plain(config: Any) -> dict[str, Any]:
    """The config's values, with AutoAWQ's older keys `w_bit` and `q_group_size` renamed."""
    values = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    for old, new in (("w_bit", "bits"), ("q_group_size", "group_size")):
        if values.get(old) is not None:
            values[new] = values[old]
    return values


def _packing(packing: str) -> tuple[str, int]:
    if packing not in PACKINGS:
        raise UnsupportedError(f"packing_format {packing!r} cannot be loaded; known: {', '.join(sorted(PACKINGS))}")
    return PACKINGS[packing]


def _override(default: LayerFormat, entry: Mapping[str, Any], name: str) -> LayerFormat | None:
    values = {key: value for key, value in entry.items() if value is not None}
    bits = read_int(values, "bits", default.bits)
    if bits >= 16:
        return None
    inherited = {} if default.scheme is None else scheme_values(default.scheme, default.naming)
    packing = str(values.get("packing_format") or default.layout)
    if packing in USER_LAYOUTS or is_float_config(inherited | values):
        return _scheme_format(inherited | values, packing, f"layer {name}")
    if default.scheme is not None:
        default = _DEFAULT_INT_FORMAT
    _check_values(values, f"layer {name}")
    layout, offset = default.layout, default.zero_offset
    if "packing_format" in values:
        layout, offset = _packing(str(values["packing_format"]))
    _check_bits(bits, layout, f"layer {name}")
    activation = {} if default.activation is None else asdict(default.activation)
    inherited_activation = {f"act_{key}": value for key, value in activation.items()}
    return replace(
        default, bits=bits, sym=bool(values.get("sym", default.sym)), layout=layout, zero_offset=offset,
        group_size=_group_size(values.get("group_size", default.group_size), f"layer {name}"),
        activation=_activation({**inherited_activation, **values}, layout, f"layer {name}"),
    )  # fmt: skip


def _scheme_format(values: Mapping[str, Any], packing: str, where: str) -> LayerFormat:
    """The format of a layer that is read by its scheme: in a plugin's layout, or of a small float type."""
    layout = USER_LAYOUTS.get(packing)
    if layout is not None:
        fields = {key: values[key] for key in ("bits", "group_size", "sym", "data_type") if key in values}
        if int(values.get("act_bits") or 16) < 16:
            raise UnsupportedError(f"{where} quantizes activations, which packing_format {packing!r} cannot have")
        scheme = QuantizationScheme.from_dict(fields)
        size = scheme.group_size if isinstance(scheme.group_size, int) else -1
        return LayerFormat(scheme.bits, size or -1, scheme.sym, packing, 0, None, scheme, layout)
    scheme = float_scheme(values, where)
    size = scheme.group_size if isinstance(scheme.group_size, int) else scheme.group_size[1]
    return LayerFormat(
        scheme.bits, size or -1, scheme.sym, layout_name(scheme), 0, scheme.activations, scheme, naming_of(values)
    )


# The base of an integer layer's entry when the default is a float type.
_DEFAULT_INT_FORMAT = LayerFormat(4, 128, True, "gptq", 1)


def _check_bits(bits: int, layout: str, where: str) -> None:
    allowed = {"mlx": MLX_BITS, "int8": INT8_BITS}.get(layout, INT_BITS)
    if bits not in allowed:
        raise UnsupportedError(f"{where} has {bits}-bit weights; this version runs {allowed}")


def _check_values(values: Mapping[str, Any], where: str) -> None:
    data_type = str(values.get("data_type") or "int")
    if data_type != "int":
        raise UnsupportedError(f"{where} has data type {data_type!r}; this version runs integer weights only")


def _activation(values: Mapping[str, Any], layout: str, where: str) -> ActivationScheme | None:
    """The activation scheme of the `act_` keys. Raises UnsupportedError for one in a layout other than int8."""
    act_bits = values.get("act_bits")
    if act_bits is None or int(act_bits) >= 16:
        return None
    if layout != "int8":
        raise UnsupportedError(
            f"{where} has packed weights and activations of {act_bits} bits; this version runs packed weights with "
            "16-bit activations only"
        )
    scheme = QuantizationScheme(
        bits=8, group_size=-1, sym=bool(values.get("sym", True)), data_type=str(values.get("data_type") or "int"),
        **{key: values.get(key) for key in ACTIVATION_KEYS},
    ).activations  # fmt: skip
    assert scheme is not None
    activation_function(scheme)
    return scheme


def _group_size(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsupportedError(f"{where} has group_size={value!r}; this version runs groups along the input only")
    return value if value > 0 else -1


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"quantization_config has {key} of type {type(value).__name__}; it must be an object")
    return value


def _name_list(value: Any) -> tuple[str, ...]:
    """The names in None, a comma-separated text, a list of names or a list of lists of names."""
    if not value:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, Iterable):
        raise ConfigError(f"quantization_config has {value!r} in place of a list of module names")
    return tuple(name for item in value for name in _name_list(item))


def resolve_layers(
    config: CheckpointConfig,
    names: Iterable[str],
    fallback_blocks: Iterable[str] = (),
    config_names: Callable[[str], Sequence[str]] | None = None,
) -> dict[str, LayerFormat]:
    """The format of every quantized layer among `names`.

    Args:
        names: names of all linear layers of the model, in order.
        fallback_blocks: names of the model's blocks, used when the config names none, or none that exists.
        config_names: the names that the config may use for a layer; default: its own.

    Raises:
        ModelError: the config quantizes none of these layers.
    """
    names = list(names)
    names_in_config = config_names or (lambda name: (name,))
    inside = [n for n in names if any(_has_prefix(called, config.block_prefixes) for called in names_in_config(n))]
    if not inside:
        everywhere = config.everywhere and not config.block_prefixes
        inside = names if everywhere else [n for n in names if _has_prefix(n, tuple(fallback_blocks))]
    within = set(inside)
    with _malformed_as_config_error():
        found = {n: fmt for n in names if (fmt := config.layer(n, n in within, names_in_config(n))) is not None}
    if not found:
        raise ModelError(
            "the quantization_config names no layer of this model as quantized "
            f"(blocks: {', '.join(config.block_prefixes) or 'not given'}); check config.json"
        )
    return found


def _has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)
