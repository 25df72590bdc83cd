"""What converting a family of models takes, as data: its keys, its special tensors, and what llama.cpp assumes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.export.gguf.placement import Placement
from auto_round.export.gguf.settings import Settings

Source = str | tuple[str, ...] | Callable[[Settings], Any]
Place = Callable[[Settings, re.Match[str]], list[Placement]]


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        name: without the architecture, such as "block_count".
        kind: its type, such as "uint32".
        source: what it is read from: names in the configuration, the first that has a value, or a function. A key
            without a value is not written.
    """

    name: str
    kind: str
    source: Source

    def value(self, settings: Settings) -> Any:
        """The value, of the Python type that goes with `kind`, or None."""
        if callable(self.source):
            found = self.source(settings)
        else:
            found = settings.get(*((self.source,) if isinstance(self.source, str) else self.source))
        if found is None:
            return None
        cast = {"uint32": int, "int32": int, "float32": float, "bool": bool, "string": str}[self.kind]
        return [cast(item) for item in found] if isinstance(found, (list, tuple)) else cast(found)


@dataclass(frozen=True)
class Rule:
    """Source tensors that do not simply get another name: those whose whole name matches `pattern`."""

    pattern: str
    place: Place


@dataclass(frozen=True)
class Assumption:
    """Something that llama.cpp takes for granted; models for which it does not hold are refused.

    Attributes:
        holds: whether it does.
        otherwise: what is the case if not, and why that cannot be written; may contain {names} from the configuration.
    """

    holds: Callable[[Settings], bool]
    otherwise: str


@dataclass(frozen=True)
class Family:
    """How models of some types are converted.

    Attributes:
        arch: llama.cpp's name of the architecture.
        model_types: `model_type` in the configuration.
        keys: what the file says about the model; a later key of the same name replaces an earlier one.
        rules: special tensors, in order; all others are renamed by `gguf.TensorNameMap`.
        renames: (regular expression, replacement), applied before that map is asked.
        assumes: what must hold.
        extras: tensors that are in no checkpoint: float32, by their names in the file.
        notes: (condition, text): what the user should know.
    """

    arch: str
    model_types: tuple[str, ...]
    keys: tuple[Key, ...]
    rules: tuple[Rule, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    assumes: tuple[Assumption, ...] = ()
    extras: Callable[[Settings], dict[str, torch.Tensor]] | None = None
    notes: tuple[tuple[Callable[[Settings], bool], str], ...] = ()
