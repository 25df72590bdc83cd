"""A checkpoint as a source of tensors that never runs: its structure from its class in Transformers, else from names.

Where Transformers has a class for the checkpoint, that class on meta says which modules there are, how the files name
and join them, how experts lie and what stays in float32. A checkpoint of a family that Transformers does not know is
understood from the names and shapes of its tensors, which are those of its modules then; experts stacked in one tensor
stay dense, because nothing says how they lie.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.build import config_dtype, dominant_dtype
from auto_round.modeling.checkpoint_map import TensorPlan
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.modeling.config_checks import check_sizes
from auto_round.modeling.conversions import Origin
from auto_round.modeling.quantized_inputs import check_readable, dense_view, drop_quantization, quantization_of
from auto_round.modeling.raw_config import RawConfig, read_config
from auto_round.modeling.skeleton import Skeleton, build_skeleton, skeleton_blocks
from auto_round.modeling.source import resolve_dtype, state_names
from auto_round.modeling.tensor_files import TensorFiles


def open_structure(
    folder: Path, *, dtype: torch.dtype | str | None = None, name_or_path: str | None = None,
    files: TensorFiles | None = None,
) -> CheckpointSource:  # fmt: skip
    """A checkpoint whose tensors are read and whose model is not run; no code of its own is.

    Args:
        folder: holds config.json; the weights too, unless `files` is given.
        dtype: floating-point dtype of the parameters; default: the configuration's, else the one most weights have.
        name_or_path: what the user gave, for messages.
        files: the opened weights, where they lie elsewhere.

    Raises:
        ModelError: files are missing or damaged, or hold no decoder.
        UnsupportedError: the files are quantized in a way that is not read.
    """
    raw = read_config(folder)
    name = name_or_path or str(folder)
    if getattr(raw, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; only decoder-only language models can be quantized")
    kind = _class_of(raw)
    if kind is not None:
        return CheckpointSource(folder, dtype=dtype, name_or_path=name, files=files, kind=kind)
    _refuse_conversions(raw, name)
    return SkeletonSource(folder, dtype=dtype, name_or_path=name, files=files)


def _class_of(config: RawConfig) -> type[Any] | None:
    """Transformers' class for a checkpoint: the one that config.json names, else the causal language model of its type.
    None for a type that Transformers does not know."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = str(getattr(config, "model_type", ""))
    if model_type not in CONFIG_MAPPING:
        return None
    for name in _architectures(config):
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
    return found if isinstance(found, type) else None


def _architectures(config: RawConfig) -> list[str]:
    named = getattr(config, "architectures", None)
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _refuse_conversions(config: RawConfig, name: str) -> None:
    """Raise UnsupportedError for a family whose files have other names than its modules, and no class says how those
    are arranged: its tensors must not be taken for modules."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model_type = str(getattr(config, "model_type", ""))
    known = next((n for n in (model_type, *_architectures(config)) if get_checkpoint_conversion_mapping(n)), None)
    if known is not None:
        raise UnsupportedError(
            f"{name}: Transformers converts the files of {known!r} as it reads them, and has no class of that name to "
            "say what they become; install the Transformers that has it, or leave model_free out (--disable_model_free)"
        )


class SkeletonSource(CheckpointSource):
    """A checkpoint understood from names, shapes and configuration. Its `model` is a tree that cannot run.

    Arguments and errors are those of `open_structure`.
    """

    model: Skeleton

    def __init__(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None,
        name_or_path: str | None = None, files: TensorFiles | None = None,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.name_or_path = name_or_path or str(folder)
        self._trusted = False
        asked = self._asked = resolve_dtype(dtype)
        self.config: RawConfig = read_config(self.folder)
        declared = quantization_of(self.config)
        check_readable(declared, self.name_or_path)
        stored = TensorFiles.open(self.folder) if files is None else files
        check_sizes(self.folder / "config.json", self.config, len(stored.tensors))
        dense = dense_view(stored, declared, asked or config_dtype(self.config))
        drop_quantization(self.config)
        self.files = stored if dense is None else dense
        self.stored_as = "" if dense is None else dense.description
        self.dtype = asked or config_dtype(self.config) or dominant_dtype(self.files)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self.files.tensors.items()}
        self.model, _ = build_skeleton(shapes, self.config, self.dtype)
        self.blocks = skeleton_blocks(self.model, self.name_or_path)
        self._names = state_names(self.model)
        held = [name for name in self._names if name in self.files]
        self._plans = {name: TensorPlan(Origin(name, [(name, name)], targets=[name]), name) for name in held}
        self._tied = self._find_tied()
        self._tensors = self._check_tensors()
        self._spare = self._find_spare()

    def reopen(self) -> CheckpointSource:
        return SkeletonSource(self.folder, dtype=self._asked, name_or_path=self.name_or_path)


def shards_of(files: TensorFiles) -> dict[Path, list[str]]:
    """Names of the stored tensors by file, files in order of their names."""
    stored = getattr(files, "stored", files)
    found: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.tensors.items():
        found[tensor.file].append(name)
    return {file: found[file] for file in sorted(found)}
