"""`OutputFormat`: how a format packs a layer and writes `quantization_config`, and the registry of all formats."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from auto_round._version import __version__
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.layouts.base import Layout, TensorSpecs
from auto_round.schemes import MIXED_PRESETS, PRESET_SCHEMES, GroupSize, QuantizationScheme

_T = TypeVar("_T")

# Settings that are recorded in the checkpoint when they differ from these defaults.
DEFAULT_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "iters": 200, "batch_size": 8, "nsamples": 128, "seqlen": 2048, "lr": None, "minmax_lr": None,
        "gradient_accumulate_steps": 1, "enable_quanted_input": True, "enable_minmax_tuning": True,
        "enable_norm_bias_tuning": False, "amp": True, "scale_dtype": "float16",
        "dataset": None, "static_kv_dtype": None, "static_kv_granularity": "tensor", "static_attention_dtype": None,
        "static_attention_granularity": "tensor",
    }
)  # fmt: skip


FP8_MAXIMUM = 448.0  # of e4m3, OCP OFP8 v1.0, 5.1
_GRANULARITIES = ("tensor", "head")
_DTYPES = ("fp8", "float8_e4m3fn")
_SIXTEEN_BITS = ("float16", "fp16", "bfloat16", "bf16")
_EXPERT = re.compile(r"^(?P<front>.*\.)experts\.(?P<index>\d+)\.(?P<leaf>.+)$")


@dataclass(frozen=True)
class CacheScheme:
    """Static FP8 scales of keys and values, and of queries if asked for, one per "tensor" or "head": float32 tensors of
    an attention module, by which a runtime divides these states before rounding to e4m3."""

    keys_values: str
    queries: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("k_scale", "v_scale") if self.queries is None else ("k_scale", "q_scale", "v_scale")

    def granularity(self, leaf: str) -> str:
        """The granularity of one of `leaves`: "tensor" or "head"."""
        return self.queries if leaf == "q_scale" and self.queries is not None else self.keys_values

    def describe(self) -> str:
        """One phrase, such as `fp8 keys and values, one scale per tensor`."""
        words = f"fp8 keys and values, one scale per {self.keys_values}"
        return words if self.queries is None else f"{words}; fp8 queries, one per {self.queries}"


def parse_cache_scheme(
    kv_dtype: Any, kv_granularity: Any, attention_dtype: Any, attention_granularity: Any
) -> CacheScheme | None:
    """The scheme that `static_kv_dtype` and the other three options request, or None; `static_attention_dtype` alone
    adds scales of keys and values. Raises ConfigError for a value that is not allowed, or a granularity without a
    dtype."""
    for what, dtype, granularity in (
        ("static_kv", kv_dtype, kv_granularity), ("static_attention", attention_dtype, attention_granularity),
    ):  # fmt: skip
        if dtype is not None and str(dtype).removeprefix("torch.").lower() not in _DTYPES:
            raise ConfigError(f"{what}_dtype={dtype!r} is not allowed; use {' or '.join(_DTYPES)}, or leave it out")
        if granularity not in _GRANULARITIES:
            raise ConfigError(f"{what}_granularity={granularity!r} is not allowed; use {' or '.join(_GRANULARITIES)}")
        if granularity != "tensor" and dtype is None:
            raise ConfigError(f"{what}_granularity={granularity!r} has no effect without {what}_dtype='fp8'")
    if attention_dtype is None:
        return None if kv_dtype is None else CacheScheme(kv_granularity)
    return CacheScheme(attention_granularity if kv_dtype is None else kv_granularity, attention_granularity)


def none_if_16_bits(value: Any) -> Any:
    """None for a 16-bit type, whose cache needs no scales; other values unchanged."""
    return None if str(value).removeprefix("torch.").lower() in _SIXTEEN_BITS else value


@dataclass(frozen=True)
class ExportPlan:
    """Which layers of a run are quantized and how, without any tensor."""

    scheme: QuantizationScheme  # the default
    # of every linear layer by its full module name, unquantized layers included
    layers: Mapping[str, QuantizationScheme]
    block_names: tuple[str, ...]  # such as `model.layers.0`
    # of the run; values that differ from the defaults are recorded
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    model_type: str = ""
    embeddings: tuple[str, ...] = ()  # likewise unquantized
    other_matrices: tuple[str, ...] = ()  # unquantized modules with a matrix as weight (routers, ...)
    spare: tuple[str, ...] = ()  # modules that the checkpoint has and the model does not
    patterns: tuple[str, ...] = ()  # regular expressions of the layer configuration, in order
    cache: CacheScheme | None = None

    def quantized_layers(self) -> list[str]:
        return [name for name, scheme in self.layers.items() if scheme.quantizes_weights]

    def default_scheme(self) -> QuantizationScheme:
        """The scheme to write as the default: the run's own, or the most common one where no layer has that."""
        counts = Counter(self.layers[name] for name in self.quantized_layers())
        return self.scheme if self.scheme in counts else counts.most_common(1)[0][0]

    def dense_layers(self) -> list[str]:
        return [name for name, scheme in self.layers.items() if not scheme.quantizes_weights]

    def unquantized_modules(self) -> list[str]:
        """Modules that readers must not treat as quantized: unquantized layers, other matrices, spare modules."""
        others = [name for name in (*self.other_matrices, *self.spare) if name not in self.layers]
        return self.dense_layers() + others

    def dense_in_blocks(self) -> list[str]:
        """Modules a reader could mistake for quantized: unquantized layers and routers in blocks, spare modules."""
        dense = dict.fromkeys((*self.dense_layers(), *self.other_matrices))
        return [*(name for name in dense if self.in_block(name)), *self.spare]

    def in_block(self, name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in self.block_names)

    def block_prefix(self) -> str:
        """Module lists that hold the blocks, such as `model.layers`, joined by commas."""
        return ",".join(dict.fromkeys(re.sub(r"\.\d+$", "", name) for name in self.block_names))

    def recorded_settings(self) -> dict[str, Any]:
        """Known settings that differ from the defaults and are plain JSON values."""
        known = {key: self.settings.get(key) for key in DEFAULT_SETTINGS}
        return {k: v for k, v in known.items() if v != DEFAULT_SETTINGS[k] and isinstance(v, (int, float, str))}


def number_pattern(name: str, after: str = "") -> str:
    """A regular expression for a module's name with any numbers in it; only those behind the part `after`, if given."""
    parts = name.split(".")
    free = (part.isdigit() and (not after or parts[i - 1 : i] == [after]) for i, part in enumerate(parts))
    return r"\.".join(r"\d+" if any_number else re.escape(part) for any_number, part in zip(free, parts, strict=True))


@dataclass(frozen=True)
class ModelRules:
    """How a format writes the models of one type."""

    refused: str | None = None  # why such models cannot be written
    note: str | None = None  # shown to the user
    dense: tuple[tuple[str, str], ...] = ()  # (regular expression, reason): layers that must stay unquantized
    # (regular expression, replacement), applied in order to every tensor's name
    renames: tuple[tuple[str, str], ...] = ()
    # Module under which the tensors of a block's experts are stacked along a new first dimension; "": one tensor
    # per expert.
    experts: str = ""
    # (key, other key): config.json gets `key` with the value of `other key`, unless it has `key`
    config: tuple[tuple[str, str], ...] = ()

    def unquantized_reason(self, layer: str) -> str | None:
        """Why the layer must stay unquantized, or None."""
        return next((reason for pattern, reason in self.dense if re.search(pattern, layer)), None)

    def stored_as(self, tensor: str) -> tuple[str, int | None]:
        """(name in the file, index in the stack of experts or None)."""
        expert = _EXPERT.match(tensor) if self.experts else None
        name = f"{expert['front']}{self.experts}.{expert['leaf']}" if expert else tensor
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name, int(expert["index"]) if expert else None

    def module_name(self, layer: str) -> str:
        """The module name of a linear layer in the file."""
        return self.stored_as(f"{layer}.weight")[0].removesuffix(".weight")


@dataclass(frozen=True)
class SizeRule:
    """Sizes that a kernel accepts. One group a row is always accepted."""

    inputs: int = 1  # in_features must be a multiple of it
    outputs: int = 1  # likewise out_features
    groups: tuple[int, ...] = ()  # accepted group sizes; empty accepts all
    group_multiple: int = 1  # the group size must be a multiple of it
    outputs_by_group: bool = False  # the group size must divide out_features too
    whole_groups: bool = True  # the group size must divide in_features

    def problem(self, in_features: int, out_features: int, group_size: GroupSize) -> str | None:
        """Why the kernel rejects such a layer, or None. `group_size`: as in a scheme; of a block the columns count."""
        size = group_size[1] if isinstance(group_size, tuple) else group_size
        if in_features % self.inputs:
            return f"in_features={in_features} is not a multiple of {self.inputs}"
        if out_features % self.outputs:
            return f"out_features={out_features} is not a multiple of {self.outputs}"
        if size <= 0:
            return None
        if self.groups and size not in self.groups:
            return f"group_size {size} is not one of {', '.join(map(str, self.groups))}"
        if size % self.group_multiple:
            return f"group_size {size} is not a multiple of {self.group_multiple}"
        if self.whole_groups and in_features % size:
            return f"in_features={in_features} is not a multiple of group_size {size}; choose one that divides it"
        if self.outputs_by_group and out_features % size:
            return (
                f"out_features={out_features} is not a multiple of group_size {size}, which AWQ's kernels require; "
                "choose one that divides it"
            )
        return None


MARLIN = ("vLLM's Marlin kernels", SizeRule(128, 64, groups=(32, 64, 128)))


class OutputFormat:
    """One way to write a quantized model, without state of a run. Layers that `check_layer` refuses are not packed."""

    name: str = ""  # set by `register_format`
    preset: str = ""  # the scheme that a format with types of its own brings
    # Whether the loader of `auto_round.inference` opens the files; others are verified by `unpack_layer` after saving.
    loadable_here: ClassVar[bool] = True
    # Whether Transformers opens the files, and whether PyTorch has layers that run the packed weights.
    opens_in_transformers: ClassVar[bool] = True
    has_packed_layers: ClassVar[bool] = True
    # Runtimes that read the files and fuse layers (q, k and v; gate and up; experts) into one matrix.
    fusing_runtimes: ClassVar[tuple[str, ...]] = ("vLLM", "SGLang")
    # Dtype of the scales in the file; None where none are stored.
    scale_dtype: ClassVar[torch.dtype | None] = torch.float16
    # Whether weights are stored in the model's own dtype, which can be coarser than the tuned values.
    casts_to_model_dtype: ClassVar[bool] = False
    # Whether readers of the files quantize activations too, where the scheme does.
    stores_activation_scheme: ClassVar[bool] = True
    # Trailing dimensions after the number of heads of static scales of keys, values and queries; None holds no scales.
    cache_scale_tail: ClassVar[tuple[int, ...] | None] = None
    # Whether it stores layers other than torch.nn.Linear, such as Transformers' Conv1D.
    supports_conv1d: ClassVar[bool] = True
    # Sizes of layers that readers of the files accept, by the weights' codec family; others are up to the layout.
    sizes: ClassVar[Mapping[str, SizeRule]] = MappingProxyType({})
    fast_kernel: ClassVar[tuple[str, SizeRule] | None] = None  # name of a fast kernel, and the sizes that it accepts
    # Whether groups must fill the rows; runs then use a smaller group size where needed.
    requires_full_groups: ClassVar[bool] = False
    # Whether tensors keep the names of the source checkpoint. Otherwise `rules` gives the names.
    checkpoint_names: ClassVar[bool] = True
    # Whether layers are refused whose tensors Transformers would fuse with others while loading these names.
    rejects_fused_layers: ClassVar[bool] = False
    # Whether experts that the checkpoint stores stacked stay unquantized, as readers find single experts by name only.
    experts_by_name: ClassVar[bool] = False
    # Files beside config.json that repeat the quantization_config.
    config_files: ClassVar[tuple[str, ...]] = ("quantization_config.json",)

    def layout(self, scheme: QuantizationScheme) -> Layout:
        """The layout that stores a layer of `scheme`, or whose `problem` says why none does."""
        raise UnsupportedError(f"format {self.name!r} stores no packed codes")

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        """Why the format cannot store `scheme`, or None. Unquantized layers are always stored."""
        if not scheme.quantizes_weights:
            return None
        try:
            return self.scheme_problem(scheme)
        except UnsupportedError as error:  # an unknown data type
            return str(error)

    def scheme_problem(self, scheme: QuantizationScheme) -> str | None:
        """`check_scheme` of a scheme that quantizes weights."""
        return self.layout(scheme).problem(scheme)

    def suggested_for(self, scheme: QuantizationScheme) -> bool:
        """Whether to suggest this format for a model quantized with `scheme` throughout."""
        return self.check_scheme(scheme) is None

    @property
    def support_schemes(self) -> tuple[str, ...]:
        """Names of the presets that this format takes."""
        found = []
        for name, scheme in PRESET_SCHEMES.items():
            others = [scheme.with_overrides({"bits": MIXED_PRESETS[name].other_bits})] if name in MIXED_PRESETS else []
            if ":" not in name and all(self.check_scheme(one) is None for one in (scheme, *others)):
                found.append(name)
        return tuple(found)

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be packed and stays unquantized, or None."""
        rule = self.sizes.get(codec_of(scheme).family)
        reason = None if rule is None else rule.problem(in_features, out_features, scheme.group_size)
        return reason or self.layout(scheme).mismatch(scheme, in_features, out_features)

    def check_plan(self, plan: ExportPlan) -> str | None:
        """Why the format's config cannot describe all layers of `plan`, or None."""
        return None

    def check_cache(self, cache: CacheScheme) -> str | None:
        """Why the files cannot hold static scales of the key-value cache, or None."""
        return "its readers do not use such scales" if self.cache_scale_tail is None else None

    def normalize_for_format(self, layer: QuantizedLayer) -> QuantizedLayer:
        """A layer with exactly the same weights, in codes that the format's readers accept; applied before `pack`."""
        return layer

    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        """Shapes and dtypes of the tensors that `pack` returns for the layer `name`; with `bias_dtype`, its bias too.
        `model_dtype`: of the model's unquantized tensors. `transposed`: the module stores its weight as [in, out]."""
        specs = self.layout(scheme).specs(scheme, in_features, out_features, model_dtype)
        return _with_bias(name, specs, None if bias_dtype is None else ((out_features,), bias_dtype))

    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """The layer's tensors by their full names in the checkpoint. `model_dtype`: dtype of unquantized tensors."""
        return _with_bias(layer.name, self.layout(layer.scheme).pack(layer, model_dtype), layer.bias)

    def unpack_layer(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        """The inverse of `pack`, without the bias. Needed where `loadable_here` is False."""
        local = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        return self.layout(scheme).unpack(name, scheme, local, in_features, out_features)

    def rules(self, model_type: str) -> ModelRules:
        """How this format writes models of a type (`model_type` of their config)."""
        return ModelRules()

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """`quantization_config` for config.json, or None when the checkpoint is an ordinary unquantized one."""
        return self.quantization_config(plan, plan.default_scheme()) if plan.quantized_layers() else None

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        """`config` of a plan with quantized layers, most of which have the scheme `default`."""
        return None

    def file_config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """Contents of the `config_files`: `config`, unless their readers need another form."""
        return self.config(plan)

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        """config.json, from the model's own `values`."""
        quantization = self.config(plan)
        return values if quantization is None else values | {"quantization_config": quantization}


def _with_bias(layer: str, leaves: dict[str, _T], bias: _T | None) -> dict[str, _T]:
    """A layer's tensors or specs by their full names, with the bias before `g_idx`, as AutoGPTQ's files have it."""
    last = {"g_idx": leaves.pop("g_idx")} if "g_idx" in leaves else {}
    named = leaves if bias is None else {**leaves, "bias": bias}
    return {f"{layer}.{leaf}": value for leaf, value in (*named.items(), *last.items())}


FORMATS: dict[str, OutputFormat] = {}
_BUILT_IN = ("config_auto_round", "config_gptq", "config_compressed_tensors", "config_fp8", "config_mlx", "no_config")
_Format = TypeVar("_Format", bound=type[OutputFormat])


def register_format(name: str, *arguments: Any) -> Callable[[_Format], _Format]:
    """Class decorator: register a format, made with these arguments. Raises ConfigError when the name is taken."""

    def decorate(cls: _Format) -> _Format:
        if name in FORMATS:
            raise ConfigError(f"format {name!r} is registered already, by {type(FORMATS[name]).__name__}")
        FORMATS[name] = cls(*arguments)
        FORMATS[name].name = name
        return cls

    return decorate


def available_formats() -> list[str]:
    """Names of the formats that can be written, sorted."""
    for module in _BUILT_IN:
        importlib.import_module(f"auto_round.formats.{module}")
    return sorted(FORMATS)


def get_format(name: str) -> OutputFormat:
    """The format called `name`, in any case. Raises ConfigError for an unknown one."""
    known = available_formats()
    key = name.strip().lower()
    if key in FORMATS:
        return FORMATS[key]
    family = key.partition(":")[0]
    if family not in FORMATS and (types := [n for n in known if n.startswith(f"{family}:")]):
        hint = "" if "*" in key else nearest(key, types)
        raise ConfigError(f"unknown format {name!r}{hint or ';'} The {family.upper()} types are {', '.join(types)}")
    raise ConfigError(f"unknown format {name!r}{nearest(key, known)} Available: {', '.join(known)}")


def parse_formats(text: str | Sequence[str]) -> list[OutputFormat]:
    """Formats from a comma-separated string or a list of names. Raises ConfigError for none or a repeated one."""
    given = text.split(",") if isinstance(text, str) else text
    names = [part.strip() for part in given if part.strip()]
    if not names:
        raise ConfigError(f"no format given; available: {', '.join(available_formats())}")
    formats: dict[str, OutputFormat] = {}
    for fmt in map(get_format, names):
        if fmt.name in formats:
            raise ConfigError(f"format {fmt.name!r} is given twice in {','.join(names)!r}; name each format once")
        formats[fmt.name] = fmt
    return list(formats.values())


def formats_for_scheme(scheme: QuantizationScheme) -> list[str]:
    """Names of the available formats that can store `scheme`."""
    return [name for name in available_formats() if FORMATS[name].suggested_for(scheme)]


def _require(fmt: OutputFormat, what: str, reason: str | None, holds: Callable[[OutputFormat], bool]) -> None:
    if reason is not None:
        takers = ", ".join(name for name in available_formats() if holds(FORMATS[name])) or "none in this version"
        raise UnsupportedError(f"format {fmt.name!r} cannot hold {what}: {reason}; formats that can: {takers}")


def require_scheme(fmt: OutputFormat, scheme: QuantizationScheme, what: str = "the scheme") -> None:
    """Raise UnsupportedError, with the reason and the formats that can, when `fmt` cannot store `scheme`."""
    _require(fmt, f"{what} ({scheme.describe()})", fmt.check_scheme(scheme), lambda f: f.suggested_for(scheme))


def require_plan(fmt: OutputFormat, plan: ExportPlan) -> None:
    """Raise UnsupportedError, with the reason and the formats that can, when `fmt` cannot describe `plan`."""
    schemes = set(plan.layers.values())
    holds = lambda f: all(map(f.suggested_for, schemes)) and f.check_plan(plan) is None
    _require(fmt, "this recipe", fmt.check_plan(plan), holds)


def require_cache(fmt: OutputFormat, cache: CacheScheme) -> None:
    """Raise UnsupportedError, with the reason and the formats that can, when `fmt` cannot store the scales."""
    _require(fmt, cache.describe(), fmt.check_cache(cache), lambda f: f.check_cache(cache) is None)


def slow_kernel_notes(formats: Iterable[OutputFormat], layers: Sequence[tuple[str, int, int, int]]) -> list[str]:
    """One warning for each fast kernel that does not fit some layers: (name, in_features, out_features, group size)."""
    notes = []
    for kernel, rule in dict(fmt.fast_kernel for fmt in formats if fmt.fast_kernel is not None).items():
        lost = [(name, why) for name, *sizes in layers if (why := rule.problem(*sizes)) is not None]
        if lost:
            name, why = lost[0]
            notes.append(
                f"{len(lost)} of {len(layers)} quantized layers, such as {name} ({why}), do not fit {kernel}: the "
                "runtime pads them or uses a slower kernel"
            )
    return notes
