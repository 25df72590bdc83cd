"""Packed layers in the place of a model object's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.compressors.assemble import packed_layer
from auto_round.quantized_layer import QuantizedLayer


class PackedLayers:
    """The layers of a model object that were replaced by packed ones, so that they can be put back to save again."""

    def __init__(self) -> None:
        self._own: dict[str, torch.nn.Module] = {}
        self._model: torch.nn.Module | None = None

    def put_in(self, model: torch.nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
        """Replace each layer that has a packing by its packed form."""
        self.take_out()
        self._model = model
        for name, layer in layers.items():
            own = model.get_submodule(name)
            weight = getattr(own, "weight", None)
            packed = packed_layer(layer, weight.dtype) if isinstance(weight, torch.Tensor) else None
            if packed is not None and isinstance(weight, torch.Tensor):
                _set(model, name, packed.to(weight.device))
                self._own[name] = own

    def take_out(self) -> None:
        """Put the model's own layers back."""
        if self._model is not None:
            for name, own in self._own.items():
                _set(self._model, name, own)
        self._own.clear()
        self._model = None


def _set(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
