"""Tensors that are not written as they come: dense experts fused again, and what a format stacks or renames.

Experts that stay dense are written as Transformers' own modules hold them.

A family's checkpoint may name single experts in a way of its own (Mixtral's `block_sparse_moe.experts.0.w1`) or store
none at all (GPT-OSS), and Transformers fills what it does not find with random numbers. The fused parameters' names are
understood in every family. Where some experts of a module are packed the loader splits the module, and the dense ones
keep their own names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from auto_round.errors import UnsupportedError
from auto_round.export.formats import TensorSpecs
from auto_round.export.model_rules import ModelRules, renamed
from auto_round.modeling.expert_layouts import ExpertPiece
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.tensor_files import TensorFiles

_EXPERT_WEIGHT = re.compile(r"^(.*\bexperts)\.\d+\.[^.]+\.weight$")
_EXPERT_WORDS = re.compile(r"^(.*\bexperts)\.\d+\.[^.]+\.qweight$")


@dataclass(frozen=True)
class FusedTarget:
    """Where one expert's dense tensor goes.

    Attributes:
        name: full name of the fused tensor.
        shape: of the fused tensor.
        parts: tensors that it is made of.
        piece: the place in it; None when the tensor is only written under another name.
    """

    name: str
    shape: tuple[int, ...]
    parts: int
    piece: ExpertPiece | None


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


def stored_targets(specs: TensorSpecs, rules: ModelRules) -> dict[str, FusedTarget]:
    """Targets by tensor name of everything that `rules` stack or rename.

    Raises UnsupportedError when tensors that are to be stacked differ in shape or dtype, or some are missing: the
    experts of a block were given different schemes.
    """
    moved: dict[str, FusedTarget] = {}
    split = set() if rules.beside_packed is None else _with_packed_experts(specs)
    stacks: dict[str, dict[int, str]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    for tensor, (shape, _) in specs.items():
        name, index = rules.stored_as(tensor)
        expert = _EXPERT_WEIGHT.match(tensor)
        if rules.beside_packed is not None and expert and expert[1] in split:
            name = renamed(tensor, rules.beside_packed)
        if index is not None:
            stacks[name][index] = tensor
            module = name.rpartition(".")[0].rpartition(".")[0]
            sizes[module] = max(sizes[module], index + 1)
        elif name != tensor:
            moved[tensor] = FusedTarget(name, shape, 1, None)
    for name, parts in stacks.items():
        count = sizes[name.rpartition(".")[0].rpartition(".")[0]]
        kinds = {specs[tensor] for tensor in parts.values()}
        if len(parts) != count or len(kinds) != 1:
            raise UnsupportedError(
                f"the format stacks the {count} experts of a block in {name}, but they have different schemes; give "
                "all experts of a block the same bits, group size and symmetry for each projection"
            )
        shape = (count, *next(iter(kinds))[0])
        for index, tensor in parts.items():
            moved[tensor] = FusedTarget(name, shape, count, ExpertPiece(name, index, "all", False, False))
    return moved


def _with_packed_experts(specs: TensorSpecs) -> set[str]:
    """Names of the experts modules that hold packed experts."""
    return {match[1] for name in specs if (match := _EXPERT_WORDS.match(name))}


def read_pieces(
    files: TensorFiles, names: Collection[str], targets: Mapping[str, FusedTarget]
) -> dict[str, torch.Tensor]:
    """Tensors by the names under which they were handed in, out of files where some are stacked or renamed."""
    found = {}
    for name in names:
        target = targets.get(name)
        row = None if target is None or target.piece is None else target.piece.expert
        found[name] = files.read(name if target is None else target.name, row)
    return found


class ExpertJoiner:
    """Collects tensors until a fused or stacked one is whole."""

    def __init__(self, targets: dict[str, FusedTarget]) -> None:
        self.targets = targets
        self._open: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The tensor to write now: `tensor` itself, a fused one that it completes, or None."""
        target = self.targets.get(name)
        if target is None:
            return name, tensor
        if target.piece is None:
            return target.name, tensor
        whole, missing = self._open.pop(target.name, (None, target.parts))
        if whole is None:
            whole = torch.empty(target.shape, dtype=tensor.dtype)
        target.piece.paste(target.piece.slot(whole), tensor)
        if missing == 1:
            return target.name, whole
        self._open[target.name] = (whole, missing - 1)
        return None
