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
from auto_round.export.expert_names import EXPERT_NAMES, packed_rules
from auto_round.logger import logger
from auto_round.modeling.experts import USUAL_LEAVES, W123_LEAVES, ExpertLeaves
from auto_round.modeling.tensor_files import StoredTensor, TensorFiles

_EXPERT = re.compile(r"^(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")


@dataclass(frozen=True)
class StoredNames:
    """What the files of a model hold. Build it with `read_names`.

    Attributes:
        tensors: by the name in the model; None where the files cannot be found.
        layers: what the files call a module, by its name in the model, where that differs.
        joined: names in the model of dense tensors that Transformers makes one of, whatever module waits for them.
        model_type: of the model's config.
    """

    tensors: dict[str, StoredTensor] | None
    model_type: str = ""
    layers: Mapping[str, str] = field(default_factory=dict)
    joined: frozenset[str] = frozenset()

    def config_names(self, layer: str) -> tuple[str, ...]:
        """The names under which a quantization_config may speak of the module `layer`, the likeliest first."""
        names = [self.layers[layer]] if layer in self.layers else []
        family = packed_rules(self.model_type)
        expert = _EXPERT.match(layer)
        if expert is None:
            names.append(family.module_name(layer))
        elif self._in_family_words(expert["experts"]):
            usual = dict(zip(W123_LEAVES, USUAL_LEAVES, strict=True)).get(expert["leaf"], expert["leaf"])
            names.append(family.module_name(f"{expert['experts']}.{expert['index']}.{usual}"))
        return tuple(dict.fromkeys((*names, layer)))

    def expert_leaves(self, expert: str) -> ExpertLeaves:
        """How the files call the matrices of the module `expert`, such as `model.layers.0.mlp.experts.0`."""
        if self.tensors is None:
            return W123_LEAVES if self.model_type in EXPERT_NAMES else USUAL_LEAVES
        pairs = zip(W123_LEAVES, USUAL_LEAVES, strict=True)
        return ExpertLeaves(*(own if f"{expert}.{own}" in self.owners else usual for own, usual in pairs))

    @cached_property
    def owners(self) -> set[str]:
        """Names in the model of the modules that the files have tensors for."""
        return {name.rpartition(".")[0] for name in self.tensors or ()}

    @cached_property
    def _family_experts(self) -> set[str]:
        matches = map(_EXPERT.match, self.owners)
        return {match["experts"] for match in matches if match is not None and match["leaf"] in W123_LEAVES}

    def _in_family_words(self, experts: str) -> bool:
        return self.tensors is None or experts in self._family_experts


def read_names(model: nn.Module, files: Mapping[str, StoredTensor] | None) -> StoredNames:
    """`files`, the tensors of a checkpoint by their names there, for `model`, whose experts may be fused or not."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", "") or "")
    if files is None:
        return StoredNames(None, model_type)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    whole: Any = model
    mapping = get_model_conversion_mapping(whole)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    modules = {name for name, _ in model.named_modules()}
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, str] = {}
    joined: set[str] = set()
    for key in sorted(files, key=dot_natural_key):
        name, _ = rename_source_key(key, renamings, [])
        if name != key and _has_place(key, modules) and not _has_place(name, modules):
            name = key  # as Transformers does
        tensors.setdefault(name, files[key])
        if name != key:
            layers.setdefault(name.rpartition(".")[0], key.rpartition(".")[0])
            if rename_source_key(name, [], converters)[1] is not None:
                joined.add(name)
    return StoredNames(tensors, model_type, layers, frozenset(joined))


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
