"""Interface and registry of transforms: rewrites of a block that keep what it computes and make it easier to quantize.

A transform looks at one block in full precision and names edits of its tensors. The run records them with the source,
so that a fresh run, a resumed one, a model in memory and the files all hold the same edited tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from auto_round.edits import TensorEdit
from auto_round.errors import ConfigError
from auto_round.schemes import QuantizationScheme


@dataclass(frozen=True)
class BlockView:
    """One block as a transform sees it. Nothing of it may be modified. `schemes` and `moments` are by layer name inside
    the block, such as "self_attn.q_proj"."""

    name: str  # such as "model.layers.0"
    block: torch.nn.Module  # in the dtype of the matrix products; experts that are read one at a time are on meta
    schemes: Mapping[str, QuantizationScheme]  # what each layer is quantized to
    moments: Mapping[str, Tensor]  # float32 [in], mean squares of inputs; empty without calibration data


class BlockTransform(Protocol):
    """A rewrite of blocks. `needs_data`: whether it reads `BlockView.moments`."""

    needs_data: bool

    def edits(self, view: BlockView) -> Mapping[str, TensorEdit]:
        """Edits by tensor name inside the block, such as "input_layernorm.weight". Together they must leave the
        block's output unchanged; a run with calibration data checks that on one sample."""


TRANSFORMS: dict[str, type[BlockTransform]] = {}


def register_transform(name: str) -> Callable[[type[BlockTransform]], type[BlockTransform]]:
    """Class decorator: `--algorithm NAME` asks for the transform. Raises ConfigError when the name is taken."""

    def register(kind: type[BlockTransform]) -> type[BlockTransform]:
        if TRANSFORMS.setdefault(name, kind) is not kind:
            raise ConfigError(f"a transform called {name!r} is registered already")
        return kind

    return register


def split_transforms(names: Sequence[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Registered transforms among the entries of `--algorithm` or `alg_configs`, and the other entries, in order."""
    found = tuple(name for name in names if isinstance(name, str) and name in TRANSFORMS)
    return found, [name for name in names if name not in found]
