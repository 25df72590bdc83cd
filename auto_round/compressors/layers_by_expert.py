"""The layers of a block whose experts are not in memory: one expert's are made, or read, as they are reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.calibration.spill import Spill, SpilledTensor
from auto_round.compressors.resume.layer_state import layer_from_state, layer_state, packed, scheme_of, unpacked
from auto_round.modeling.one_expert import expert_of
from auto_round.quantized_layer import QuantizedLayer
from auto_round.schemes import QuantizationScheme


class LayersByExpert(Sequence[QuantizedLayer], ABC):
    """The layers in order; those of an expert are held until the next one's are reached.

    Attributes:
        names: of all layers.
        held: those that are in memory, by name.
    """

    def __init__(self, names: Sequence[str], held: Mapping[str, QuantizedLayer]) -> None:
        self.names, self.held = list(names), held
        self._last: tuple[str, Mapping[str, QuantizedLayer]] = ("", {})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        name = self.names[index]
        return self.held[name] if name in self.held else self._of(expert_of(name) or name)[name]

    def dense(self, expert: str) -> dict[str, torch.Tensor]:
        """Dequantized weights of one expert, float32 [out, in], by layer name."""
        return {name: layer.dequantize(torch.float32) for name, layer in self._of(expert).items()}

    def _of(self, expert: str) -> Mapping[str, QuantizedLayer]:
        if self._last[0] != expert:
            self._last = ("", {})
            self._last = expert, self._make(expert)
        return self._last[1]

    @abstractmethod
    def _make(self, expert: str) -> Mapping[str, QuantizedLayer]:
        """The layers of one expert, by name."""


@dataclass(frozen=True)
class StoredLayer:
    """A layer as the journal has it: tensors, codes packed, how those are to be read, and the fields that are no
    tensors."""

    tensors: Mapping[str, torch.Tensor | SpilledTensor]
    widths: Mapping[str, Sequence[Any]]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, layer: QuantizedLayer, spill: Spill | None = None) -> StoredLayer:
        """With `spill`, its tensors go to that file."""
        own, facts = layer_state(layer)
        tensors, widths = packed(own)
        if spill is None:
            return cls(tensors, widths, facts)
        return cls({name: spill.put(t) if t.dim() else t for name, t in tensors.items()}, widths, facts)

    @property
    def scheme(self) -> QuantizationScheme:
        return scheme_of(self.facts)

    def layer(self, device: Any) -> QuantizedLayer:
        """What lay on an accelerator goes to `device`."""
        read = {name: t.read() if isinstance(t, SpilledTensor) else t for name, t in self.tensors.items()}
        return layer_from_state(unpacked(read, self.widths), self.facts, device)


class StoredLayers(LayersByExpert):
    """Layers whose codes lie in a file.

    Args:
        stored: by name, those that are not `held`.
        device: where to read what came from an accelerator.
    """

    def __init__(
        self, names: Sequence[str], held: Mapping[str, QuantizedLayer], stored: Mapping[str, StoredLayer], device: Any
    ) -> None:
        super().__init__(names, held)
        self._stored, self._device = stored, device

    def states(self) -> Iterator[StoredLayer]:
        """All of them in order, without reading any."""
        for name in self.names:
            yield StoredLayer.of(self.held[name]) if name in self.held else self._stored[name]

    def _make(self, expert: str) -> Mapping[str, QuantizedLayer]:
        own = [name for name in self.names if name not in self.held and (expert_of(name) or name) == expert]
        return {name: self._stored[name].layer(self._device) for name in own}


def stored_forms(layers: Sequence[QuantizedLayer]) -> Iterator[StoredLayer]:
    """Layers as the journal has them."""
    if isinstance(layers, StoredLayers):
        return layers.states()
    return (StoredLayer.of(layer) for layer in layers)
