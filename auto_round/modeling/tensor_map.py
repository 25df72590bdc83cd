"""Map model tensors to checkpoint tensors (`TensorPlan`), and model names to checkpoint names.

Transformers' conversion mapping (`modeling.conversions`) is applied to names once, when a checkpoint is opened, and to
data tensor by tensor, when it is read.

Serving engines look up tensors, and the entries of a quantization_config, by the names of the family's checkpoints.
`CheckpointNames` inverts how a source was read: a packed tensor of a layer whose weight came from
`block_sparse_moe.experts.0.w1.weight` is `block_sparse_moe.experts.0.w1.qweight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.conversions import (
    DEFAULT_EXPERT_NAMES,
    Conversions,
    Origin,
    conversions_of,
    run_converter,
    saving_conversions,
)
from auto_round.modeling.expert_layouts import ExpertPiece
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.source import ModelSource

_NUMBERED = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorPlan:
    """How to build one model tensor: its origin, its name there, and the expert to cut out of it, if any."""

    origin: Origin
    name: str
    piece: ExpertPiece | None = None

    @classmethod
    def direct(cls, name: str, key: str | None = None) -> TensorPlan:
        """The plan of a tensor that is stored exactly as the model tensor, under `key` (default: the same name)."""
        return cls(Origin(name, [(key or name, key or name)]), name)

    @property
    def key(self) -> str | None:
        """The checkpoint tensor that is stored exactly as this model tensor; None when it is converted or cut."""
        plain = self.origin.converter is None and self.piece is None
        return self.origin.keys[0][0] if plain else None


def read_origin(origin: Origin, files: TensorFiles, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read model tensors by name, in the checkpoint's dtype. Raises ModelError when a conversion fails."""
    if origin.converter is None:
        return {origin.name: files.read(origin.keys[0][0])}
    tensors = ((key, pattern, files.read(key)) for key, pattern in origin.keys)
    try:
        return run_converter(deepcopy(origin.converter), origin.name, tensors, model)
    except ModelError:
        raise
    except Exception as error:  # third-party operations raise anything on unusual shapes
        names = ", ".join(origin.stored[:3])
        raise ModelError(f"cannot build tensor {origin.name!r} from {names} of {files.folder}: {error}") from error


def plan_saved(
    model: nn.Module, names: Collection[str], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, TensorPlan]:
    """A plan for each tensor of a model object, as for the checkpoint that Transformers would save of it.

    Args:
        model: with its experts unfused.
        names: its state-dict names.
        fused_names: its state dict before experts were unfused, on meta.
    """
    plans = plan_tensors(_saved_names(model, fused_names), model, names, fused_names)
    return {name: plans.get(name) or TensorPlan.direct(name) for name in names}


def _saved_names(model: nn.Module, fused_names: Mapping[str, torch.Tensor]) -> dict[str, None]:
    """Names of the tensors that `save_pretrained` would write."""
    from transformers.core_model_loading import dot_natural_key

    inverse = saving_conversions(model)
    found: dict[str, None] = {}
    groups: dict[str, tuple[object, list[tuple[str, str, torch.Tensor]]]] = {}
    for name in sorted(fused_names, key=dot_natural_key):
        converter = inverse.converter_of(name)
        if converter is None:
            found[inverse.renamed(name)] = None
            continue
        first, pattern = converter.rename_source_key(name)
        groups.setdefault(first, (converter, []))[1].append((name, str(pattern), fused_names[name]))
    for first, (converter, parts) in groups.items():
        try:
            made = run_converter(deepcopy(converter), first, parts, model)
        except Exception:  # no inverse operation: saved under the names of the modules
            made = {name: tensor for name, _, tensor in parts}
        found |= dict.fromkeys(map(inverse.renamed, made))
    return found


def plan_tensors(
    files: Collection[str], model: nn.Module, names: Iterable[str], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, TensorPlan]:
    """A plan for each of `names` that the checkpoint contains, directly or through a conversion.

    Args:
        files: names of the checkpoint's tensors.
        model: the model, with its experts unfused.
        names: its state-dict names.
        fused_names: its state dict before experts were unfused, to which conversion mappings refer.
    """
    wanted = dict.fromkeys(names)
    plans = {name: TensorPlan.direct(name) for name in wanted if name in files}
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
    """Origins of all tensors with another name in the checkpoint, by their name after Transformers' mapping."""
    from transformers.core_model_loading import dot_natural_key

    known = {**fused_names, **dict.fromkeys(wanted, torch.empty(0))}
    origins: dict[str, Origin] = {}
    for key in sorted(files, key=dot_natural_key):
        if key in wanted:
            continue
        name, pattern, converter = mapping.loaded(key, known)
        origin = origins.setdefault(name, Origin(name))
        origin.keys.append((key, pattern or key))
        if converter is not None and origin.converter is None:
            origin.converter = converter
            first, *others = converter.target_patterns
            origins |= {name.replace(first, target): origin for target in others}
    return origins


def _expert_plan(origin: Origin, fused: str, name: str, piece: ExpertPiece) -> TensorPlan:
    """The plan of one expert's tensor: its own checkpoint tensor if experts are stored one by one, else a cut."""
    converter = origin.converter
    steps = [] if converter is None else [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    # The converter only stacks experts, and joins gate with up.
    stacks = steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    if stacks and not piece.transposed and not piece.interleaved:
        lists = [[key for key, p in origin.keys if p == pattern] for pattern in converter.source_patterns]
        if all(lists) and len(lists) == (1 if piece.part == "all" else 2):
            keys = lists[piece.part == "up"]
            if piece.expert < len(keys):
                return TensorPlan.direct(name, keys[piece.expert])
    return TensorPlan(origin, fused, piece)


class CheckpointNames:
    """Checkpoint names of the modules and tensors of a source, by their names in the model."""

    def __init__(self, source: ModelSource) -> None:
        self._own: dict[str, str] = {}
        self._containers: dict[str, str] = {}
        tied = {name for pair in source.tied().items() for name in pair}
        for tensor in source.tensor_names():
            # A block used twice, or a tied head, is looked up by its own name at each position.
            plan = source.own_plan(tensor)
            key = None if plan is None or (tensor in tied and plan.origin.name != tensor) else plan.key
            owner, _, leaf = tensor.rpartition(".")
            if key is None:
                continue
            stored, _, stored_leaf = key.rpartition(".")
            if stored_leaf == leaf:
                self._own.setdefault(owner, stored)
            elif leaf == "weight" and stored_leaf == owner.rpartition(".")[2]:
                self._own.setdefault(owner, key)  # the weight of a module that is a parameter in the checkpoint
        for module, stored in self._own.items():
            # The modules around a module are called alike as far as both names have equal ends.
            while True:
                module, _, leaf = module.rpartition(".")
                stored, _, stored_leaf = stored.rpartition(".")
                if leaf != stored_leaf or not module or not stored:
                    break
                if self._containers.setdefault(module, stored) != stored:
                    break
        self._experts = {n for n, m in source.model.named_modules() if isinstance(m, LinearExperts)}
        self._model = source.model

    @cached_property
    def _mapping(self) -> Conversions:
        return conversions_of(self._model)

    def module(self, name: str) -> str:
        """The checkpoint's name of a module; derived from the enclosing modules if it has no tensors there."""
        if name in self._own:
            return self._own[name]
        parent, rest = name, ""
        while parent:
            if parent in self._containers:
                return self._containers[parent] + rest
            parent, _, leaf = parent.rpartition(".")
            rest = f".{leaf}{rest}"
        return name

    def packed_layer(self, name: str, leaves: Iterable[str], *, loadable_here: bool) -> str:
        """The name under which the packed tensors of a linear layer are stored.

        Args:
            name: of the layer in the model.
            leaves: of its tensors: "qweight", "scales", ...
            loadable_here: Transformers opens the files with this package's loader, which must find the tensors again.
                So if Transformers would rename or join them, the matrices of an expert keep the names of the modules.
        """
        candidates = self._candidates(name)
        if not loadable_here:
            return candidates[0]
        fitting = (c for c in candidates if all(self.loads(f"{c}.{leaf}", f"{name}.{leaf}") for leaf in leaves))
        return next(fitting, name)

    def _candidates(self, layer: str) -> tuple[str, str]:
        """The checkpoint's name of a layer, and that of its parent with the layer's own last name part."""
        parent, _, last = layer.rpartition(".")
        return self.module(layer), f"{self.module(parent)}.{last}"

    def would_be_fused(self, name: str, leaves: Iterable[str]) -> bool:
        """Whether Transformers would join a packed layer's tensors with others under their checkpoint name."""
        stored, mapping = self.module(name), self._mapping
        return stored != name and any(mapping.converter_of(mapping.renamed(f"{stored}.{leaf}")) for leaf in leaves)

    def unfused_name(self, tensor: str) -> str:
        """The name of an unquantized tensor of a packed layer under which Transformers does not join it with others."""
        owner, _, leaf = tensor.rpartition(".")
        candidates = (f"{candidate}.{leaf}" for candidate in self._candidates(owner))
        return next((name for name in candidates if self.loads(name, tensor)), tensor)

    def block(self, name: str) -> tuple[str, ...]:
        """The checkpoint's names of a decoder block: several if its layers are in more than one item of a list."""
        inside = [stored for module, stored in self._own.items() if module.startswith(f"{name}.") or module == name]
        whole = self._containers.get(name)
        if whole is not None and all(f"{stored}.".startswith(f"{whole}.") for stored in inside):
            return (whole,)
        found = dict.fromkeys(match[0] for stored in inside if (match := _NUMBERED.match(stored)))
        return tuple(found) or (self.module(name),)

    def loads(self, key: str, tensor: str) -> bool:
        """Whether Transformers loads a stored tensor as the model's tensor of that name.

        An expert's tensor may have the checkpoint's matrix names.
        """
        wanted = {tensor}
        layer, _, leaf = tensor.rpartition(".")
        expert, _, matrix = layer.rpartition(".")
        if matrix in DEFAULT_EXPERT_NAMES and expert.rpartition(".")[0] in self._experts:
            wanted.add(f"{expert}.{key.split('.')[-2]}.{leaf}")
        if key in wanted:
            return True
        mapping = self._mapping
        renamed = mapping.renamed(key)
        if mapping.converter_of(renamed) is not None:
            return False
        prefix = f"{mapping.prefix}." if mapping.prefix else ""
        return bool(wanted & {renamed, prefix + renamed, renamed.removeprefix(prefix)})

    def experts_of(self, name: str) -> str | None:
        """The experts module that contains a tensor or layer; None if there is none."""
        while name:
            name = name.rpartition(".")[0]
            if name in self._experts:
                return name
        return None
