"""A tree of empty modules made from tensor names and shapes alone: what a checkpoint looks like without its class.

Linear layers, embeddings and experts are found by exact parts of names, by shapes and by the configuration. The tree
answers what planning asks of a model (which layers are linear, what chooses experts); it cannot run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

# Exact names of the modules that look tokens or positions up.
EMBEDDINGS = frozenset(
    ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embed_positions", "embeddings",
     "embedding", "embed", "position_embeddings", "token_type_embeddings", "wtte", "embed_tokens_per_layer",
     "position_embedding", "patch_embedding", "word_embedding")
)  # fmt: skip
HEADS = ("lm_head", "embed_out", "output", "head", "unembed", "output_projection")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Skeleton(nn.Module):
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


class Holder(nn.Module):
    """A module of which nothing is known but its tensors and children."""


def layer_count(config: Any) -> int | None:
    """How many decoder blocks the configuration says, None when it does not."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _LAYER_COUNTS)
    return next((int(n) for n in found if isinstance(n, int) and n > 0), None)


def build_skeleton(shapes: Shapes, config: Any, dtype: torch.dtype) -> tuple[Skeleton, Shapes]:
    """The tree of a checkpoint.

    Args:
        shapes: shape and dtype of every tensor by its module name, dense.
        config: the configuration (`modeling.raw_config`).
        dtype: of the parameters.

    Returns:
        (the tree on meta, names that it has before experts are split).
    """
    root = Skeleton(config)
    owners: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name in sorted(shapes, key=natural_key):
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, {})[leaf] = shapes[name]
    for owner, leaves in owners.items():
        if owner:
            _attach(root, owner, _module(owner, leaves, dtype))
        else:
            _hold(root, leaves, dtype)
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
    holder = Holder()
    _hold(holder, leaves, dtype)
    return holder


def _hold(
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
            child = nn.ModuleList() if following.isdigit() else Holder()
            parent._modules[part] = child
        parent = child


def _is_list(root: nn.Module, name: str) -> bool:
    return isinstance(root.get_submodule(name), nn.ModuleList)


def _find_head(root: Skeleton, owners: Mapping[str, Any], config: Any) -> None:
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


def skeleton_blocks(root: Skeleton, name_or_path: str) -> tuple[str, ...]:
    """Names of the decoder blocks in order, those of multi-token prediction behind them left out.

    The list of blocks is the outermost one that is as long as the configuration says (or longer: files hold further
    layers for multi-token prediction), and has the most weights.

    Raises:
        ModelError: no such list, or blocks are missing from the files.
        UnsupportedError: there are several lists of the same kind of block.
    """
    found: list[SimpleNamespace] = []
    _lists(root, "", found)
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


def _lists(module: nn.Module, name: str, found: list[SimpleNamespace]) -> None:
    children = list(module._modules)
    if children and all(child.isdigit() for child in children) and _has_matrices(module):
        size = sum(p.numel() for p in module.parameters())
        first = module._modules[children[0]]
        assert first is not None
        leaves = frozenset(n for n, _ in first.named_parameters())
        found.append(SimpleNamespace(name=name, children=children, size=size, leaves=leaves))
        return
    for child_name, child in module.named_children():
        _lists(child, f"{name}.{child_name}" if name else child_name, found)


def _has_matrices(module: nn.Module) -> bool:
    return all(any(p.dim() >= 2 for p in child.parameters()) for child in module.children())
