"""What one finished unit left - a block, or what is outside the blocks - as tensors and facts for the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from auto_round.compressors.resume.layer_state import (
    Tensors,
    activation_from_state,
    activation_state,
    layer_from_state,
    layer_state,
    packed,
    unpacked,
)
from auto_round.data_type.activation import ActivationQuantizer
from auto_round.quantized_layer import QuantizedLayer
from auto_round.report.run_report import BlockRecord


@dataclass
class Unit:
    """A finished unit.

    Attributes:
        layers: as the sinks get them.
        activations: by layer, how its inputs are quantized.
        records: for the report.
        scales: static scales of attention, by tensor name.
        sums, tokens: by layer, the sums of squares of its inputs, and over how many tokens; empty unless they are
            saved at the end.
        unreached: layers that no calibration token reached.
        numbers: what had come of NaN and Inf by then, as `Numbers.state` has it.
    """

    layers: Sequence[QuantizedLayer] = field(default_factory=list)
    activations: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    numbers: Mapping[str, Any] = field(default_factory=dict)


def unit_state(unit: Unit) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and facts of a unit, codes packed."""
    tensors: Tensors = {}
    layers, activations = [], {}
    for number, layer in enumerate(unit.layers):
        own, facts = layer_state(layer)
        layers.append(facts)
        tensors |= {f"layer.{number}.{name}": tensor for name, tensor in own.items()}
        if layer.name in unit.activations:
            own, facts = activation_state(unit.activations[layer.name])
            activations[layer.name] = facts
            tensors |= {f"input.{number}.{name}": tensor for name, tensor in own.items()}
    tensors |= {f"scale.{name}": tensor for name, tensor in unit.scales.items()}
    tensors |= {f"sum.{name}": tensor for name, tensor in unit.sums.items()}
    tensors, widths = packed(tensors)
    facts = {
        "layers": layers, "activations": activations, "records": [asdict(record) for record in unit.records],
        "tokens": dict(unit.tokens), "unreached": unit.unreached, "widths": widths, "numbers": dict(unit.numbers),
    }  # fmt: skip
    return tensors, facts


def unit_from_state(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], device: Any) -> Unit:
    """The unit. Tensors that lay on an accelerator go to `device`."""
    tensors = unpacked(tensors, facts["widths"])

    def under(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    layers = [layer_from_state(under(f"layer.{n}."), own, device) for n, own in enumerate(facts["layers"])]
    activations = {
        layer.name: activation_from_state(layer, under(f"input.{n}."), facts["activations"][layer.name])
        for n, layer in enumerate(layers)
        if layer.name in facts["activations"]
    }
    records = [BlockRecord(**record) for record in facts["records"]]
    return Unit(
        layers, activations, records, under("scale."), under("sum."), dict(facts["tokens"]), list(facts["unreached"]),
        facts.get("numbers", {}),
    )  # fmt: skip
