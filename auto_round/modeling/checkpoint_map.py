"""Which checkpoint tensors every tensor of a model is made of.

Checkpoints differ from the modules that read them: a base model's prefix is missing or extra, names were changed,
experts are stored one by one or fused. Transformers publishes these differences as conversion mappings; this file
applies them to names once, when a checkpoint is opened, and to data tensor by tensor, when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.expert_layouts import ExpertPiece
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.tensor_files import TensorFiles


@dataclass(eq=False)
class Origin:
    """Checkpoint tensors that are read together and give one or more model tensors.

    Attributes:
        keys: (checkpoint name, source pattern) in the order in which a converter wants them.
        name: the first model tensor they give.
        converter: Transformers' WeightConverter, or None when the tensor is used as stored.
    """

    name: str
    keys: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    def read(self, files: TensorFiles, model: nn.Module) -> dict[str, torch.Tensor]:
        """Model tensors by name, in the checkpoint's dtype. Raises ModelError when a conversion fails."""
        if self.converter is None:
            return {self.name: files.read(self.keys[0][0])}
        converter = deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.name, key, pattern, files.read(key))
        try:
            made = converter.convert(self.name, model=model, config=getattr(model, "config", None))
        except Exception as error:  # third-party operations raise whatever they like on odd shapes
            names = ", ".join(key for key, _ in self.keys[:3])
            raise ModelError(f"cannot build tensor {self.name!r} from {names} of {files.folder}: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class TensorPlan:
    """How to get one model tensor: its origin, its name there, and the expert cut out of it, if any."""

    origin: Origin
    name: str
    piece: ExpertPiece | None = None


def plan_tensors(
    files: TensorFiles, model: nn.Module, names: Iterable[str], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, TensorPlan]:
    """A plan for each of `names` that the checkpoint holds, directly or through a conversion.

    Args:
        files: the opened checkpoint.
        model: the model, with its experts unfused.
        names: its state-dict names.
        fused_names: its state dict before experts were unfused, which is what conversion mappings speak of.
    """
    wanted = dict.fromkeys(names)
    plans = {n: TensorPlan(Origin(n, [(n, n)]), n) for n in wanted if n in files}
    origins = _renamed(files, model, wanted, fused_names)
    for name in wanted:
        if name not in plans and name in origins:
            plans[name] = TensorPlan(origins[name], name)
    for prefix, experts in model.named_modules():
        if isinstance(experts, LinearExperts):
            for leaf, piece in experts.pieces().items():
                name, fused = f"{prefix}.{leaf}", f"{prefix}.{piece.param}"
                if name in wanted and name not in plans and fused in origins:
                    plans[name] = _expert_plan(origins[fused], fused, name, piece)
    return plans


def _renamed(
    files: TensorFiles, model: nn.Module, wanted: Mapping[str, Any], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, Origin]:
    """Origins of all tensors whose checkpoint name differs, by the name that Transformers' mapping gives them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known = {**fused_names, **dict.fromkeys(wanted, torch.empty(0))}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", "") or None
    origins: dict[str, Origin] = {}
    for key in sorted(files, key=dot_natural_key):
        if key in wanted:
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known:
            plain, _ = rename_source_key(key, [], [], prefix, known)
            if plain in known:
                name, pattern = plain, None
        origin = origins.setdefault(name, Origin(name))
        origin.keys.append((key, pattern or key))
        if pattern is not None:
            origin.converter = by_pattern[pattern]
            for target in origin.converter.target_patterns[1:]:
                origins[name.replace(origin.converter.target_patterns[0], target)] = origin
    return origins


def _expert_plan(origin: Origin, fused: str, name: str, piece: ExpertPiece) -> TensorPlan:
    """The plan for one expert's tensor: straight from its own checkpoint tensor where experts are stored one by one."""
    lists = _stacked_lists(origin)
    if lists is None or piece.transposed or piece.interleaved:
        return TensorPlan(origin, fused, piece)
    which = lists[1] if piece.part == "up" else lists[0]
    if piece.part == "all" and len(lists) != 1 or piece.part != "all" and len(lists) != 2 or piece.expert >= len(which):
        return TensorPlan(origin, fused, piece)
    return TensorPlan(Origin(name, [(which[piece.expert],) * 2]), name)


def _stacked_lists(origin: Origin) -> list[list[str]] | None:
    """Checkpoint names per source pattern, when the converter only stacks experts and joins gate with up; else None."""
    if origin.converter is None:
        return None
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in origin.converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    lists = [[key for key, p in origin.keys if p == pattern] for pattern in origin.converter.source_patterns]
    return lists if all(lists) else None
