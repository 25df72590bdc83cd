"""`OutputFormat`: how a format packs a layer and writes `quantization_config`, and the registry of all formats.

Three parts: `ExportPlan`, what a format knows of the run before any tensor is written; `ModelRules`, how a format
treats one model type (renamed tensors, stacked experts, layers that must stay unquantized); `OutputFormat` and
the registry (`register_format`, `get_format`, `parse_formats`).
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from auto_round._version import __version__
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.formats.table import GUIDE_MATRIX
from auto_round.schemes import QuantizationScheme

# Settings of a run that are written into the checkpoint when they differ from these values.
DEFAULT_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "iters": 200, "batch_size": 8, "nsamples": 128, "seqlen": 2048, "lr": None, "minmax_lr": None,
        "gradient_accumulate_steps": 1, "enable_quanted_input": True, "enable_minmax_tuning": True,
        "enable_norm_bias_tuning": False, "amp": True, "scale_dtype": "float16",
        "dataset": None, "static_kv_dtype": None, "static_kv_granularity": "tensor", "static_attention_dtype": None,
        "static_attention_granularity": "tensor",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ExportPlan:
    """One run's result, without its tensors.

    Attributes:
        scheme: the default scheme.
        layers: the scheme of every linear layer by its full module name, layers left in 16 bits included.
        block_names: module names of the decoder blocks, such as `model.layers.0`.
        settings: how the run was made (`iters`, `nsamples`, ...); values that are not defaults are recorded.
        version: of this package.
        model_type: of the model's config, such as `llama`.
        embeddings: module names of the embeddings, which stay in full precision.
        other_matrices: names of the model's other modules with a matrix for weight (routers, projections outside the
            blocks), which no format may take for quantized.
        spare: modules that the files have and this model does not.
        patterns: regular expressions of the layer configuration, in order.
    """

    scheme: QuantizationScheme
    layers: Mapping[str, QuantizationScheme]
    block_names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    model_type: str = ""
    embeddings: tuple[str, ...] = ()
    other_matrices: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def quantized_layers(self) -> list[str]:
        return [name for name, scheme in self.layers.items() if scheme.quantizes_weights]

    def dense_in_blocks(self) -> list[str]:
        """What a reader might take for quantized and is not: dense layers and routers inside the blocks, and modules
        that this model does not have but the files do."""
        dense = [name for name, scheme in self.layers.items() if not scheme.quantizes_weights]
        inside = [name for name in dict.fromkeys((*dense, *self.other_matrices)) if self.in_block(name)]
        return [*inside, *self.spare]

    def in_block(self, name: str) -> bool:
        """Whether the module `name` lies in one of the blocks."""
        return any(name.startswith(f"{block}.") for block in self.block_names)

    def block_prefix(self) -> str:
        """The lists that hold the blocks, such as `model.layers`; several are joined by commas."""
        return ",".join(dict.fromkeys(re.sub(r"\.\d+$", "", name) for name in self.block_names))

    def recorded_settings(self) -> dict[str, Any]:
        """Known settings that are set, plain JSON values and not the default."""
        return {
            key: self.settings[key]
            for key, default in DEFAULT_SETTINGS.items()
            if key in self.settings
            and self.settings[key] is not None
            and self.settings[key] != default
            and isinstance(self.settings[key], (bool, int, float, str))
        }


# What a format asks of a family of models: other tensor names, stacked experts, layers that must stay dense.

Renames = tuple[tuple[str, str], ...]
_EXPERT = re.compile(r"^(?P<front>.*\.)experts\.(?P<index>\d+)\.(?P<leaf>.+)$")


@dataclass(frozen=True)
class ModelRules:
    """How a format writes the models of one type.

    Attributes:
        refused: why such models cannot be written at all, or None.
        note: what the user should know, or None.
        dense: (regular expression, reason): layers that must stay in full precision.
        renames: (regular expression, replacement), applied in order to every tensor's name.
        experts: the module in which tensors of all experts of a block are stacked along a new first dimension; "" keeps
            one tensor an expert.
        config: (key, other key): what config.json gets under `key`, unless it has it: the value of `other key`.
    """

    refused: str | None = None
    note: str | None = None
    dense: tuple[tuple[str, str], ...] = ()
    renames: Renames = ()
    experts: str = ""
    config: tuple[tuple[str, str], ...] = ()

    @property
    def renames_tensors(self) -> bool:
        """Whether any tensor is written elsewhere than under its own name."""
        return bool(self.renames or self.experts)

    def unquantized_reason(self, layer: str) -> str | None:
        """Why the layer must stay in full precision, or None."""
        return next((reason for pattern, reason in self.dense if re.search(pattern, layer)), None)

    def stored_as(self, tensor: str) -> tuple[str, int | None]:
        """(name in the file, index along the first dimension where experts are stacked, else None)."""
        expert = _EXPERT.match(tensor) if self.experts else None
        name = f"{expert['front']}{self.experts}.{expert['leaf']}" if expert else tensor
        return apply_renames(name, self.renames), int(expert["index"]) if expert else None

    def with_config(self, values: dict[str, Any]) -> dict[str, Any]:
        """A copy of config.json's values with the keys of `config` added."""
        added = {key: values[other] for key, other in self.config if key not in values and other in values}
        return {**values, **added}

    def module_name(self, layer: str) -> str:
        """The name of a linear layer's module as the file's tensors have it."""
        return self.stored_as(f"{layer}.weight")[0].removesuffix(".weight")


def apply_renames(name: str, renames: Renames) -> str:
    """`name` after all `renames`, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


DEFAULT_RULES = ModelRules()


# Output formats: how a quantized layer becomes named tensors, and what `config.json` says about them.

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]
CodesAndParams = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | int"]


class OutputFormat(ABC):
    """One way to write a quantized model. Instances hold no state of a run.

    A layer that `check_layer` refuses stays in full precision; its dense tensors are written by the caller.
    """

    # Set by `register_format`.
    name: ClassVar[str] = ""
    # Whether the loader of `auto_round.inference` opens the files. What it opens is checked after saving by opening it;
    # the tensors of other formats are taken apart by `unpack_layer`.
    loadable_here: ClassVar[bool] = True
    # Runtimes that read the files and join layers (q, k and v; gate and up; experts) into one matrix.
    fusing_runtimes: ClassVar[tuple[str, ...]] = ("vLLM", "SGLang")
    # Dtype of the scales in the file; None where none are stored.
    scale_dtype: ClassVar[torch.dtype | None] = torch.float16
    # Whether dense weights are stored in the model's own dtype, which can be coarser than the numbers that were tuned.
    casts_to_model_dtype: ClassVar[bool] = False
    # Whether who opens the files quantizes activations too, where the scheme does.
    stores_activation_scheme: ClassVar[bool] = True
    # Whether the files can hold static scales of keys, values and queries; whether those of all three must be of one
    # granularity; and what follows the number of heads in the shape of scales per head.
    stores_cache_scales: ClassVar[bool] = False
    single_cache_granularity: ClassVar[bool] = False
    cache_scale_tail: ClassVar[tuple[int, ...]] = ()
    # Whether it takes layers that are no torch.nn.Linear, such as Transformers' Conv1D.
    supports_conv1d: ClassVar[bool] = True
    # Names of presets this format takes; `check_scheme` decides for schemes that have no name.
    support_schemes: ClassVar[tuple[str, ...]]
    # Whether groups must fill the rows. Runs then use a smaller group size where needed.
    requires_full_groups: ClassVar[bool] = False
    # Whether files keep the names of the source's checkpoint, as every reader of such files expects. Formats of
    # programs that have names of their own say them by `rules`.
    checkpoint_names: ClassVar[bool] = True
    # Whether a layer is refused whose tensors Transformers would join with others as it reads them under those names.
    rejects_fused_layers: ClassVar[bool] = False
    # Whether experts that the checkpoint stores stacked stay dense: readers find single experts by its names only.
    experts_by_name: ClassVar[bool] = False
    # Files beside config.json that repeat the quantization_config.
    config_files: ClassVar[tuple[str, ...]] = ("quantization_config.json",)

    @abstractmethod
    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        """None when the format can hold `scheme`, or the reason why not. 16 bits are always held."""

    def suggested_for(self, scheme: QuantizationScheme) -> bool:
        """Whether to name this format to someone who wants all of a model in `scheme`."""
        return self.check_scheme(scheme) is None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        """None when a layer of this shape can be packed, or the reason why not (it then stays in full precision)."""
        return None

    def check_plan(self, plan: ExportPlan) -> str | None:
        """None when the format can say what every layer of `plan` is, or the reason why not."""
        return None

    def normalize_for_format(self, layer: QuantizedLayer) -> QuantizedLayer:
        """A layer of exactly the same weights, in numbers that the format's readers take. `pack` is given this."""
        return layer

    @abstractmethod
    def tensor_specs(
        self, name: str, scheme: QuantizationScheme, in_features: int, out_features: int, *,
        bias_dtype: torch.dtype | None = None, model_dtype: torch.dtype = torch.float32, transposed: bool = False,
    ) -> TensorSpecs:  # fmt: skip
        """Shapes and dtypes of what `pack` will return for the layer `name`, without any data.

        Args:
            bias_dtype: dtype of the layer's bias, None when it has none.
            model_dtype: dtype of dense weights.
            transposed: the module stores its weight as [in, out].
        """

    @abstractmethod
    def pack(self, layer: QuantizedLayer, *, model_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """The layer's tensors by their full names in the checkpoint. `model_dtype`: dtype of dense weights."""

    def unpack_integers(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> CodesAndParams:  # fmt: skip
        """What `pack` was given, from what it returned: (codes uint8 [out, in], scale [out, groups], zero point).

        What `unpack_layer` is made of for integers, unless a format overrides that.
        """
        raise TypeError(f"format {self.name!r} has no read_back, and auto_round's own loader does not open it")

    def unpack_layer(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        """The whole layer that `pack` was given, from what it returned. Needed where `loadable_here` is False."""
        grid = self.unpack_integers(name, scheme, tensors, in_features, out_features)
        act_scale, act_zero_point = self.unpack_input_scales(name, tensors)
        scale = None if act_scale is None else torch.tensor(act_scale, dtype=torch.float32)
        return QuantizedLayer(name, scheme, *grid, act_scale=scale, act_zero_point=act_zero_point)

    def rules(self, model_type: str) -> ModelRules:
        """What is special about models of this type (`model_type` of their config) in this format."""
        return DEFAULT_RULES

    def unpack_input_scales(self, name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[float | None, int | None]:
        """The layer's (act_scale, act_zero_point) from the same tensors, where the format stores them."""
        return None, None

    @abstractmethod
    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """`quantization_config` for config.json, or None when the checkpoint is an ordinary dense one."""

    def file_config(self, plan: ExportPlan) -> dict[str, Any] | None:
        """What the `config_files` hold: `config`, unless their readers need another form of it."""
        return self.config(plan)

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        """config.json, from the model's own `values`."""
        quantization = self.config(plan)
        return values if quantization is None else values | {"quantization_config": quantization}


FORMATS: dict[str, OutputFormat] = {}
_BUILT_IN = (
    "auto_round.formats.config_auto_round",
    "auto_round.formats.config_gptq",
    "auto_round.formats.config_awq",
    "auto_round.formats.config_compressed_tensors",
    "auto_round.formats.config_fp8",
    "auto_round.formats.config_mlx",
    "auto_round.formats.no_config",
)
_Format = TypeVar("_Format", bound=type[OutputFormat])


def register_format(name: str) -> Callable[[_Format], _Format]:
    """Class decorator: the format can be asked for as `name`. Raises ConfigError when the name is taken."""

    def decorate(cls: _Format) -> _Format:
        if name in FORMATS:
            raise ConfigError(f"format {name!r} is registered already, by {type(FORMATS[name]).__name__}")
        cls.name = name
        FORMATS[name] = cls()
        return cls

    return decorate


def available_formats() -> list[str]:
    """Names of the formats that can be written, sorted."""
    for module in _BUILT_IN:
        importlib.import_module(module)
    return sorted(FORMATS)


def get_format(name: str) -> OutputFormat:
    """The format called `name`, in any case.

    Raises:
        UnsupportedError: the guide knows this format, this version cannot write it.
        ConfigError: no such format.
    """
    known = available_formats()
    key = name.strip().lower()
    if key in FORMATS:
        return FORMATS[key]
    if key in GUIDE_MATRIX:
        raise UnsupportedError(f"format {name!r} is not available in this version; available: {', '.join(known)}")
    if key.partition(":")[0] == "gguf":
        types = [n for n in known if n.startswith("gguf:")]
        hint = "" if "*" in key else nearest(key, types)
        raise ConfigError(f"unknown format {name!r}{hint or ';'} The GGUF types are {', '.join(types)}")
    raise ConfigError(f"unknown format {name!r}{nearest(key, [*known, *GUIDE_MATRIX])} Available: {', '.join(known)}")


def parse_formats(text: str | Sequence[str]) -> list[OutputFormat]:
    """`"auto_round,fake"`, or a list of names, as formats in that order. Raises ConfigError for none or a repeat."""
    names = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    names = [part for part in names if part]
    if not names:
        raise ConfigError(f"no format given; available: {', '.join(available_formats())}")
    formats = [get_format(name) for name in names]
    seen: set[str] = set()
    for fmt in formats:
        if fmt.name in seen:
            raise ConfigError(f"format {fmt.name!r} is given twice in {','.join(names)!r}; name each format once")
        seen.add(fmt.name)
    return formats


def formats_for_scheme(scheme: QuantizationScheme) -> list[str]:
    """Names of the available formats that can hold `scheme`."""
    return [name for name in available_formats() if FORMATS[name].suggested_for(scheme)]


def require_scheme(fmt: OutputFormat, scheme: QuantizationScheme, what: str = "the scheme") -> None:
    """Raise UnsupportedError with the reason and the formats that would do when `fmt` cannot hold `scheme`."""
    reason = fmt.check_scheme(scheme)
    if reason is not None:
        takers = ", ".join(formats_for_scheme(scheme)) or "none in this version"
        raise UnsupportedError(
            f"format {fmt.name!r} cannot hold {what} ({scheme.describe()}): {reason}; formats that can: {takers}"
        )


def require_plan(fmt: OutputFormat, plan: ExportPlan) -> None:
    """Raise UnsupportedError with the reason and the formats that would do when `fmt` cannot describe `plan`."""
    reason = fmt.check_plan(plan)
    if reason is not None:
        schemes = set(plan.layers.values())
        takers = [
            name
            for name in available_formats()
            if all(FORMATS[name].suggested_for(s) for s in schemes) and FORMATS[name].check_plan(plan) is None
        ]
        raise UnsupportedError(
            f"format {fmt.name!r} cannot hold this recipe: {reason}; formats that can: {', '.join(takers)}"
        )


def format_table() -> list[tuple[str, tuple[str, ...], bool]]:
    """Rows for `auto_round list format`: (format, preset schemes, can be written by this version).

    Formats that can be written show what they take here; the others show the guide's table.
    """
    known = available_formats()
    names = [*GUIDE_MATRIX, *(n for n in known if n not in GUIDE_MATRIX)]
    return [(n, FORMATS[n].support_schemes if n in FORMATS else GUIDE_MATRIX[n], n in FORMATS) for n in names]
