"""Layers of a block whose experts are not all in memory: computed on access, or kept in a temporary file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from auto_round.calibration.disk_store import DiskStore, DiskTensor
from auto_round.codecs.quantized_layer import Codes, QuantizedLayer
from auto_round.modeling.partial_loading import expert_of
from auto_round.run.plan import LayerPlan


class ExpertLayers(Mapping[str, QuantizedLayer]):
    """Layers of a block by name, whose experts are not all in memory: those of one expert are made on access.

    Args:
        names: of all layers, in order.
        held: layers that are in memory, by name.
        make: returns the other layers of one expert by name.
    """

    def __init__(
        self, names: Sequence[str], held: Mapping[str, QuantizedLayer],
        make: Callable[[str], Mapping[str, QuantizedLayer]],
    ) -> None:  # fmt: skip
        self._names, self._held, self._make = list(names), held, make
        self._last: tuple[str, Mapping[str, QuantizedLayer]] = ("", {})

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> QuantizedLayer:
        return self._held[name] if name in self._held else self._of(expert_of(name) or name)[name]

    def dense(self, expert: str) -> dict[str, torch.Tensor]:
        """Dequantized weights of one expert, float32 [out, in], by layer name."""
        return {name: layer.dequantize(torch.float32) for name, layer in self._of(expert).items()}

    def _of(self, expert: str) -> Mapping[str, QuantizedLayer]:
        if self._last[0] != expert:
            self._last = ("", {})  # free the expert before
            self._last = expert, self._make(expert)
        return self._last[1]


def read_layers(stored: Mapping[str, QuantizedLayer], expert: str) -> dict[str, QuantizedLayer]:
    """The layers of one expert, of those that `store_layer` gave."""
    own = (name for name in stored if (expert_of(name) or name) == expert)
    return {name: _with_tensors(stored[name], lambda tensor: tensor.read()) for name in own}


def store_layer(layer: QuantizedLayer, store: DiskStore) -> QuantizedLayer:
    """The layer with its tensors, except scalars, in a file; for `read_layers`."""
    return _with_tensors(layer, store.put)


def _with_tensors(item: Any, change: Callable[[Any], Any]) -> Any:
    """A layer, or its codes, with every tensor that is no scalar changed."""
    changed = {}
    for name, value in ((f.name, getattr(item, f.name)) for f in fields(item)):
        if isinstance(value, torch.Tensor | DiskTensor) and value.dim():
            changed[name] = change(value)
        elif isinstance(value, Codes):
            changed[name] = _with_tensors(value, change)
    return replace(item, **changed)


def stored_bytes(plan: LayerPlan) -> int:
    """Bytes of one layer's codes, in whole bytes, and of its scales in a file."""
    bits, scales = plan.codec.stored_bytes(plan.out_features, plan.in_features)
    return plan.out_features * plan.in_features * -(-bits // 8) + scales
