"""Experts that stay dense are written fused again, as Transformers' own modules hold them.

A family's checkpoint may name single experts in a way of its own (Mixtral's `block_sparse_moe.experts.0.w1`) or store
none at all (GPT-OSS), and Transformers fills what it does not find with random numbers. The fused parameters' names are
understood in every family. Where some experts of a module are packed the loader splits the module, and the dense ones
keep their own names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from auto_round.modeling.experts import ExpertPiece, LinearExperts


@dataclass(frozen=True)
class FusedTarget:
    """Where one expert's dense tensor goes.

    Attributes:
        name: full name of the fused tensor.
        shape: of the fused tensor.
        parts: tensors that it is made of.
        piece: the place in it.
    """

    name: str
    shape: tuple[int, ...]
    parts: int
    piece: ExpertPiece


def fused_targets(model: torch.nn.Module, written: Collection[str]) -> dict[str, FusedTarget]:
    """Targets by tensor name, for every experts module of `model` all of whose tensors are among `written` names."""
    targets: dict[str, FusedTarget] = {}
    for prefix, experts in model.named_modules():
        if not isinstance(experts, LinearExperts):
            continue
        pieces = experts.pieces()
        if not all(f"{prefix}.{leaf}" in written for leaf in pieces):
            continue
        shapes = experts.fused_shapes()
        for leaf, piece in pieces.items():
            parts = sum(other.param == piece.param for other in pieces.values())
            targets[f"{prefix}.{leaf}"] = FusedTarget(f"{prefix}.{piece.param}", shapes[piece.param], parts, piece)
    return targets


class ExpertJoiner:
    """Collects dense experts until a fused tensor is whole."""

    def __init__(self, targets: dict[str, FusedTarget]) -> None:
        self.targets = targets
        self._open: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The tensor to write now: `tensor` itself, a fused one that it completes, or None."""
        target = self.targets.get(name)
        if target is None:
            return name, tensor
        whole, missing = self._open.pop(target.name, (None, target.parts))
        if whole is None:
            whole = torch.empty(target.shape, dtype=tensor.dtype)
        target.piece.paste(whole[target.piece.expert], tensor)
        if missing == 1:
            return target.name, whole
        self._open[target.name] = (whole, missing - 1)
        return None
