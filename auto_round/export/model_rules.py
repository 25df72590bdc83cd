"""What a format asks of a family of models: other tensor names, stacked experts, layers that must stay dense."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

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
    def moves_tensors(self) -> bool:
        """Whether any tensor is written elsewhere than under its own name."""
        return bool(self.renames or self.experts)

    def stays_dense(self, layer: str) -> str | None:
        """Why the layer must stay in full precision, or None."""
        return next((reason for pattern, reason in self.dense if re.search(pattern, layer)), None)

    def stored_as(self, tensor: str) -> tuple[str, int | None]:
        """(name in the file, index along the first dimension where experts are stacked, else None)."""
        expert = _EXPERT.match(tensor) if self.experts else None
        name = f"{expert['front']}{self.experts}.{expert['leaf']}" if expert else tensor
        return renamed(name, self.renames), int(expert["index"]) if expert else None

    def with_config(self, values: dict[str, Any]) -> dict[str, Any]:
        """A copy of config.json's values with the keys of `config` added."""
        added = {key: values[other] for key, other in self.config if key not in values and other in values}
        return {**values, **added}

    def module_name(self, layer: str) -> str:
        """The name of a linear layer's module as the file's tensors have it."""
        return self.stored_as(f"{layer}.weight")[0].removesuffix(".weight")


def renamed(name: str, renames: Renames) -> str:
    """`name` after all `renames`, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


PLAIN = ModelRules()
