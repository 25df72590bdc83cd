"""The tensors of a checkpoint under the names of the modules that will hold them, and what the files call a layer.

Transformers renames what it reads by its conversion mapping: Mixtral's `block_sparse_moe.experts.0.w1.qweight` goes to
`mlp.experts.0.w1.qweight`. A quantization_config speaks of the names in the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from auto_round.errors import ModelError
from auto_round.logger import logger
from auto_round.modeling.conversions import USUAL_LEAVES, Conversions, ExpertLeaves, conversions_of
from auto_round.modeling.tensor_files import StoredTensor, TensorFiles

_EXPERT = re.compile(r"^(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")


@dataclass(frozen=True)
class StoredNames:
    """What the files of a model hold. Build it with `read_names`.

    Attributes:
        tensors: by the name in the model; None where the files cannot be found.
        mapping: Transformers' conversions of the model.
        layers: what the files call a module, by its name in the model, where that differs.
        joined: names in the model of dense tensors that Transformers makes one of, whatever module waits for them.
    """

    tensors: dict[str, StoredTensor] | None
    mapping: Conversions = Conversions()
    layers: Mapping[str, str] = field(default_factory=dict)
    joined: frozenset[str] = frozenset()

    def config_names(self, layer: str) -> tuple[str, ...]:
        """The names under which a quantization_config may speak of the module `layer`, the likeliest first."""
        names = [self.layers[layer]] if layer in self.layers else []
        expert = _EXPERT.match(layer)
        if expert is None:
            names.append(self._inverse.renamed(f"{layer}.weight").removesuffix(".weight"))
        elif self._in_family_words(expert["experts"]):
            own = dict(zip(USUAL_LEAVES, self._family_leaves, strict=True)).get(expert["leaf"], expert["leaf"])
            container = self.layers.get(expert["experts"]) or self._inverse.renamed(expert["experts"])
            names.append(f"{container}.{expert['index']}.{own}")
        return tuple(dict.fromkeys((*names, layer)))

    def expert_leaves(self, expert: str) -> ExpertLeaves:
        """How the files call the matrices of the module `expert`, such as `model.layers.0.mlp.experts.0`."""
        if self.tensors is None:
            return self._family_leaves
        pairs = zip(self._family_leaves, USUAL_LEAVES, strict=True)
        return ExpertLeaves(*(own if f"{expert}.{own}" in self.owners else usual for own, usual in pairs))

    @cached_property
    def owners(self) -> set[str]:
        """Names in the model of the modules that the files have tensors for."""
        return {name.rpartition(".")[0] for name in self.tensors or ()}

    @cached_property
    def _family_leaves(self) -> ExpertLeaves:
        return self.mapping.expert_leaves() or USUAL_LEAVES

    @cached_property
    def _inverse(self) -> Conversions:
        return self.mapping.inverse()

    @cached_property
    def _family_experts(self) -> set[str]:
        own = set(self._family_leaves) - set(USUAL_LEAVES)
        matches = map(_EXPERT.match, self.owners)
        return {match["experts"] for match in matches if match is not None and match["leaf"] in own}

    def _in_family_words(self, experts: str) -> bool:
        return self.tensors is None or experts in self._family_experts


def read_names(model: nn.Module, files: Mapping[str, StoredTensor] | None) -> StoredNames:
    """`files`, the tensors of a checkpoint by their names there, for `model`, whose experts may be fused or not."""
    if files is None:
        return StoredNames(None, conversions_of(model, legacy=False))
    from transformers.core_model_loading import dot_natural_key

    mapping = conversions_of(model)
    modules = {name for name, _ in model.named_modules()}
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, str] = {}
    joined: set[str] = set()
    for key in sorted(files, key=dot_natural_key):
        name = _placed(mapping.renamed(key), mapping.prefix, modules)
        if name != key and _has_place(key, modules) and not _has_place(name, modules):
            name = key  # as Transformers does
        tensors.setdefault(name, files[key])
        if name != key:
            _note_layer(layers, name.rpartition(".")[0], key.rpartition(".")[0])
            if mapping.converter_of(name) is not None:
                joined.add(name)
    return StoredNames(tensors, conversions_of(model, legacy=False), layers, frozenset(joined))


def _placed(name: str, prefix: str | None, modules: set[str]) -> str:
    """`name` with the base model's prefix, or without it, where only that leads to a module."""
    if prefix is None or _has_place(name, modules):
        return name
    other = name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
    return other if _has_place(other, modules) else name


def _note_layer(layers: dict[str, str], module: str, stored: str) -> None:
    """Note what the files call a module, and the experts that it is one of."""
    layers.setdefault(module, stored)
    inside, there = _EXPERT.match(module), _EXPERT.match(stored)
    if inside is not None and there is not None:
        layers.setdefault(inside["experts"], there["experts"])


def _has_place(tensor: str, modules: set[str]) -> bool:
    expert = _EXPERT.match(tensor)
    return tensor.rpartition(".")[0] in modules or (expert is not None and expert["experts"] in modules)


def checkpoint_tensors(model: Any) -> dict[str, StoredTensor] | None:
    """Names, shapes and dtypes of the checkpoint's tensors, or None where its files cannot be found.

    Transformers does not hand its list of files on, so they are looked up again: a local folder, or the Hub's cache at
    the commit that was resolved. They only serve to check the config and to pick dtypes.
    """
    config = model.config
    where = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not where:
        return None
    folder: Path | None = Path(where)
    if not Path(where).is_dir():
        folder = _cached_folder(str(where), getattr(config, "_commit_hash", None))
    if folder is None:
        return None
    try:
        return TensorFiles.open(folder).tensors
    except ModelError as error:
        logger.debug("checkpoint not inspected: %s", error)
        return None


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("model.safetensors", "model.safetensors.index.json"):
        try:
            found = try_to_load_from_cache(repo, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None
