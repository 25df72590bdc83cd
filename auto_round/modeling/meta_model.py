"""Represent a checkpoint as modules on the meta device that never run, for planning and model-free mode.

Where Transformers has a class for the checkpoint, that class on meta gives the modules, the names in the files,
the layout of experts and what stays in float32. For an unknown family a tree of empty modules (`MetaModel`) is
built from tensor names and shapes; linear layers, embeddings and experts are found by exact name parts, shapes
and the configuration. Stacked experts of such a family stay unquantized, because their layout is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.build import RawConfig, read_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.config import LAYER_COUNTS
from auto_round.modeling.files.safetensors import TensorFiles

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
    from transformers.core_model_loading import dot_natural_key

    root = MetaModel(config)
    owners: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, {})[leaf] = shapes[name]
    for owner, leaves in owners.items():
        if owner:
            _attach(root, owner, _module(owner, leaves, dtype))
        else:
            _register_parameters(root, leaves, dtype)
    for name, leaves in owners.items():
        owner_module = root.get_submodule(name)
        for leaf in leaves:
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
    *path, last = parts = name.split(".")
    parent: nn.Module = root
    for part, following in zip(path, parts[1:], strict=True):
        if part not in parent._modules:
            parent._modules[part] = nn.ModuleList() if following.isdigit() else PlainModule()
        child = parent._modules[part]
        assert child is not None
        parent = child
    replaced = parent._modules.get(last)
    module._modules.update(replaced._modules if replaced is not None else {})
    parent._modules[last] = module


def _find_head(root: MetaModel, owners: Collection[str], config: Any) -> None:
    """Find the output head: a linear layer outside the blocks with a known name, or a copy of the tied embedding."""
    modules = dict(root.named_modules())

    def outermost(names: Collection[str], leaves: Collection[str], kind: type[nn.Module]) -> str | None:
        found = [n for n in names if n.rpartition(".")[2] in leaves and isinstance(modules.get(n), kind)]
        return min(found, key=lambda n: (n.count("."), n), default=None)

    embeddings = (outermost(owners, (leaf,), nn.Embedding) for leaf in TOKEN_EMBEDDINGS)
    embedding = next((name for name in embeddings if name is not None), None)
    unnumbered = [name for name in owners if not re.search(r"\.\d+\.", f".{name}.")]
    stored_head = root.head_name = outermost(unnumbered, HEADS, nn.Linear)
    if stored_head is None and embedding is not None:
        weight = root.get_parameter(f"{embedding}.weight")
        rows, columns = weight.shape
        _attach(root, HEADS[0], nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype))
        root.head_name = HEADS[0]
    if root.head_name is not None and embedding is not None:
        text = config.get_text_config()
        tied = getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", None))
        if tied or stored_head is None:
            root.all_tied_weights_keys = {f"{root.head_name}.weight": f"{embedding}.weight"}


def meta_model_blocks(root: MetaModel, name_or_path: str) -> tuple[str, ...]:
    """Names of the decoder blocks in order, without those of multi-token prediction after them.

    The list of blocks is the outermost one that has at least as many members as the configuration has layers (files may
    contain further layers for multi-token prediction), and the most weights.

    Raises:
        ModelError: no such list, or blocks are missing from the files.
        UnsupportedError: there are several lists of the same kind of block.
    """
    found = list(_layer_lists(root, ""))
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


class _LayerList(NamedTuple):
    """A numbered list of modules with weights: its name, numbers, size, and tensor names of its first module."""

    name: str
    children: list[str]
    size: int
    leaves: frozenset[str]


def _layer_lists(module: nn.Module, name: str) -> Iterator[_LayerList]:
    """The outermost lists of modules with matrices under `module`."""
    children = dict(module.named_children())
    if children and all(c.isdigit() and any(p.dim() >= 2 for p in m.parameters()) for c, m in children.items()):
        first = next(iter(children.values()))
        size = sum(p.numel() for p in module.parameters())
        yield _LayerList(name, list(children), size, frozenset(n for n, _ in first.named_parameters()))
        return
    for child_name, child in children.items():
        yield from _layer_lists(child, f"{name}.{child_name}" if name else child_name)


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
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    raw = read_config(folder)
    name = name_or_path or str(folder)
    if getattr(raw, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; only decoder-only language models can be quantized")
    listed = getattr(raw, "architectures", None)
    architectures = [n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []
    model_type = str(getattr(raw, "model_type", ""))
    if model_type in transformers.CONFIG_MAPPING:
        # The class that config.json names, else the causal language model of the type.
        kinds = [getattr(transformers, class_name, None) for class_name in architectures]
        kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = kinds[0] if kinds else mapping.get(transformers.CONFIG_MAPPING[model_type], None)
        if isinstance(kind, type):
            return CheckpointSource(folder, dtype=dtype, name_or_path=name, files=files, kind=kind)
    # Tensor names must be those of the modules, since no class here tells how they differ.
    for family in (model_type, *architectures):
        if get_checkpoint_conversion_mapping(family):
            raise UnsupportedError(
                f"{name}: Transformers converts the files of {family!r} as it reads them, but the installed version "
                "has no class for them; install a Transformers that has it, or leave model_free out "
                "(--disable_model_free)"
            )
    return MetaModelSource(folder, dtype=dtype, name_or_path=name, files=files)


class MetaModelSource(CheckpointSource):
    """A checkpoint interpreted from names, shapes and configuration. Its `model` is a module tree that cannot run."""

    model: MetaModel
    can_run = False

    def _read_config(self) -> RawConfig:
        return read_config(self.folder)

    def _build(self) -> MetaModel:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self.files.tensors.items()}
        return build_meta_model(shapes, self.config, self.dtype)

    def _find_blocks(self, model: nn.Module) -> tuple[str, ...]:
        return meta_model_blocks(self.model, self.name_or_path)
