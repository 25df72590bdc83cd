"""Edits of weights that a transform asks for, recorded so that every later read gives the edited tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class TensorEdit(Protocol):
    """A change of one tensor that keeps its shape and dtype."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The edited tensor; the argument is not modified."""

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors from which `edit_from_state` builds the edit again, for the journal."""


@dataclass(frozen=True)
class ChannelScale:
    """Multiply a tensor by one factor for each index along one dimension, in float32, rounded once."""

    factors: torch.Tensor  # float32 [n], n the size of that dimension
    dim: int = 0  # 0 for the rows (outputs) of a weight [out, in] or the elements of a vector, 1 for its columns

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = [1] * tensor.dim()
        shape[self.dim] = -1
        return (tensor.float() * self.factors.to(tensor.device).view(shape)).to(tensor.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"channel_scale_{self.dim}": self.factors}


def edit_from_state(state: Mapping[str, torch.Tensor]) -> TensorEdit:
    """The inverse of `TensorEdit.state`."""
    ((kind, factors),) = state.items()
    return ChannelScale(factors, int(kind.removeprefix("channel_scale_")))
