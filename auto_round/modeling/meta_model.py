"""Represent a checkpoint as modules on the meta device that never run, for planning and model-free mode.

Where Transformers has a class for the checkpoint, that class on meta gives the modules, the names in the files,
the layout of experts and what stays in float32. For an unknown family a tree of empty modules (`MetaModel`) is
built from tensor names and shapes; linear layers, embeddings and experts are found by exact name parts, shapes
and the configuration. Stacked experts of such a family stay unquantized, because their layout is unknown.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.build import RawConfig, read_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.config import LAYER_COUNTS
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.tensor_map import TensorPlan

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

# Exact names of modules that are embeddings of tokens or positions.
EMBEDDINGS = frozenset(
    ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embed_positions", "embeddings",
     "embedding", "embed", "position_embeddings", "token_type_embeddings", "wtte", "embed_tokens_per_layer",
     "position_embedding", "patch_embedding", "word_embedding")
)  # fmt: skip
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embed")
HEADS = ("lm_head", "embed_out", "output", "head", "unembed", "output_projection")


class MetaModel(nn.Module):
    """The root of the module tree, with the interface of a Transformers model that planning uses."""

    generation_config = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.head_name: str | None = None
        self.all_tied_weights_keys: dict[str, str] = {}

    def get_output_embeddings(self) -> nn.Module | None:
        """The output head, as in Transformers."""
        return None if self.head_name is None else self.get_submodule(self.head_name)


class PlainModule(nn.Module):
    """A module of unknown type with tensors and children."""


def build_meta_model(shapes: Shapes, config: Any, dtype: torch.dtype) -> MetaModel:
    """Build the module tree of a checkpoint on meta.

    Args:
        shapes: shape and dtype of every tensor by its module name, dense.
        config: the configuration, a `RawConfig`.
        dtype: of the parameters.

    Raises ModelError when a tensor's name is also that of a module.
    """
    root = MetaModel(config)
    owners: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}

    def natural_key(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

    for name in sorted(shapes, key=natural_key):
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, {})[leaf] = shapes[name]
    for owner, leaves in owners.items():
        if owner:
            _attach(root, owner, _module(owner, leaves, dtype))
        else:
            _register_parameters(root, leaves, dtype)
    for name, leaves in owners.items():
        for leaf in leaves:
            owner_module = root.get_submodule(name)
            if isinstance(owner_module, nn.ModuleList) or not hasattr(owner_module, leaf):
                raise ModelError(f"tensor {name}.{leaf} has the name of a module")
    _find_head(root, owners, config)
    return root


def _module(owner: str, leaves: Shapes, dtype: torch.dtype) -> nn.Module:
    segment = owner.rpartition(".")[2]
    weight = leaves.get("weight")
    others = set(leaves) - {"weight", "bias"}
    if weight is not None and len(weight[0]) == 2 and not others and weight[1].is_floating_point:
        rows, columns = weight[0]
        bias = "bias" in leaves
        if segment in EMBEDDINGS and not bias:
            return nn.Embedding(rows, columns, device="meta", dtype=dtype)
        return nn.Linear(columns, rows, bias=bias, device="meta", dtype=dtype)
    holder = PlainModule()
    _register_parameters(holder, leaves, dtype)
    return holder


def _register_parameters(module: nn.Module, leaves: Shapes, dtype: torch.dtype) -> None:
    for leaf, (shape, stored) in leaves.items():
        own = dtype if stored.is_floating_point else stored
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=own, device="meta"), requires_grad=False))


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Insert `module` at `name`. Names come in natural order, so parents without tensors are created here."""
    parent: nn.Module = root
    parts = name.split(".")
    for depth, part in enumerate(parts):
        child = parent._modules.get(part)
        if depth == len(parts) - 1:
            if child is not None:
                for leaf, below in child._modules.items():
                    module._modules[leaf] = below
            parent._modules[part] = module
            return
        if child is None:
            following = parts[depth + 1]
            child = nn.ModuleList() if following.isdigit() else PlainModule()
            parent._modules[part] = child
        parent = child


def _find_head(root: MetaModel, owners: Collection[str], config: Any) -> None:
    """Find the output head: a linear layer outside the blocks with a known name, or a copy of the tied embedding."""
    modules = dict(root.named_modules())
    known = (n for n in owners if n.rpartition(".")[2] in HEADS and isinstance(modules.get(n), nn.Linear))
    heads = sorted((n for n in known if not re.search(r"\.\d+\.", f".{n}.")), key=lambda n: (n.count("."), n))
    embedding = None
    for leaf in TOKEN_EMBEDDINGS:
        found = [n for n in owners if n.rpartition(".")[2] == leaf and isinstance(modules.get(n), nn.Embedding)]
        if found:
            embedding = min(found, key=lambda n: (n.count("."), n))
            break
    if heads:
        root.head_name = heads[0]
    elif embedding is not None:
        weight = root.get_parameter(f"{embedding}.weight")
        rows, columns = weight.shape
        _attach(root, HEADS[0], nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype))
        root.head_name = HEADS[0]
    if root.head_name is not None and embedding is not None:
        text = config.get_text_config()
        tied = getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", None))
        if tied or not heads:
            root.all_tied_weights_keys = {f"{root.head_name}.weight": f"{embedding}.weight"}


def meta_model_blocks(root: MetaModel, name_or_path: str) -> tuple[str, ...]:
    """Names of the decoder blocks in order, without those of multi-token prediction after them.

    The list of blocks is the outermost one that has at least as many members as the configuration has layers (files may
    contain further layers for multi-token prediction), and the most weights.

    Raises:
        ModelError: no such list, or blocks are missing from the files.
        UnsupportedError: there are several lists of the same kind of block.
    """
    found: list[SimpleNamespace] = []
    _collect_lists(root, "", found)
    text = root.config.get_text_config()
    counts = (getattr(text, name, None) for name in LAYER_COUNTS)
    wanted = next((int(n) for n in counts if isinstance(n, int) and n > 0), None)
    fitting = [one for one in found if wanted is None or len(one.children) >= wanted]
    if not found:
        raise ModelError(f"{name_or_path} has no list of decoder blocks with names such as model.layers.0")
    if not fitting:
        longest = max(found, key=lambda one: one.size)
        raise ModelError(
            f"{name_or_path}: config.json says {wanted} layers, and its files hold {len(longest.children)} under "
            f"{longest.name} (shards may be missing; does config.json belong to these weights?)"
        )
    best = max(fitting, key=lambda one: (one.size, one.name))
    names = best.children if wanted is None else best.children[:wanted]
    for index, child in enumerate(names):
        if child != str(index):
            raise ModelError(f"{name_or_path}: no tensor of {best.name}.{index} is in the files; fetch them again")
    others = [one.name for one in fitting if one is not best and one.leaves == best.leaves]
    if others:
        raise UnsupportedError(
            f"{name_or_path} has several stacks of the same blocks ({', '.join([best.name, *others])}); only models "
            "that run one stack of blocks once, in order, can be quantized"
        )
    return tuple(f"{best.name}.{child}" for child in names)


def _collect_lists(module: nn.Module, name: str, found: list[SimpleNamespace]) -> None:
    children = list(module._modules)
    if all(c.isdigit() and any(p.dim() >= 2 for p in m.parameters()) for c, m in module.named_children()) and children:
        size = sum(p.numel() for p in module.parameters())
        first = module._modules[children[0]]
        assert first is not None
        leaves = frozenset(n for n, _ in first.named_parameters())
        found.append(SimpleNamespace(name=name, children=children, size=size, leaves=leaves))
        return
    for child_name, child in module.named_children():
        _collect_lists(child, f"{name}.{child_name}" if name else child_name, found)


def open_meta_source(
    folder: Path, *, dtype: torch.dtype | str | None = None, name_or_path: str | None = None,
    files: TensorFiles | None = None,
) -> CheckpointSource:  # fmt: skip
    """Open a checkpoint whose tensors are read and whose model does not run. Its own Python code is not run.

    Args:
        folder: contains config.json; the weights too, unless `files` is given.
        dtype: floating-point dtype of the parameters; default: that of the configuration, else of most weights.
        name_or_path: what the user gave, for messages.
        files: the opened weights, if they are stored elsewhere.

    Raises:
        ModelError: files are missing or damaged, or contain no decoder.
        UnsupportedError: the files are quantized in a format that cannot be read.
    """
    raw = read_config(folder)
    name = name_or_path or str(folder)
    if getattr(raw, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; only decoder-only language models can be quantized")
    listed = getattr(raw, "architectures", None)
    architectures = [n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []
    model_type = str(getattr(raw, "model_type", ""))
    kind = _model_class(model_type, architectures)
    if kind is None:
        _check_no_conversions((model_type, *architectures), name)
        return MetaModelSource(folder, dtype=dtype, name_or_path=name, files=files)
    return CheckpointSource(folder, dtype=dtype, name_or_path=name, files=files, kind=kind)


def _model_class(model_type: str, architectures: list[str]) -> type[Any] | None:
    """Transformers' class of a checkpoint: the one that config.json names, else the causal language model of the type.

    None for a type that Transformers does not know.
    """
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    for name in architectures:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
    return found if isinstance(found, type) else None


def _check_no_conversions(families: tuple[str, ...], name: str) -> None:
    """Raise UnsupportedError for a family whose tensor names differ from its modules' and that has no class here."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    known = next((family for family in families if get_checkpoint_conversion_mapping(family)), None)
    if known is not None:
        raise UnsupportedError(
            f"{name}: Transformers converts the files of {known!r} as it reads them, but the installed version has no "
            "class for them; install a Transformers that has it, or leave model_free out (--disable_model_free)"
        )


class MetaModelSource(CheckpointSource):
    """A checkpoint interpreted from names, shapes and configuration. Its `model` is a module tree that cannot run.

    Arguments and errors are those of `open_meta_source`.
    """

    model: MetaModel

    def __init__(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None,
        name_or_path: str | None = None, files: TensorFiles | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, dtype=dtype, name_or_path=name_or_path, files=files)

    def _read_config(self) -> RawConfig:
        return read_config(self.folder)

    def _check_files(self) -> None:
        """Nothing to check: without a class no tensor is dropped."""

    def _build(self) -> MetaModel:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self.files.tensors.items()}
        return build_meta_model(shapes, self.config, self.dtype)

    def _find_blocks(self) -> tuple[str, ...]:
        return meta_model_blocks(self.model, self.name_or_path)

    def _make_plans(self, fused_names: Mapping[str, torch.Tensor]) -> dict[str, TensorPlan]:
        return {name: TensorPlan.direct(name) for name in self._names if name in self.files}

    def reopen(self) -> CheckpointSource:
        return MetaModelSource(self.folder, dtype=self._asked, name_or_path=self.name_or_path)


def shards_of(files: TensorFiles) -> dict[Path, list[str]]:
    """Names of the stored tensors by file, files sorted by name."""
    stored = getattr(files, "stored", files)
    found: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.tensors.items():
        found[tensor.file].append(name)
    return {file: found[file] for file in sorted(found)}
