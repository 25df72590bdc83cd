"""A checkpoint as a source of tensors without its model class: config.json and safetensors headers are enough."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

import torch

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.build import config_dtype, dominant_dtype
from auto_round.modeling.checkpoint_map import Origin, TensorPlan
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.modeling.config_checks import check_sizes
from auto_round.modeling.experts import LinearExperts, unfuse_experts
from auto_round.modeling.family_facts import UNREAD_EVERYWHERE, FamilyFacts, family_facts
from auto_round.modeling.quantized_inputs import check_readable, dense_view, drop_quantization, quantization_of
from auto_round.modeling.raw_config import RawConfig, read_config
from auto_round.modeling.skeleton import Skeleton, build_skeleton, experts_listed_apart, skeleton_blocks
from auto_round.modeling.source import resolve_dtype, state_names
from auto_round.modeling.tensor_files import TensorFiles


class SkeletonSource(CheckpointSource):
    """A checkpoint understood from names, shapes and configuration. Its `model` is a tree that cannot run.

    Args:
        folder: holds config.json; the weights too, unless `files` is given.
        dtype: as for `CheckpointSource`.
        name_or_path: what the user gave, for messages.
        files: the opened weights, where they lie elsewhere.

    Raises:
        ModelError: files are missing or damaged, or hold no decoder.
        UnsupportedError: the family's files cannot be read by their names, or are quantized in a way that is not read.
    """

    model: Skeleton

    def __init__(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None,
        name_or_path: str | None = None, files: TensorFiles | None = None,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.name_or_path = name_or_path or str(folder)
        self._trusted = False
        asked = resolve_dtype(dtype)
        self.config: RawConfig = read_config(self.folder)
        self.facts = _facts(self.config, self.name_or_path)
        declared = quantization_of(self.config)
        check_readable(declared, self.name_or_path)
        stored = TensorFiles.open(self.folder) if files is None else files
        check_sizes(self.folder / "config.json", self.config, len(stored.tensors))
        dense = dense_view(stored, declared, asked or config_dtype(self.config))
        drop_quantization(self.config)
        self.files = stored if dense is None else dense
        self.stored_as = "" if dense is None else dense.description
        self.dtype = asked or config_dtype(self.config) or dominant_dtype(self.files)
        names = _module_names(self.files, self.facts)
        shapes = {name: (self.files.tensors[key].shape, self.files.tensors[key].dtype) for name, key in names.items()}
        self.model, _ = build_skeleton(shapes, self.config, self.facts, self.dtype)
        unfuse_experts(self.model)
        self.blocks = skeleton_blocks(self.model, self.name_or_path)
        experts_listed_apart(self.model, self.blocks, self.facts, self.dtype)
        self._names = state_names(self.model)
        self._plans = _tensor_plans(self.model, names, self._names)
        self._tied = self._find_tied()
        self._tensors = self._check_tensors()

    def reopen(self) -> CheckpointSource:
        return SkeletonSource(self.folder, dtype=self.dtype, name_or_path=self.name_or_path)

    def inputs(self, tensor_name: str) -> tuple[str, ...]:
        """Names in the files of everything that has to be read for a tensor, scales included."""
        found: list[str] = []
        weights = getattr(self.files, "weights", {})
        for key in self.checkpoint_names(tensor_name):
            stored = weights.get(key)
            found += [key] if stored is None else [stored.codes, stored.scale]
        return tuple(found)


def _facts(config: RawConfig, name: str) -> FamilyFacts:
    model_type = str(getattr(config, "model_type", ""))
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; only decoder-only language models can be quantized")
    facts = family_facts(model_type)
    if facts.refused:
        raise UnsupportedError(
            f"model-free mode cannot read models of type {model_type!r}: {facts.refused}; leave model_free out "
            "(--disable_model_free), the regular flow reads them with their class"
        )
    return facts


def _module_names(files: TensorFiles, facts: FamilyFacts) -> dict[str, str]:
    """Name in the files by module name. Raises ModelError when two tensors would get one name."""
    keys = [k for k in files if not UNREAD_EVERYWHERE.search(k) and not (facts.unread and re.search(facts.unread, k))]
    lacks = bool(facts.prefix) and not any(facts.module_name(key).startswith(f"{facts.prefix}.") for key in keys)
    names: dict[str, str] = {}
    for key in keys:
        name = facts.module_name(key)
        if lacks and name != "lm_head.weight":
            name = f"{facts.prefix}.{name}"
        if name in names:
            raise ModelError(f"{files.folder}: {names[name]!r} and {key!r} are both the tensor {name!r}")
        names[name] = key
    return names


def _tensor_plans(model: Skeleton, keys: dict[str, str], wanted: list[str]) -> dict[str, TensorPlan]:
    origins: dict[str, Origin] = {}
    plans: dict[str, TensorPlan] = {}
    for name in wanted:
        if name in keys:
            plans[name] = TensorPlan(Origin(name, [(keys[name], keys[name])]), name)
    for prefix, experts in model.named_modules():
        if not isinstance(experts, LinearExperts):
            continue
        for leaf, piece in experts.pieces().items():
            name, fused = f"{prefix}.{leaf}", f"{prefix}.{piece.param}"
            if name not in plans and fused in keys:
                origin = origins.setdefault(fused, Origin(fused, [(keys[fused], keys[fused])]))
                plans[name] = TensorPlan(origin, fused, piece)
    return plans


def shards_of(files: TensorFiles) -> dict[Path, list[str]]:
    """Names of the stored tensors by file, files in order of their names."""
    stored = getattr(files, "stored", files)
    found: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.tensors.items():
        found[tensor.file].append(name)
    return {file: found[file] for file in sorted(found)}
