"""Represent a checkpoint as modules on the meta device that never run, for planning and model-free mode.

Where Transformers has a class for the checkpoint, that class on meta gives the modules. For an unknown family a tree of
empty modules (`MetaModel`) is built from tensor names and shapes; linear layers, embeddings and experts are found by
exact name parts, shapes and the configuration. Its stacked experts stay unquantized: their layout is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.build import RawConfig, read_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.config import LAYER_COUNTS
from auto_round.modeling.files.safetensors import StoredTensor, TensorFiles

# Exact names of modules that are embeddings of tokens or positions.
EMBEDDINGS = frozenset(
    ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embed_positions", "embeddings",
     "embedding", "embed", "position_embeddings", "token_type_embeddings", "wtte", "embed_tokens_per_layer",
     "position_embedding", "patch_embedding", "word_embedding")
)  # fmt: skip
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embed")
HEADS = ("lm_head", "embed_out", "output", "head", "unembed", "output_projection")


class MetaModel(nn.Module):
    """The module tree of a checkpoint on meta, with the interface of a Transformers model that planning uses."""

    generation_config = None

    def __init__(self, tensors: Mapping[str, StoredTensor], config: Any, dtype: torch.dtype) -> None:
        from transformers.core_model_loading import dot_natural_key

        super().__init__()
        self.config = config
        self.head_name: str | None = None
        self.all_tied_weights_keys: dict[str, str] = {}
        owners: dict[str, dict[str, StoredTensor]] = {"": {}}
        for name in sorted(tensors, key=dot_natural_key):
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(owner, {})[leaf] = tensors[name]
        for owner, leaves in owners.items():
            module: nn.Module = nn.Module() if owner else self
            weight = leaves.get("weight")
            is_matrix = weight is not None and len(weight.shape) == 2 and weight.dtype.is_floating_point
            if owner and weight is not None and is_matrix and set(leaves) <= {"weight", "bias"}:
                rows, columns = weight.shape
                if owner.rpartition(".")[2] in EMBEDDINGS and "bias" not in leaves:
                    module = nn.Embedding(rows, columns, device="meta", dtype=dtype)
                else:
                    module = nn.Linear(columns, rows, bias="bias" in leaves, device="meta", dtype=dtype)
            else:
                for leaf, stored in leaves.items():
                    own = dtype if stored.dtype.is_floating_point else stored.dtype
                    empty = torch.empty(stored.shape, dtype=own, device="meta")
                    module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
            if owner:
                self._attach(owner, module)
        for name, leaves in owners.items():
            holder = self.get_submodule(name)
            for leaf in leaves:
                if isinstance(holder, nn.ModuleList) or not hasattr(holder, leaf):
                    raise ModelError(f"tensor {name}.{leaf} has the name of a module")
        self._find_head(owners)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output head, as in Transformers."""
        return None if self.head_name is None else self.get_submodule(self.head_name)

    def _attach(self, name: str, module: nn.Module) -> None:
        """Insert `module` at `name`. Names come in natural order, so parents without tensors are created here."""
        *path, last = parts = name.split(".")
        parent: nn.Module = self
        for part, following in zip(path, parts[1:], strict=True):
            if part not in parent._modules:
                parent._modules[part] = nn.ModuleList() if following.isdigit() else nn.Module()
            child = parent._modules[part]
            assert child is not None
            parent = child
        replaced = parent._modules.get(last)
        module._modules.update(replaced._modules if replaced is not None else {})
        parent._modules[last] = module

    def _find_head(self, owners: Collection[str]) -> None:
        """Find the output head: a linear layer outside the blocks with a known name, or a copy of the embedding."""
        modules = dict(self.named_modules())

        def outermost(names: Collection[str], leaves: Collection[str], kind: type[nn.Module]) -> str | None:
            found = [n for n in names if n.rpartition(".")[2] in leaves and isinstance(modules.get(n), kind)]
            return min(found, key=lambda n: (n.count("."), n), default=None)

        embeddings = (outermost(owners, (leaf,), nn.Embedding) for leaf in TOKEN_EMBEDDINGS)
        embedding = next((name for name in embeddings if name is not None), None)
        unnumbered = [name for name in owners if not re.search(r"\.\d+\.", f".{name}.")]
        stored_head = self.head_name = outermost(unnumbered, HEADS, nn.Linear)
        if embedding is None:
            return
        if self.head_name is None:
            weight = self.get_parameter(f"{embedding}.weight")
            rows, columns = weight.shape
            self.head_name = HEADS[0]
            self._attach(self.head_name, nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype))
        text = self.config.get_text_config()
        tied = getattr(self.config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", None))
        if tied or stored_head is None:
            self.all_tied_weights_keys = {f"{self.head_name}.weight": f"{embedding}.weight"}

    def find_decoder_blocks(self, name_or_path: str) -> tuple[str, ...]:
        """Names of the decoder blocks in order, without those of multi-token prediction after them.

        They are the outermost list that has at least as many members as the configuration has layers, and the most
        weights. Raises ModelError when it or a block is missing, UnsupportedError for several lists of the same kind.
        """
        lists = dict(_layer_lists(self, ""))
        text = self.config.get_text_config()
        counts = (getattr(text, name, None) for name in LAYER_COUNTS)
        wanted = next((int(n) for n in counts if isinstance(n, int) and n > 0), None)
        sizes = {name: sum(p.numel() for p in layers.parameters()) for name, layers in lists.items()}
        children = {name: [child for child, _ in layers.named_children()] for name, layers in lists.items()}
        fitting = [name for name in lists if wanted is None or len(children[name]) >= wanted]
        if not lists:
            raise ModelError(f"{name_or_path} has no list of decoder blocks with names such as model.layers.0")
        if not fitting:
            longest = max(lists, key=lambda name: sizes[name])
            raise ModelError(
                f"{name_or_path}: config.json says {wanted} layers, and its files hold {len(children[longest])} under "
                f"{longest} (shards may be missing; does config.json belong to these weights?)"
            )
        best = max(fitting, key=lambda name: (sizes[name], name))
        for index, child in enumerate(children[best][:wanted]):
            if child != str(index):
                raise ModelError(f"{name_or_path}: no tensor of {best}.{index} is in the files; fetch them again")
        leaves = {name: {n for n, _ in next(lists[name].children()).named_parameters()} for name in fitting}
        others = [name for name in fitting if name != best and leaves[name] == leaves[best]]
        if others:
            raise UnsupportedError(
                f"{name_or_path} has several stacks of the same blocks ({', '.join([best, *others])}); only models "
                "that run one stack of blocks once, in order, can be quantized"
            )
        return tuple(f"{best}.{child}" for child in children[best][:wanted])


def _layer_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost numbered lists of modules with matrices under `module`, by name."""
    children = dict(module.named_children())
    if children and all(c.isdigit() and any(p.dim() >= 2 for p in m.parameters()) for c, m in children.items()):
        yield name, module
        return
    for child_name, child in children.items():
        yield from _layer_lists(child, f"{name}.{child_name}" if name else child_name)


def open_meta_source(
    folder: Path, *, dtype: torch.dtype | str | None = None, name_or_path: str | None = None,
    files: TensorFiles | None = None,
) -> CheckpointSource:  # fmt: skip
    """Open a checkpoint whose tensors are read and whose model does not run, nor its own Python code.

    Arguments and errors are those of `CheckpointSource`.
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
        return MetaModel(self.files.tensors, self.config, self.dtype)

    def _find_blocks(self) -> tuple[str, ...]:
        return self.model.find_decoder_blocks(self.name_or_path)
