"""Adapt a packed checkpoint to Transformers: names, unexpected keys, cache scales, saved config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.inference.config import GPTQ_AWQ_KEYS, LayerFormat, is_gptq_or_awq, read_config
from auto_round.inference.qlinear import QuantLinear
from auto_round.logger import logger
from auto_round.modeling.attention import find_attention
from auto_round.modeling.blocks import find_blocks, linear_names
from auto_round.modeling.files.safetensors import StoredTensor, TensorFiles
from auto_round.modeling.tensor_map import DEFAULT_EXPERT_NAMES, Conversions, ExpertLayerNames, conversions_of

_EXPERT = re.compile(r"^(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")
CACHE_SCALE_NAMES = ("k_scale", "q_scale", "v_scale")
_DROPPED_KEYS = (
    *GPTQ_AWQ_KEYS, "damp_percent", "lm_head", "quant_block_list", "to_quant_block_names", "true_sequential",
)  # fmt: skip


@dataclass(frozen=True)
class StoredNames:
    """The tensors of a checkpoint and their names. Build it with `read_names`.

    Attributes:
        tensors: by the name in the model; None when the files cannot be found.
        mapping: Transformers' conversions of the model.
        layers: name in the model -> name in the files of each module where they differ.
        fused_names: names in the model of dense tensors that Transformers fuses, whether or not the model has fused
            experts.
    """

    tensors: dict[str, StoredTensor] | None
    mapping: Conversions = Conversions()
    layers: Mapping[str, str] = field(default_factory=dict)
    fused_names: frozenset[str] = frozenset()

    def config_names(self, layer: str) -> tuple[str, ...]:
        """The names that a quantization_config may use for the module `layer`, the most likely first."""
        names = [self.layers[layer]] if layer in self.layers else []
        expert = _EXPERT.match(layer)
        if expert is None:
            names.append(self._inverse.renamed(f"{layer}.weight").removesuffix(".weight"))
        elif self.tensors is None or expert["experts"] in self._family_experts:
            own = dict(zip(DEFAULT_EXPERT_NAMES, self._family_leaves, strict=True)).get(expert["leaf"], expert["leaf"])
            container = self.layers.get(expert["experts"]) or self._inverse.renamed(expert["experts"])
            names.append(f"{container}.{expert['index']}.{own}")
        return tuple(dict.fromkeys((*names, layer)))

    def expert_names(self, expert: str) -> ExpertLayerNames:
        """The names in the files of the matrices of the module `expert`, such as `model.layers.0.mlp.experts.0`."""
        if self.tensors is None:
            return self._family_leaves
        pairs = zip(self._family_leaves, DEFAULT_EXPERT_NAMES, strict=True)
        return ExpertLayerNames(*(own if f"{expert}.{own}" in self.modules else usual for own, usual in pairs))

    @cached_property
    def modules(self) -> dict[str, dict[str, StoredTensor]]:
        """The tensors of each module that has any in the files, by their names in the module."""
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in (self.tensors or {}).items():
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, {})[leaf] = tensor
        return found

    @cached_property
    def _family_leaves(self) -> ExpertLayerNames:
        return self.mapping.expert_names() or DEFAULT_EXPERT_NAMES

    @cached_property
    def _inverse(self) -> Conversions:
        return self.mapping.inverse()

    @cached_property
    def _family_experts(self) -> set[str]:
        own = set(self._family_leaves) - set(DEFAULT_EXPERT_NAMES)
        matches = map(_EXPERT.match, self.modules)
        return {match["experts"] for match in matches if match is not None and match["leaf"] in own}


def read_names(model: nn.Module, files: Mapping[str, StoredTensor] | None) -> StoredNames:
    """Map `files`, the tensors of a checkpoint by their names there, to the names in `model`.

    Transformers renames what it reads: Mixtral's `block_sparse_moe.experts.0.w1.qweight` becomes
    `mlp.experts.0.w1.qweight`. A quantization_config uses the names in the files.
    """
    if files is None:
        return StoredNames(None, conversions_of(model, legacy=False))
    from transformers.core_model_loading import dot_natural_key

    mapping = conversions_of(model)
    modules = {name for name, _ in model.named_modules()}
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, str] = {}
    fused_names: set[str] = set()
    for key in sorted(files, key=dot_natural_key):
        name = mapping.renamed(key)
        if mapping.prefix is not None and not _names_module(name, modules):
            # The base model's prefix is added or removed if only that names a module.
            front = f"{mapping.prefix}."
            other = name.removeprefix(front) if name.startswith(front) else front + name
            name = other if _names_module(other, modules) else name
        if name != key and _names_module(key, modules) and not _names_module(name, modules):
            name = key  # as Transformers does
        tensors.setdefault(name, files[key])
        if name == key:
            continue
        module, stored = name.rpartition(".")[0], key.rpartition(".")[0]
        layers.setdefault(module, stored)
        expert, stored_expert = _EXPERT.match(module), _EXPERT.match(stored)
        if expert is not None and stored_expert is not None:
            layers.setdefault(expert["experts"], stored_expert["experts"])
        if mapping.converter_of(name) is not None:
            fused_names.add(name)
    return StoredNames(tensors, conversions_of(model, legacy=False), layers, frozenset(fused_names))


def _names_module(tensor: str, modules: set[str]) -> bool:
    expert = _EXPERT.match(tensor)
    return tensor.rpartition(".")[0] in modules or (expert is not None and expert["experts"] in modules)


def checkpoint_tensors(model: Any) -> dict[str, StoredTensor] | None:
    """Names, shapes and dtypes of the checkpoint's tensors, or None when its files cannot be found.

    Transformers does not pass on its list of files, so they are looked up again: in the local folder, or in the Hub's
    cache at the resolved commit.
    """
    config = model.config
    where = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not where:
        return None
    folder = Path(where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        revision = getattr(config, "_commit_hash", None)
        try:
            folder = Path(snapshot_download(str(where), revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    try:
        return TensorFiles.open(folder).tensors
    except ModelError as error:
        logger.debug("checkpoint not inspected: %s", error)
        return None


def ignore_unexpected_keys(model: Any, patterns: Iterable[str]) -> None:
    """Ignore tensors whose names match one of these regular expressions when this model is loaded.

    Transformers adds patterns of its own: to a list in 5.3 to 5.8, in 5.12 and newer to a set, which a model has from
    its construction. The other type raises a TypeError in Transformers.
    """
    key = "_keys_to_ignore_on_load_unexpected"
    before = getattr(model, key, None)
    merged = dict.fromkeys([*(before or ()), *patterns])
    setattr(model, key, set(merged) if isinstance(before, (set, frozenset)) else list(merged))


def register_cache_scales(model: nn.Module, config: Any, files: Mapping[str, StoredTensor] | None) -> int:
    """Register a buffer in the attention modules for every k_scale, v_scale and q_scale in `files`; returns how many.

    Transformers has no cache that uses them; they are only saved again. When the files are not known, scales that
    `config`, the `quantization_config`, announces are ignored.
    """
    found = 0
    for attention in find_attention(model) if files is not None else ():
        device = next((p.device for p in attention.module.parameters()), torch.device("cpu"))
        for leaf in CACHE_SCALE_NAMES:
            stored = (files or {}).get(f"{attention.name}.{leaf}")
            if stored is not None:
                empty = torch.empty(stored.shape, dtype=stored.dtype, device=device)
                attention.module.register_buffer(leaf, empty)
                found += 1
    values = config if isinstance(config, Mapping) else vars(config)
    if files is None and any(values.get(f"static_{what}_dtype") for what in ("kv", "attention")):
        ignore_unexpected_keys(model, [rf"\.{leaf}$" for leaf in CACHE_SCALE_NAMES])
    return found


def normalize_saved_config(model: nn.Module, names: Callable[[], StoredNames]) -> None:
    """Rewrite a `model.config.quantization_config` with GPTQ's or AWQ's keys in place, with AutoRound's keys.

    Transformers saves it with quant_method "auto-round", whose readers only use those. A plain mapping, which did not
    come from Transformers, is not changed. `names` reads the names in the files, which layers get again.
    """
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is None or isinstance(stored, dict):
        return
    if getattr(stored, "backend", None):
        stored.backend = "auto"  # a saved model may be opened on another machine
    if not is_gptq_or_awq(stored):
        return
    default = read_config(stored).default
    blocks = find_blocks(model)
    inside = tuple(f"{block}." for block in blocks)
    extra: dict[str, dict[str, Any]] = {name: {"bits": 16} for name in linear_names(model) if name.startswith(inside)}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            extra.pop(name, None)
            if module.format != default or not name.startswith(inside):
                extra[name] = _layer_entry(module.format)
    for key in _DROPPED_KEYS:
        if hasattr(stored, key):
            delattr(stored, key)
    for key, value in _layer_entry(default).items():
        setattr(stored, key, value)
    stored.block_name_to_quantize = ",".join(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    if extra:
        file_names = names().layers
        stored.extra_config = {file_names.get(name, name): entry for name, entry in extra.items()}


def _layer_entry(fmt: LayerFormat) -> dict[str, Any]:
    """AutoRound's keys for a layer in GPTQ or AWQ layout."""
    scheme = fmt.scheme
    return {
        "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym, "data_type": "int",
        "packing_format": fmt.packing_format,
    }  # fmt: skip
