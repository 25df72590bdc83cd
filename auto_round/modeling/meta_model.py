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
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.build import RawConfig, check_sizes, config_dtype, dominant_dtype, read_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.conversions import Origin
from auto_round.modeling.files.dequantized import check_readable, dense_view, drop_quantization, quantization_of
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.source import resolve_dtype, state_names
from auto_round.modeling.tensor_map import TensorPlan

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

# Exact names of the modules that look tokens or positions up.
EMBEDDINGS = frozenset(
    ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embed_positions", "embeddings",
     "embedding", "embed", "position_embeddings", "token_type_embeddings", "wtte", "embed_tokens_per_layer",
     "position_embedding", "patch_embedding", "word_embedding")
)  # fmt: skip
HEADS = ("lm_head", "embed_out", "output", "head", "unembed", "output_projection")
_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class MetaModel(nn.Module):
    """The root of the tree, with the answers that a Transformers model gives about itself."""

    generation_config = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.head_name: str | None = None
        self.all_tied_weights_keys: dict[str, str] = {}

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, as Transformers' models say it."""
        return None if self.head_name is None else self.get_submodule(self.head_name)


class PlainModule(nn.Module):
    """A module of which nothing is known but its tensors and children."""


def layer_count(config: Any) -> int | None:
    """How many decoder blocks the configuration says, None when it does not."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _LAYER_COUNT_KEYS)
    return next((int(n) for n in found if isinstance(n, int) and n > 0), None)


def build_meta_model(shapes: Shapes, config: Any, dtype: torch.dtype) -> tuple[MetaModel, Shapes]:
    """The tree of a checkpoint.

    Args:
        shapes: shape and dtype of every tensor by its module name, dense.
        config: the configuration (`modeling.raw_config`).
        dtype: of the parameters.

    Returns:
        (the tree on meta, names that it has before experts are split).
    """
    root = MetaModel(config)
    owners: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
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
            if _is_list(root, name) or not hasattr(root.get_submodule(name), leaf):
                raise ModelError(f"tensor {name}.{leaf} lies where the files have other modules")
    _find_head(root, owners, config)
    return root, shapes


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts names with their numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _module(
    owner: str, leaves: Mapping[str, tuple[tuple[int, ...], torch.dtype]], dtype: torch.dtype
) -> nn.Module:  # fmt: skip
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


def _register_parameters(
    module: nn.Module, leaves: Mapping[str, tuple[tuple[int, ...], torch.dtype]], dtype: torch.dtype
) -> None:  # fmt: skip
    for leaf, (shape, stored) in leaves.items():
        own = dtype if stored.is_floating_point else stored
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=own, device="meta"), requires_grad=False))


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`; names come in natural order, so parents without tensors of their own are made here."""
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


def _is_list(root: nn.Module, name: str) -> bool:
    return isinstance(root.get_submodule(name), nn.ModuleList)


def _find_head(root: MetaModel, owners: Mapping[str, Any], config: Any) -> None:
    """The output head: a linear layer outside the blocks with an exact name, or the tied embedding's twin."""
    known = {name for name in owners if name.rpartition(".")[2] in HEADS and isinstance(_get(root, name), nn.Linear)}
    heads = sorted((n for n in known if not re.search(r"\.\d+\.", f".{n}.")), key=lambda n: (n.count("."), n))
    embedding = _token_embedding(root, owners)
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


def _token_embedding(root: nn.Module, owners: Mapping[str, Any]) -> str | None:
    for leaf in ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embed"):
        found = [n for n in owners if n.rpartition(".")[2] == leaf and isinstance(_get(root, n), nn.Embedding)]
        if found:
            return min(found, key=lambda n: (n.count("."), n))
    return None


def _get(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def meta_model_blocks(root: MetaModel, name_or_path: str) -> tuple[str, ...]:
    """Names of the decoder blocks in order, those of multi-token prediction behind them left out.

    The list of blocks is the outermost one that is as long as the configuration says (or longer: files hold further
    layers for multi-token prediction), and has the most weights.

    Raises:
        ModelError: no such list, or blocks are missing from the files.
        UnsupportedError: there are several lists of the same kind of block.
    """
    found: list[SimpleNamespace] = []
    _collect_lists(root, "", found)
    wanted = layer_count(root.config)
    fitting = [one for one in found if wanted is None or len(one.children) >= wanted]
    if not found:
        raise ModelError(f"{name_or_path} has no list of decoder blocks: names such as model.layers.0 are looked for")
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
    twins = [one.name for one in fitting if one is not best and one.leaves == best.leaves]
    if twins:
        raise UnsupportedError(
            f"{name_or_path} has several stacks of the same blocks ({', '.join([best.name, *twins])}); only models "
            "that run one stack of blocks once, in order, can be quantized"
        )
    return tuple(f"{best.name}.{child}" for child in names)


def _collect_lists(module: nn.Module, name: str, found: list[SimpleNamespace]) -> None:
    children = list(module._modules)
    if children and all(child.isdigit() for child in children) and _has_matrices(module):
        size = sum(p.numel() for p in module.parameters())
        first = module._modules[children[0]]
        assert first is not None
        leaves = frozenset(n for n, _ in first.named_parameters())
        found.append(SimpleNamespace(name=name, children=children, size=size, leaves=leaves))
        return
    for child_name, child in module.named_children():
        _collect_lists(child, f"{name}.{child_name}" if name else child_name, found)


def _has_matrices(module: nn.Module) -> bool:
    return all(any(p.dim() >= 2 for p in child.parameters()) for child in module.children())


# A checkpoint as a source of tensors that never runs: its structure from its class in Transformers, else from names.
#
# Where Transformers has a class for the checkpoint, that class on meta says which modules there are, how the files name
# and join them, how experts lie and what stays in float32. A checkpoint of a family that Transformers does not know is
# understood from the names and shapes of its tensors, which are those of its modules then; experts stacked in one
# tensor stay dense, because nothing says how they lie.


def open_meta_source(
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
    _check_no_conversions(raw, name)
    return MetaModelSource(folder, dtype=dtype, name_or_path=name, files=files)


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


def _check_no_conversions(config: RawConfig, name: str) -> None:
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


class MetaModelSource(CheckpointSource):
    """A checkpoint understood from names, shapes and configuration. Its `model` is a tree that cannot run.

    Arguments and errors are those of `open_meta_source`.
    """

    model: MetaModel

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
        self.model, _ = build_meta_model(shapes, self.config, self.dtype)
        self.blocks = meta_model_blocks(self.model, self.name_or_path)
        self._names = state_names(self.model)
        held = [name for name in self._names if name in self.files]
        self._plans = {name: TensorPlan(Origin(name, [(name, name)], targets=[name]), name) for name in held}
        self._tied = self._find_tied()
        self._tensors = self._check_tensors()
        self._spare = self._find_spare()

    def reopen(self) -> CheckpointSource:
        return MetaModelSource(self.folder, dtype=self._asked, name_or_path=self.name_or_path)


def shards_of(files: TensorFiles) -> dict[Path, list[str]]:
    """Names of the stored tensors by file, files in order of their names."""
    stored = getattr(files, "stored", files)
    found: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.tensors.items():
        found[tensor.file].append(name)
    return {file: found[file] for file in sorted(found)}
