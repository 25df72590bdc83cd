"""The model that `quantize()` hands back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.export.auto_round_format import packing_of
from auto_round.export.formats import get_format
from auto_round.inference.config_reader import LayerFormat, read_config
from auto_round.inference.qlinear import QuantLinear
from auto_round.modeling.blocks import set_weight_2d
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer


def assemble_model(source: ModelSource, layers: Mapping[str, QuantizedLayer]) -> torch.nn.Module:
    """A runnable model with the quantized layers.

    A model object of the user's has its dequantized weights in place already. A model given by path is put together on
    the CPU from packed layers (four bits stay four bits) and its other tensors; the source keeps its empty model, to
    save from.
    """
    if not isinstance(source, CheckpointSource):
        return source.model
    source = source.reopen()
    model = source.model
    for name in [*source.blocks, *source.outside_modules()]:
        source.load(name)
        for layer in (v for k, v in layers.items() if k == name or k.startswith(f"{name}.")):
            _put(model, layer)
    return model.eval()


def _put(model: torch.nn.Module, layer: QuantizedLayer) -> None:
    parent_name, _, attribute = layer.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(attribute)
    packed = _packed(layer)
    if packed is not None:
        setattr(parent, attribute, packed)
        return
    weight = getattr(old, "weight", None)
    assert isinstance(weight, torch.Tensor)
    old.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)  # a tied twin keeps its own
    set_weight_2d(old, layer.dequantize())


def _packed(layer: QuantizedLayer) -> QuantLinear | None:
    """The layer as the loader's module, or None when its type or shape has no packing."""
    fmt = get_format("auto_round")
    scheme = layer.scheme
    if (
        layer.codes is None
        or fmt.check_scheme(scheme)
        or fmt.check_layer(scheme, layer.in_features, layer.out_features)
    ):
        return None
    stored = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else -1
    described: LayerFormat = read_config(
        {
            "bits": scheme.bits, "group_size": stored, "sym": scheme.sym, "data_type": "int",
            "quant_method": "auto-round", "packing_format": packing_of(scheme),
        }
    ).default  # fmt: skip
    dtype = layer.bias.dtype if layer.bias is not None else torch.float32
    module = QuantLinear(
        layer.in_features, layer.out_features, described, bias=layer.bias is not None, dtype=dtype,
        scale_dtype=torch.float16,
    )  # fmt: skip
    for name, tensor in fmt.pack(layer).items():
        getattr(module, name.rpartition(".")[2]).copy_(tensor)
    module.prepare(layer.name)
    return module
