"""Which checkpoint tensors every tensor of a model is made of.

Transformers' conversion mapping (`modeling.conversions`) is applied to names once, when a checkpoint is opened, and to
data tensor by tensor, when it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.conversions import Conversions, Origin, conversions_of, run_converter, saving_conversions
from auto_round.modeling.expert_layouts import ExpertPiece
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.tensor_files import TensorFiles


@dataclass(frozen=True)
class TensorPlan:
    """How to get one model tensor: its origin, its name there, and the expert cut out of it, if any."""

    origin: Origin
    name: str
    piece: ExpertPiece | None = None

    @property
    def key(self) -> str | None:
        """The checkpoint tensor that is this model tensor as it is stored; None where it is made or cut."""
        plain = self.origin.converter is None and self.piece is None
        return self.origin.keys[0][0] if plain else None


def read_origin(origin: Origin, files: TensorFiles, model: nn.Module) -> dict[str, torch.Tensor]:
    """Model tensors by name, in the checkpoint's dtype. Raises ModelError when a conversion fails."""
    if origin.converter is None:
        return {origin.name: files.read(origin.keys[0][0])}
    tensors = ((key, pattern, files.read(key)) for key, pattern in origin.keys)
    try:
        return run_converter(deepcopy(origin.converter), origin.name, tensors, model)
    except ModelError:
        raise
    except Exception as error:  # third-party operations raise whatever they like on odd shapes
        names = ", ".join(origin.stored[:3])
        raise ModelError(f"cannot build tensor {origin.name!r} from {names} of {files.folder}: {error}") from error


def plan_saved(
    model: nn.Module, names: Collection[str], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, TensorPlan]:
    """A plan for each tensor of a model object, as the checkpoint would be read that Transformers saves of it.

    Args:
        model: with its experts unfused.
        names: its state-dict names.
        fused_names: its state dict before experts were unfused, on meta.
    """
    plans = plan_tensors(_saved_names(model, fused_names), model, names, fused_names)
    return {name: plans.get(name) or TensorPlan(Origin(name, [(name, name)], targets=[name]), name) for name in names}


def _saved_names(model: nn.Module, fused_names: Mapping[str, torch.Tensor]) -> dict[str, None]:
    """Names of the tensors that `save_pretrained` would write."""
    from transformers.core_model_loading import dot_natural_key

    inverse = saving_conversions(model)
    found: dict[str, None] = {}
    together: dict[str, tuple[object, list[tuple[str, str, torch.Tensor]]]] = {}
    for name in sorted(fused_names, key=dot_natural_key):
        converter = inverse.converter_of(name)
        if converter is None:
            found[inverse.renamed(name)] = None
            continue
        first, pattern = converter.rename_source_key(name)
        together.setdefault(first, (converter, []))[1].append((name, str(pattern), fused_names[name]))
    for first, (converter, parts) in together.items():
        try:
            made = run_converter(deepcopy(converter), first, parts, model)
        except Exception:  # third-party operations without an inverse: saved as the modules have them
            made = {name: tensor for name, _, tensor in parts}
        found |= dict.fromkeys(map(inverse.renamed, made))
    return found


def plan_tensors(
    files: Collection[str], model: nn.Module, names: Iterable[str], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, TensorPlan]:
    """A plan for each of `names` that the checkpoint holds, directly or through a conversion.

    Args:
        files: names of the checkpoint's tensors.
        model: the model, with its experts unfused.
        names: its state-dict names.
        fused_names: its state dict before experts were unfused, which is what conversion mappings speak of.
    """
    wanted = dict.fromkeys(names)
    plans = {n: TensorPlan(Origin(n, [(n, n)], targets=[n]), n) for n in wanted if n in files}
    origins = _converted(files, conversions_of(model), wanted, fused_names)
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


def _converted(
    files: Iterable[str], mapping: Conversions, wanted: Mapping[str, object], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, Origin]:
    """Origins of all tensors whose checkpoint name differs, by the name that Transformers' mapping gives them."""
    from transformers.core_model_loading import dot_natural_key

    known = {**fused_names, **dict.fromkeys(wanted, torch.empty(0))}
    origins: dict[str, Origin] = {}
    for key in sorted(files, key=dot_natural_key):
        if key in wanted:
            continue
        name, pattern = mapping.loaded(key, known)
        origin = origins.setdefault(name, Origin(name, targets=[name]))
        origin.keys.append((key, pattern or key))
        if pattern is not None and origin.converter is None:
            origin.converter = mapping.by_pattern(pattern)
            first, *others = origin.converter.target_patterns
            for target in others:
                origins[name.replace(first, target)] = origin
                origin.targets.append(name.replace(first, target))
    return origins


def _expert_plan(origin: Origin, fused: str, name: str, piece: ExpertPiece) -> TensorPlan:
    """The plan for one expert's tensor: straight from its own checkpoint tensor where experts are stored one by one."""
    lists = _stacked_lists(origin)
    if lists is None or piece.transposed or piece.interleaved:
        return TensorPlan(origin, fused, piece)
    which = lists[1] if piece.part == "up" else lists[0]
    if piece.part == "all" and len(lists) != 1 or piece.part != "all" and len(lists) != 2 or piece.expert >= len(which):
        return TensorPlan(origin, fused, piece)
    return TensorPlan(Origin(name, [(which[piece.expert],) * 2], targets=[name]), name)


def _stacked_lists(origin: Origin) -> list[list[str]] | None:
    """Checkpoint names per source pattern, when the converter only stacks experts and joins gate with up; else None."""
    if origin.converter is None:
        return None
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in origin.converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    lists = [[key for key, p in origin.keys if p == pattern] for pattern in origin.converter.source_patterns]
    return lists if all(lists) else None
