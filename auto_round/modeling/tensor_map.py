"""Map model tensors to checkpoint tensors (`TensorPlan`), and model names to checkpoint names (`CheckpointNames`).

A checkpoint and the modules that read it may name the same tensor differently, split or join matrices, and store the
experts of a block one by one or stacked. Transformers publishes these differences per model class
(`transformers.conversion_mapping`); nothing about a family is repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.experts import DEFAULT_EXPERT_NAMES, ExpertLayerNames, ExpertPiece, LinearExperts
from auto_round.modeling.files.safetensors import TensorFiles

if TYPE_CHECKING:
    from auto_round.modeling.source import ModelSource

_EXPERT_LEAF = re.compile(r"\.experts\.\*\.(?P<leaf>\w+)\.weight$")
_NUMBERED = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Conversions:
    """Transformers' mapping from the names in a checkpoint to those in a model. Built by `conversions_of`.

    Its entries may keep state while they rename, so every pass over a file needs new ones.
    """

    renamings: tuple[Any, ...] = ()  # `WeightRenaming` in order
    converters: tuple[Any, ...] = ()  # `WeightConverter` in order
    prefix: str | None = None  # the base model's attribute name (`model`), which files saved without a head lack

    @classmethod
    def of(cls, entries: Iterable[Any], prefix: str | None = None) -> Conversions:
        """The mapping with Transformers' `entries` of both kinds, in order."""
        kinds: tuple[list[Any], list[Any]] = [], []
        for entry in entries:
            kinds[hasattr(entry, "operations")].append(entry)
        return cls(tuple(kinds[0]), tuple(kinds[1]), prefix)

    def renamed(self, key: str) -> str:
        """`key` after the renamings, without converters."""
        for renaming in self.renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def converter_of(self, name: str) -> Any:
        """The converter of a tensor of this name (after the renamings), or None."""
        return next((c for c in self.converters if c.rename_source_key(name)[1] is not None), None)

    def expert_names(self) -> ExpertLayerNames | None:
        """Checkpoint names of the matrices of experts that are stored one by one; None if they are stacked."""
        found: dict[str, str] = {}
        for converter in self.converters:
            leaves = [match["leaf"] for p in converter.source_patterns if (match := _EXPERT_LEAF.search(p))]
            target = re.split(r"[.\\]", converter.target_patterns[0])[-1]
            if len(leaves) == 2 and target == "gate_up_proj":
                found["gate"], found["up"] = leaves
            elif len(leaves) == 1 and target in ("up_proj", "down_proj"):
                found[target.removesuffix("_proj")] = leaves[0]
        if not {"up", "down"} <= set(found):
            return None
        return ExpertLayerNames(found.get("gate", DEFAULT_EXPERT_NAMES.gate), found["up"], found["down"])

    def inverse(self) -> Conversions:
        """The mapping from the model's names to the checkpoint's, without conversions that have no inverse."""
        reversed_entries: list[Any] = []
        for entry in reversed((*self.renamings, *self.converters)):
            # Transformers has no common way to say so: operations without an inverse raise any of these.
            with suppress(AttributeError, NotImplementedError, ValueError):
                reversed_entries.append(entry.reverse_transform())
        return Conversions.of(reversed_entries, self.prefix)


def conversions_of(model: nn.Module, *, legacy: bool = True) -> Conversions:
    """The mapping that Transformers applies when it loads this model; empty for other models.

    `legacy`: with names of very old checkpoints (`LayerNorm.gamma`), which are never written.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return Conversions()
    from transformers.conversion_mapping import get_model_conversion_mapping

    entries = get_model_conversion_mapping(model, add_legacy=legacy)
    return Conversions.of(entries, getattr(model, "base_model_prefix", "") or None)


@dataclass(eq=False)
class Origin:
    """Checkpoint tensors that are read together and give one or more model tensors."""

    name: str  # the first model tensor that they give
    keys: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint name, source pattern), for the converter
    converter: Any = None  # Transformers' WeightConverter, or None when the tensor is used as stored

    @property
    def stored(self) -> tuple[str, ...]:
        """The checkpoint names."""
        return tuple(key for key, _ in self.keys)


def run_converter(
    converter: Any, name: str, tensors: Iterable[tuple[str, str, torch.Tensor]], model: nn.Module
) -> dict[str, torch.Tensor]:
    """The tensors that a WeightConverter makes, by name; raises whatever a third-party operation raises.

    `name`: the first tensor that it gives; `tensors`: (name, source pattern, tensor) of its inputs, in order.
    """
    for key, pattern, tensor in tensors:
        converter.add_tensor(name, key, pattern, tensor)
    made = converter.convert(name, model=model, config=getattr(model, "config", None))
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


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
    """As `plan_tensors`, a plan for each tensor of the checkpoint that Transformers would save of a model object."""
    from transformers.core_model_loading import dot_natural_key

    entries = getattr(model, "_weight_conversions", None)  # by which it was loaded
    if entries is None:  # built from a configuration: there is no prefix of a base model to restore
        fresh = conversions_of(model, legacy=False)
        entries = [e for e in (*fresh.renamings, *fresh.converters) if type(e).__name__ != "PrefixChange"]
    inverse = Conversions.of(entries).inverse()
    saved: dict[str, None] = {}
    groups: dict[str, tuple[object, list[tuple[str, str, torch.Tensor]]]] = {}
    for name in sorted(fused_names, key=dot_natural_key):
        converter = inverse.converter_of(name)
        if converter is None:
            saved[inverse.renamed(name)] = None
            continue
        first, pattern = converter.rename_source_key(name)
        groups.setdefault(first, (converter, []))[1].append((name, str(pattern), fused_names[name]))
    for first, (converter, parts) in groups.items():
        try:
            made = run_converter(deepcopy(converter), first, parts, model)
        except Exception:  # no inverse operation: saved under the names of the modules
            made = {name: tensor for name, _, tensor in parts}
        saved |= dict.fromkeys(map(inverse.renamed, made))
    plans = plan_tensors(saved, model, names, fused_names)
    return {name: plans.get(name) or TensorPlan.direct(name) for name in names}


def plan_tensors(
    files: Collection[str], model: nn.Module, names: Iterable[str], fused_names: Mapping[str, torch.Tensor]
) -> dict[str, TensorPlan]:
    """A plan for each of `names` that the checkpoint contains, directly or through a conversion.

    Args:
        files: names of the checkpoint's tensors.
        model, names: the model with its experts unfused, and its state-dict names.
        fused_names: its state dict before experts were unfused, to which conversion mappings refer.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    wanted, mapping = dict.fromkeys(names), conversions_of(model)
    known = {**fused_names, **dict.fromkeys(wanted, torch.empty(0))}
    plans = {name: TensorPlan.direct(name) for name in wanted if name in files}
    origins: dict[str, Origin] = {}  # of tensors with another name in the checkpoint, by their name after the mapping
    for key in sorted(files, key=dot_natural_key):
        if key in wanted:
            continue
        # The prefix of the base model is added or dropped to match a known name. A conversion to an unknown name is not
        # applied, as in Transformers.
        name, pattern = rename_source_key(key, list(mapping.renamings), list(mapping.converters), mapping.prefix, known)
        if name not in known:
            plain, _ = rename_source_key(key, [], [], mapping.prefix, known)
            name, pattern = (plain, None) if plain in known else (name, pattern)
        origin = origins.setdefault(name, Origin(name))
        origin.keys.append((key, pattern or key))
        if pattern is not None and origin.converter is None:
            origin.converter = next(c for c in mapping.converters if pattern in c.source_patterns)
            first, *others = origin.converter.target_patterns
            origins |= {name.replace(first, target): origin for target in others}
    plans |= {name: TensorPlan(origins[name], name) for name in wanted if name not in plans and name in origins}
    for prefix, experts in model.named_modules():
        for leaf, piece in experts.pieces().items() if isinstance(experts, LinearExperts) else ():
            name, fused = f"{prefix}.{leaf}", f"{prefix}.{piece.param}"
            if name in wanted and name not in plans and fused in origins:
                plans[name] = _expert_plan(origins[fused], fused, name, piece)
    return plans


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
    """Checkpoint names of the modules and tensors of a source, by which serving engines look them up."""

    def __init__(self, source: ModelSource) -> None:
        self._own: dict[str, str] = {}
        self._containers: dict[str, str] = {}
        tied = {name for pair in source.tied().items() for name in pair}
        for tensor in source.tensor_names():
            # A block used twice, or a tied head, is looked up by its own name at each position.
            plan = source.own_plan(tensor)
            if plan is None or plan.key is None or (tensor in tied and plan.origin.name != tensor):
                continue
            owner, _, leaf = tensor.rpartition(".")
            stored, _, stored_leaf = plan.key.rpartition(".")
            if stored_leaf == leaf:
                self._own.setdefault(owner, stored)
            elif leaf == "weight" and stored_leaf == owner.rpartition(".")[2]:
                self._own.setdefault(owner, plan.key)  # the weight of a module that is a parameter in the checkpoint
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
        self._mapping = conversions_of(source.model)

    def module(self, name: str) -> str:
        """The checkpoint's name of a module; derived from the enclosing modules if it has no tensors there."""
        if name in self._own:
            return self._own[name]
        parent = name
        while parent and parent not in self._containers:
            parent = parent.rpartition(".")[0]
        return self._containers.get(parent, parent) + name[len(parent) :]

    def packed_layer(self, name: str, leaves: Iterable[str], *, loadable_here: bool) -> str:
        """The name under which the packed tensors `leaves` ("qweight", "scales", ...) of a linear layer are stored.

        With `loadable_here` Transformers opens the files. If it would rename or join the tensors, the matrices of an
        expert keep the names of the modules, so that this package's loader finds them.
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
        """Whether Transformers loads the stored tensor `key` as the model's `tensor`."""
        wanted, mapping = {tensor}, self._mapping
        layer, _, leaf = tensor.rpartition(".")
        expert, _, matrix = layer.rpartition(".")
        if matrix in DEFAULT_EXPERT_NAMES and expert.rpartition(".")[0] in self._experts:
            wanted.add(f"{expert}.{key.split('.')[-2]}.{leaf}")  # the checkpoint's matrix name
        if key in wanted:
            return True
        renamed = mapping.renamed(key)
        if mapping.converter_of(renamed) is not None:
            return False
        prefix = f"{mapping.prefix}." if mapping.prefix else ""
        return bool(wanted & {renamed, prefix + renamed, renamed.removeprefix(prefix)})

    def experts_of(self, name: str) -> str | None:
        """The experts module that contains a tensor or layer; None if there is none."""
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((parent for parent in parents if parent in self._experts), None)
