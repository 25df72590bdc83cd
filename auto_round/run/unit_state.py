"""Results of a finished unit of a run, and how the journal stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from auto_round.edits import TensorEdit, edit_from_state
from auto_round.report.run_report import BlockRecord
from auto_round.run.writers import Mark

Tensors = dict[str, torch.Tensor]
_MARKS = "mark"


@dataclass
class Unit:
    """Results of a finished unit, a block or all layers outside the blocks, apart from its layers.

    Attributes:
        marks: by format, what its writer has done for this unit.
        records: for the report.
        scales: static scales of attention, by tensor name.
        sums, tokens: sums of squares of the inputs by layer, and over how many tokens; empty unless an importance file
            is saved.
        unreached: layers that no calibration token reached.
        edits: edits of the transforms, by tensor name.
        nearest: layers that got the nearest codes instead of error feedback, with the reasons.
        numerics: `NumericsPolicy.state` after the unit.
        loss: on the smoke sample, after the last unit.
    """

    marks: Mapping[str, Mark] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    nearest: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    edits: Mapping[str, TensorEdit] = field(default_factory=dict)
    loss: float | None = None


def unit_state(unit: Unit) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and metadata of a unit."""
    tensors = {f"scale.{name}": tensor for name, tensor in unit.scales.items()}
    tensors |= {f"sum.{name}": tensor for name, tensor in unit.sums.items()}
    for name, edit in unit.edits.items():
        tensors |= {f"edit.{kind}.{name}": tensor for kind, tensor in edit.state().items()}
    marks = {}
    for number, (fmt, mark) in enumerate(unit.marks.items()):
        tensors |= {f"{_MARKS}{number}.{name}": tensor for name, tensor in mark.tensors.items()}
        marks[fmt] = {name: value for name, value in vars(mark).items() if name != "tensors"}
    metadata = {
        "marks": marks, "records": [asdict(record) for record in unit.records], "tokens": dict(unit.tokens),
        "unreached": unit.unreached, "nearest": dict(unit.nearest), "numerics": dict(unit.numerics), "loss": unit.loss,
    }  # fmt: skip
    return tensors, metadata


def unit_from_state(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Unit:
    """Inverse of `unit_state`."""

    def under(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    edits = {}
    for key, factors in under("edit.").items():
        kind, _, name = key.partition(".")
        edits[name] = edit_from_state({kind: factors})
    marks = {
        fmt: Mark(**values, tensors=under(f"{_MARKS}{number}."))
        for number, (fmt, values) in enumerate(metadata["marks"].items())
    }
    return Unit(
        marks, [BlockRecord(**record) for record in metadata["records"]], under("scale."), under("sum."),
        metadata["tokens"], metadata["unreached"], metadata["nearest"], metadata["numerics"], edits, metadata["loss"],
    )  # fmt: skip
