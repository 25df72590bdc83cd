"""What a model's own checkpoint calls its modules, also those that the checkpoint does not hold as they are.

Serving engines look tensors, and the entries of a quantization_config, up by the names of the family's checkpoints. The
names of a source are the inverse of how it was read, taken from the tensors that were; a packed tensor of a layer whose
weight came from `block_sparse_moe.experts.0.w1.weight` is `block_sparse_moe.experts.0.w1.qweight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from auto_round.modeling.conversions import USUAL_LEAVES, Conversions, conversions_of
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.source import ModelSource

_NUMBERED = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


class CheckpointNames:
    """Names of modules and tensors in the checkpoint of a source, by their names in its model."""

    def __init__(self, source: ModelSource) -> None:
        self._own: dict[str, str] = {}
        self._containers: dict[str, str] = {}
        tied = {name for pair in source.tied().items() for name in pair}
        for tensor in source.tensor_names():
            # A block used twice, or a tied head, has its own name at each place: readers look it up by that.
            plan = source.own_plan(tensor)
            key = None if plan is None or (tensor in tied and plan.origin.name != tensor) else plan.key
            owner, _, leaf = tensor.rpartition(".")
            if key is None:
                continue
            if key.rpartition(".")[2] == leaf:
                self._own.setdefault(owner, key.rpartition(".")[0])
            elif leaf == "weight" and key.rpartition(".")[2] == owner.rpartition(".")[2]:
                self._own.setdefault(owner, key)  # a matrix stored as the parameter of what is a module here
        for module, stored in self._own.items():
            self._add_containers(module, stored)
        self._experts = {n: m for n, m in source.model.named_modules() if isinstance(m, LinearExperts)}
        self._source = source
        self._mapping: Conversions | None = None

    def _add_containers(self, module: str, stored: str) -> None:
        """Note how the modules around `module` are called, as far as both names end alike."""
        while True:
            module, _, leaf = module.rpartition(".")
            stored, _, stored_leaf = stored.rpartition(".")
            if leaf != stored_leaf or not module or not stored:
                return
            if self._containers.setdefault(module, stored) != stored:
                return

    def module(self, name: str) -> str:
        """The checkpoint's name of a module; of one that it has no tensors of, as its neighbours are called."""
        if name in self._own:
            return self._own[name]
        parent, rest = name, ""
        while parent:
            if parent in self._containers:
                return self._containers[parent] + rest
            parent, _, leaf = parent.rpartition(".")
            rest = f".{leaf}{rest}"
        return name

    def packed_layer(self, name: str, leaves: Iterable[str], *, loads_here: bool) -> str:
        """The name under which the packed tensors of a linear layer are stored.

        Args:
            name: of the layer in the model.
            leaves: of its tensors: "qweight", "scales", ...
            loads_here: Transformers opens the files with this package's loader. It must find the tensors again: where
                it would rename or join them otherwise, an expert's matrices keep the names that the modules have.
        """
        candidates = self._candidates(name)
        if not loads_here:
            return candidates[0]
        fitting = (c for c in candidates if all(self.loads(f"{c}.{leaf}", f"{name}.{leaf}") for leaf in leaves))
        return next(fitting, name)

    def _candidates(self, layer: str) -> tuple[str, str]:
        """The checkpoint's name of a layer, and that of what holds it with the layer's own last part."""
        parent, _, last = layer.rpartition(".")
        return self.module(layer), f"{self.module(parent)}.{last}"

    def joined(self, name: str, leaves: Iterable[str]) -> bool:
        """Whether Transformers would join a packed layer's tensors with others under the checkpoint's name of it."""
        stored = self.module(name)
        mapping = self._conversions()
        return stored != name and any(mapping.converter_of(mapping.renamed(f"{stored}.{leaf}")) for leaf in leaves)

    def loose(self, tensor: str) -> str:
        """The name of a dense tensor whose siblings are packed: Transformers must not join it with them."""
        owner, _, leaf = tensor.rpartition(".")
        candidates = (f"{candidate}.{leaf}" for candidate in self._candidates(owner))
        return next((name for name in candidates if self.loads(name, tensor)), tensor)

    def block(self, name: str) -> tuple[str, ...]:
        """The checkpoint's names of a decoder block: several where its layers lie in more than one item of a list."""
        inside = [stored for module, stored in self._own.items() if module.startswith(f"{name}.") or module == name]
        whole = self._containers.get(name)
        if whole is not None and all(f"{stored}.".startswith(f"{whole}.") for stored in inside):
            return (whole,)
        found = dict.fromkeys(match[0] for stored in inside if (match := _NUMBERED.match(stored)))
        return tuple(found) or (self.module(name),)

    def loads(self, key: str, tensor: str) -> bool:
        """Whether Transformers gives a stored tensor to the model's tensor of that name (an expert's may have the names
        that the checkpoint has for its matrices)."""
        wanted = {tensor, self._own_leaf(key, tensor)}
        if key in wanted:
            return True
        mapping = self._conversions()
        renamed = mapping.renamed(key)
        if mapping.converter_of(renamed) is not None:
            return False
        prefix = f"{mapping.prefix}." if mapping.prefix else ""
        return bool(wanted & {renamed, prefix + renamed, renamed.removeprefix(prefix)})

    def experts_of(self, name: str) -> str | None:
        """The module of experts that a tensor or layer of one expert lies in; None for others."""
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in self._experts:
                return parent
        return None

    def _own_leaf(self, key: str, tensor: str) -> str:
        layer, _, leaf = tensor.rpartition(".")
        expert, _, matrix = layer.rpartition(".")
        if matrix not in USUAL_LEAVES or expert.rpartition(".")[0] not in self._experts:
            return tensor
        return f"{expert}.{key.split('.')[-2]}.{leaf}"

    def _conversions(self) -> Conversions:
        if self._mapping is None:
            self._mapping = conversions_of(self._source.model)
        return self._mapping
