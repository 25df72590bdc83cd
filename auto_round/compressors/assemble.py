"""The model that `quantize()` hands back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.data_type.activation import ActivationQuantizer
from auto_round.export.float_layouts import is_float
from auto_round.export.formats import get_format
from auto_round.export.llm_compressor_format import PackedInt8Format
from auto_round.export.plan import ExportPlan
from auto_round.inference.build_layer import build_layer
from auto_round.inference.config_reader import read_config
from auto_round.inference.packed_linear import PackedLinear
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
    weight = getattr(old, "weight", None)
    assert isinstance(weight, torch.Tensor)
    packed = packed_layer(layer, weight.dtype)
    if packed is not None:
        setattr(parent, attribute, packed)
        return
    old.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)  # a tied twin keeps its own
    set_weight_2d(old, layer.dequantize())
    activation = layer.scheme.activations
    if activation is not None:
        quantizer = ActivationQuantizer(activation, layer.act_scale, layer.act_zero_point, layer.act_global_scale)
        old.register_forward_pre_hook(quantizer.hook)


def packed_layer(layer: QuantizedLayer, model_dtype: torch.dtype) -> PackedLinear | None:
    """A layer as the module that the loader makes of it, or None when its type or shape has no packing."""
    scheme = layer.scheme
    whole = scheme.quantizes_activations and not is_float(scheme)
    fmt = PackedInt8Format() if whole else get_format("auto_round")
    if (
        layer.codes is None
        or fmt.check_scheme(scheme)
        or fmt.check_layer(scheme, layer.in_features, layer.out_features)
    ):
        return None
    described = read_config(fmt.config(ExportPlan(scheme, {layer.name: scheme}, ()))).default
    tensors = {key.rpartition(".")[2]: value for key, value in fmt.pack(layer, model_dtype=model_dtype).items()}
    dtype = layer.bias.dtype if layer.bias is not None else torch.float32
    shape = torch.empty((), dtype=dtype).expand(layer.out_features, layer.in_features)
    stored = {leaf: tensor.dtype for leaf, tensor in tensors.items()}
    module = build_layer(described, shape, layer.bias is not None, stored, False, "")
    for leaf, tensor in tensors.items():
        module.get_buffer(leaf).copy_(tensor)
    module.prepare(layer.name)
    return module
