"""What one finished unit left - a block, or what is outside the blocks - as tensors and facts for the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from auto_round.calibration.spill import SpilledTensor
from auto_round.compressors.layers_by_expert import StoredLayer, StoredLayers, stored_forms
from auto_round.compressors.resume.layer_state import (
    Tensors,
    activation_from_state,
    activation_state,
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


def unit_state(unit: Unit) -> tuple[dict[str, torch.Tensor | SpilledTensor], dict[str, Any]]:
    """Tensors and facts of a unit, codes packed. What is in a file is not read."""
    tensors: Tensors = {}
    layers, activations = [], {}
    stored: dict[str, torch.Tensor | SpilledTensor] = {}
    widths: dict[str, Any] = {}
    for number, layer in enumerate(stored_forms(unit.layers)):
        layers.append(dict(layer.facts))
        stored |= {f"layer.{number}.{name}": tensor for name, tensor in layer.tensors.items()}
        widths |= {f"layer.{number}.{name}": width for name, width in layer.widths.items()}
        name = layer.facts["name"]
        if name in unit.activations:
            own, facts = activation_state(unit.activations[name])
            activations[name] = facts
            tensors |= {f"input.{number}.{leaf}": tensor for leaf, tensor in own.items()}
    tensors |= {f"scale.{name}": tensor for name, tensor in unit.scales.items()}
    tensors |= {f"sum.{name}": tensor for name, tensor in unit.sums.items()}
    rest, more = packed(tensors)
    facts = {
        "layers": layers, "activations": activations, "records": [asdict(record) for record in unit.records],
        "tokens": dict(unit.tokens), "unreached": unit.unreached, "widths": widths | more,
        "numbers": dict(unit.numbers),
    }  # fmt: skip
    return stored | rest, facts


def unit_from_state(given: Mapping[str, torch.Tensor | SpilledTensor], facts: Mapping[str, Any], device: Any) -> Unit:
    """The unit. Tensors that lay on an accelerator go to `device`. Layers in a file are read as they are reached."""
    rest = {n: t.read() if isinstance(t, SpilledTensor) else t for n, t in given.items() if not n.startswith("layer.")}
    tensors = unpacked(rest, facts["widths"])

    def under(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    stored: dict[str, StoredLayer] = {}
    for number, own in enumerate(facts["layers"]):
        prefix = f"layer.{number}."
        parts = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
        widths = {n.removeprefix(prefix): w for n, w in facts["widths"].items() if n.startswith(prefix)}
        stored[own["name"]] = StoredLayer(parts, widths, own)
    in_file = any(isinstance(tensor, SpilledTensor) for tensor in given.values())
    layers: Sequence[QuantizedLayer] = [] if in_file else [layer.layer(device) for layer in stored.values()]
    layers = StoredLayers(list(stored), {}, stored, device) if in_file else layers
    activations = {
        name: activation_from_state(stored[name].scheme, under(f"input.{n}."), facts["activations"][name])
        for n, name in enumerate(stored)
        if name in facts["activations"]
    }
    records = [BlockRecord(**record) for record in facts["records"]]
    return Unit(
        layers, activations, records, under("scale."), under("sum."), dict(facts["tokens"]), list(facts["unreached"]),
        facts.get("numbers", {}),
    )  # fmt: skip
