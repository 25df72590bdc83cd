"""Models returned to the user: assembled in memory, packed in place, or opened lazily from a saved folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import AutoRoundError, ConfigError, ModelError, nearest
from auto_round.formats.base import ExportPlan, get_format
from auto_round.formats.config_compressed_tensors import PackedInt8Format
from auto_round.inference.config import LayerFormat, read_config
from auto_round.inference.convert_model import build_layer
from auto_round.inference.linear import PackedLinear
from auto_round.modeling.blocks import set_weight_2d
from auto_round.modeling.source import ModelSource
from auto_round.run.block_layers import input_quantizers
from auto_round.run.writers import MemoryWriter


def assemble_model(source: ModelSource, layers: Mapping[str, QuantizedLayer]) -> torch.nn.Module:
    """A runnable model with the quantized layers: a model given by path on the CPU, while the source's own remains
    without weights; a model object has dequantized weights in place already (`ModelWriter`)."""

    def install(model: torch.nn.Module, owner: str) -> None:
        for name, layer in layers.items():
            if name == owner or name.startswith(f"{owner}."):
                old = model.get_submodule(name)
                weight = old.get_parameter("weight")
                if (packed := packed_layer(layer, weight.dtype)) is not None:
                    model.set_submodule(name, packed)
                    continue
                # A tied module keeps its own weight.
                old.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
                set_weight_2d(old, layer.dequantize())
                for quantizer in input_quantizers(layer):
                    old.register_forward_pre_hook(quantizer.hook)

    return source.assemble(install)


class ModelWriter(MemoryWriter):
    """Gives a model object of the user the dequantized weights of its layers. `packs`: keep the layers, for `pack`,
    which gives their modules the schemes in `fields` as attributes."""

    def __init__(self, source: ModelSource, packs: bool) -> None:
        super().__init__()
        self.model, self._source, self._packs = source.model, source, packs
        self.fields: Mapping[str, Mapping[str, Any]] = {}
        self._input_quantizers: list[tuple[torch.nn.Module, ActivationQuantizer]] = []
        self._unpacked: dict[str, torch.nn.Module] = {}

    def layer(self, layer: QuantizedLayer) -> None:
        module, tied = self.model.get_submodule(layer.name), self._source.tied()
        if f"{layer.name}.weight" in {*tied, *tied.values()}:
            weight = module.get_parameter("weight")
            module.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            self._source.config.tie_word_embeddings = False
        set_weight_2d(module, layer.dequantize())
        self._input_quantizers += [(module, quantizer) for quantizer in input_quantizers(layer)]
        if self._packs:
            super().layer(layer)

    def finish(self) -> None:
        """The run is over: from now on the layers quantize their inputs, or are packed ones."""
        for module, quantizer in self._input_quantizers:
            module.register_forward_pre_hook(quantizer.hook)
        self.pack(self.layers)

    def pack(self, layers: Mapping[str, QuantizedLayer]) -> None:
        """Replace every layer that has a packing by its packed module."""
        for name, layer in layers.items():
            own = self.model.get_submodule(name)
            weight = own.get_parameter("weight")
            if (packed := packed_layer(layer, weight.dtype)) is not None:
                self.model.set_submodule(name, packed.to(weight.device))
                self._unpacked[name] = own
        describe_layers(self.model, self.fields)

    def unpack(self) -> None:
        """Restore the model's own layers, so that it can be saved again."""
        for name, own in self._unpacked.items():
            self.model.set_submodule(name, own)
        self._unpacked.clear()


def packed_layer(layer: QuantizedLayer, model_dtype: torch.dtype) -> PackedLinear | None:
    """The packed module of a layer, as the loader builds it, or None when its type or shape has no packing."""
    scheme = layer.scheme
    formats = [get_format("auto_round"), *([PackedInt8Format()] if scheme.quantizes_activations else [])]
    holds = lambda fmt: not (fmt.check_scheme(scheme) or fmt.check_layer(scheme, layer.in_features, layer.out_features))
    fmt = next((fmt for fmt in formats if layer.codes.ggml is None and holds(fmt)), None)
    if fmt is None:
        return None
    described = read_config(fmt.config(ExportPlan(scheme, {layer.name: scheme}, ()))).default
    tensors = {key.rpartition(".")[2]: value for key, value in fmt.pack(layer, model_dtype=model_dtype).items()}
    bias_dtype = None if layer.bias is None else layer.bias.dtype
    return module_from_tensors(layer.name, described, layer.out_features, layer.in_features, bias_dtype, tensors)


def module_from_tensors(
    name: str, described: LayerFormat, out_features: int, in_features: int, bias_dtype: torch.dtype | None,
    tensors: Mapping[str, torch.Tensor],
) -> PackedLinear:  # fmt: skip
    """The loader's module of a layer, filled with packed tensors by leaf name."""
    shape = torch.empty((), dtype=bias_dtype or torch.float32).expand(out_features, in_features)
    stored = {leaf: tensor.dtype for leaf, tensor in tensors.items()}
    module = build_layer(described, shape, bias_dtype is not None, stored, False, "")
    for leaf, tensor in tensors.items():
        module.get_buffer(leaf).copy_(tensor)
    module.prepare(name)
    return module


_LAYER_ATTRIBUTES = ("bits", "group_size", "sym", "data_type", "act_bits")
_OPTIONS = (
    "output_dir", "format", "inplace", "return_folders", "safe_serialization", "overwrite", "max_shard_size", "resume",
)  # fmt: skip


def check_save_options(safe_serialization: bool, unknown: Mapping[str, Any]) -> None:
    """Raise ConfigError for unknown keywords, and for `safe_serialization=False`."""
    if not safe_serialization:
        raise ConfigError(
            "safe_serialization=False is not supported: it writes pickles, which run code when they are opened; leave "
            "it out to write safetensors"
        )
    for name in unknown:
        raise ConfigError(
            f"unknown argument {name!r} of saving{nearest(name, _OPTIONS)}; it takes {', '.join(_OPTIONS)}"
        )


def open_saved(folder: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """Open the output folder of a run with Transformers, which dequantizes a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    files = sorted(path.name for path in Path(folder).glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": files[0]} if files else {"dtype": "auto"}
    with suppress(OSError, ValueError, KeyError, TypeError):
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if config["quantization_config"]["quant_method"] in ("gptq", "awq"):
            options["quantization_config"] = AutoRoundConfig()  # AutoRound's layers run them, without another package
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"the model in {folder} cannot be opened with Transformers ({error}); open it with the engine of its format"
        ) from error
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def describe_layers(model: torch.nn.Module, fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the scheme of each layer as attributes (`bits`, `group_size`, ...) of its module, unless it has its own.
    `fields`: by layer, as in `AutoRound.layer_config`."""
    modules = dict(model.named_modules())
    for name in fields.keys() & modules.keys():
        for attribute in _LAYER_ATTRIBUTES:
            if not hasattr(modules[name], attribute):
                setattr(modules[name], attribute, fields[name][attribute])


class SavedModel(torch.nn.Module):
    """Proxy of the model in a folder; the first access to an attribute opens it and turns the proxy into that model.

    Printing, pickling and copying do not open it. Once open it has the class, attributes and modules of the model that
    `from_pretrained` returns. `layer_fields`: returns the scheme of every layer, for `describe_layers`.
    """

    def __init__(
        self, folder: str, trust_remote_code: bool = False,
        layer_fields: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
    ) -> None:  # fmt: skip
        # No call of the base class: every attribute belongs to the opened model.
        values = {"_saved": (folder, trust_remote_code), "_fields": layer_fields, "_opening": Lock()}
        object.__setattr__(self, "__dict__", values)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("_repr_", "_ipython_")) or (name.startswith("__") and name not in _OPENING):
            return object.__getattribute__(self, name)
        _open(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _open(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        _open(self)
        delattr(self, name)

    def __repr__(self) -> str:
        return f"SavedModel({object.__getattribute__(self, '__dict__')['_saved'][0]!r}), opened when it is first used"

    def __dir__(self) -> list[str]:
        _open(self)
        return dir(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return SavedModel, object.__getattribute__(self, "__dict__")["_saved"]

    def __deepcopy__(self, memo: Any) -> SavedModel:
        values = object.__getattribute__(self, "__dict__")
        folder, trusted = values["_saved"]
        return SavedModel(folder, trusted, values["_fields"])


_OPENING = ("__call__", "__getitem__", "__len__", "__iter__")


def _open(proxy: SavedModel) -> None:
    """Turn `proxy` into the opened model; a second call does nothing."""
    values = object.__getattribute__(proxy, "__dict__")
    if "_saved" not in values:
        return
    with values["_opening"]:
        if type(proxy) is not SavedModel:  # another thread was faster
            return
        model = open_saved(*values["_saved"])
        if values["_fields"] is not None:
            with suppress(AutoRoundError):  # the source is no longer there: the attributes are optional
                describe_layers(model, values["_fields"]())
        object.__setattr__(proxy, "__dict__", model.__dict__)
        object.__setattr__(proxy, "__class__", type(model))
