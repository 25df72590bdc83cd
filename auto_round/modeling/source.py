"""Define the model source: a model whose modules are loaded with real weights on demand and released again.

`CheckpointSource` (a folder or hub id) keeps all parameters on the meta device and reads them when asked; `LiveSource`
wraps a model object of the user in place.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.edits import TensorEdit
from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.blocks import find_blocks
from auto_round.modeling.build import float_dtype
from auto_round.modeling.experts import unfuse_experts
from auto_round.modeling.files.folder import model_folder
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.tensor_map import CheckpointNames, TensorPlan, plan_saved

Device = torch.device | str
Meta = tuple[tuple[int, ...], torch.dtype]
_SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CHUNK = 1 << 22


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf. Integers are always finite.

    One pass without a mask of the tensor's size: `aminmax` propagates NaN, so checking the two extremes is enough.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    flat = tensor.detach()
    if tensor.element_size() == 1:  # 8-bit floats have no reductions
        return all(is_finite(part.to(torch.float32)) for part in flat.reshape(-1).split(_CHUNK))
    low, high = torch.aminmax(flat)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def count_non_finite(tensor: torch.Tensor) -> str | None:
    """Count bad elements, in words such as "2 NaN and 0 Inf among 64 values of torch.float32"; None for none."""
    if is_finite(tensor):
        return None
    nan = infinite = 0
    for part in tensor.detach().reshape(-1).split(_CHUNK):
        values = part.to(torch.float32) if part.element_size() == 1 else part
        nan += int(torch.isnan(values).sum())
        infinite += int(torch.isinf(values).sum())
    return f"{nan} NaN and {infinite} Inf among {tensor.numel()} values of {tensor.dtype}"


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NumericsError with the number of bad elements when the tensor has NaN or Inf."""
    bad = count_non_finite(tensor)
    if bad is not None:
        raise NumericsError(
            f"tensor {name!r} holds {bad}; the weights are damaged: fetch the model again or use another checkpoint, "
            "or leave the layer unquantized with on_nan=keep (--on_nan keep)"
        )


class ModelSource(ABC):
    """A model whose modules are loaded with real weights on demand and released again."""

    model: nn.Module  # the causal language model in eval mode; parameters may be on meta, buffers are real
    config: Any
    name_or_path: str  # as given by the user, for messages and the model card
    blocks: tuple[str, ...]  # names of the decoder blocks in order, such as "model.layers.0"
    dtype: torch.dtype  # of its floating-point weights
    lazy: bool  # weights are read on `load` and dropped on `release` (a checkpoint), instead of living in the model
    default_device: torch.device | None  # where `load` puts weights; None leaves them where they are
    can_run: bool = True  # `model` is of a class that computes, instead of a tree of empty modules
    folder: Path | None = None  # of the checkpoint; None for a model object
    files: TensorFiles | None = None
    stored_as: str = ""  # how the weights of a quantized checkpoint are stored, in words; "" for a dense one
    checks_finite: bool = True  # `load` raises on NaN and Inf
    bounded: bool = False  # a memory limit (`max_memory`) is set, so that nothing is loaded before it is needed
    unused_tensors: tuple[str, ...] = ()  # stored tensors that no module reads (multi-token prediction) or are tied
    notes: tuple[str, ...] = ()  # for the user, on tensors that nothing reads
    _names: list[str]
    _plans: dict[str, TensorPlan]
    _tied: dict[str, str]
    _edits: Mapping[str, tuple[TensorEdit, ...]] = {}
    _naming: CheckpointNames | None = None

    @abstractmethod
    def load(self, name: str, device: Device | None = None) -> nn.Module:
        """Load every parameter and persistent buffer under the module `name`, and return the module.

        Tensors that are real already keep their values. Of a module that contains decoder blocks ("" is the whole
        model), only its direct tensors are loaded. Raises ModelError when there is no such module or its files cannot
        be read, and NumericsError for NaN or Inf, if `checks_finite`.
        """

    @abstractmethod
    def release(self, name: str) -> None:
        """Undo `load`: back to meta (checkpoint), back to the original device (live model)."""

    def release_restores(self, module: nn.Module) -> bool:
        """Whether `release` keeps the values that a module had before it was loaded to another device."""
        return True

    @abstractmethod
    def read(self, tensor_name: str) -> torch.Tensor:
        """Read one tensor by its state-dict name to the CPU, in the dtype of `load`. Raises ModelError if unknown."""

    @abstractmethod
    def tensor_meta(self, name: str) -> Meta:
        """Shape and dtype that `read` returns."""

    @abstractmethod
    def assemble(self, install: Callable[[nn.Module, str], None]) -> nn.Module:
        """The whole model with all weights in memory: the model object, or a new one for a checkpoint.

        Then `install(model, name)` is called for each block and each module outside the blocks once it is loaded.
        """

    def streams_experts_of(self, layers: Iterable[str]) -> bool:
        """Whether some of these layers belong to experts that can be loaded one at a time."""
        return False

    def copy(self) -> ModelSource:
        """A source that a run may change without changing this one."""
        return self

    def reopen(self) -> ModelSource:
        """A second source of the same files with its own empty model. A model object has only one."""
        return self

    def apply_edits(self, edits: Mapping[str, TensorEdit]) -> None:
        """Edit tensors, by state-dict name: those that are loaded now, and every later read of them.

        Raises ModelError for an unknown tensor, and UnsupportedError for one that is tied or stored in another form.
        """
        for name in edits:
            self._check_editable(name)
        for name, edit in edits.items():
            self._edits = {**self._edits, name: (*self._edits.get(name, ()), edit)}
            tensor = self._tensor(name)
            if not tensor.is_meta:
                tensor.data = edit.apply(tensor.detach())

    def _check_editable(self, name: str) -> None:
        self.tensor_meta(name)
        if name in self._tied or name in self._tied.values():
            raise UnsupportedError(f"{name!r} shares its values with another tensor, so no transform may edit it")

    def tied(self) -> dict[str, str]:
        """Alias to canonical name, such as {"lm_head.weight": "model.embed_tokens.weight"}."""
        return dict(self._tied)

    def tensor_names(self) -> list[str]:
        """Persistent state-dict names of the whole model in order, tied aliases included."""
        return list(self._names)

    def tensor_plan(self, tensor_name: str) -> TensorPlan | None:
        """How a model tensor is made from checkpoint tensors; None when the checkpoint has none for it."""
        return self._plans.get(self._tied.get(tensor_name, tensor_name))

    def own_plan(self, tensor_name: str) -> TensorPlan | None:
        """`tensor_plan` of a tensor's own copy in the checkpoint; None if only the tensor it is tied to is stored."""
        return self._plans.get(tensor_name)

    def checkpoint_names(self, tensor_name: str) -> tuple[str, ...]:
        """Checkpoint names of the tensors that `tensor_name` is made of; the name itself if there is no mapping."""
        plan = self.tensor_plan(tensor_name)
        return plan.origin.stored if plan else (tensor_name,)

    def checkpoint_naming(self) -> CheckpointNames:
        """The checkpoint's names of the modules."""
        if self._naming is None:
            self._naming = CheckpointNames(self)
        return self._naming

    def stored_meta(self, key: str) -> Meta:
        """Shape and dtype that `read_stored` returns. Raises ModelError without a checkpoint."""
        raise ModelError(f"{self.name_or_path} is a model object, which has no stored tensor {key!r}")

    def read_stored(self, key: str) -> torch.Tensor:
        """Read a checkpoint tensor by its stored name to the CPU, in the stored or the requested dtype."""
        raise ModelError(f"{self.name_or_path} is a model object, which has no stored tensor {key!r}")

    def unquantized_meta(self, tensor_name: str) -> Meta:
        """Shape and output dtype of a tensor that is not quantized: the dtype of the checkpoint."""
        return self.tensor_meta(tensor_name)

    def read_unquantized(self, tensor_name: str) -> torch.Tensor:
        """Read a tensor in the dtype of `unquantized_meta`."""
        return self.read(tensor_name)

    def non_block_module_names(self) -> list[str]:
        """Names of the modules outside the blocks with direct parameters or persistent buffers."""
        blocks = tuple(f"{name}." for name in self.blocks)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self._names)
        return [name for name in owners if not f"{name}.".startswith(blocks)]

    def _find_blocks(self) -> tuple[str, ...]:
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            name = type(self.model).__name__
            raise ModelError(f"{name} is an encoder-decoder model; only decoder-only language models can be quantized")
        return find_blocks(self.model)

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"{self.name_or_path} has no module {name!r}") from error

    def _tensor(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        for found, tensor in direct_tensors(self._module(owner)):
            if found == leaf:
                return tensor
        raise ModelError(f"{self.name_or_path} has no tensor {name!r}")

    def _tensors_under(self, name: str) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
        """(full name, module, leaf name, tensor) of every tensor that `load(name)` concerns."""
        root = self._module(name)
        prefix = f"{name}." if name else ""
        has_blocks = any(block.startswith(prefix) and block != name for block in self.blocks)
        for child_name, child in [("", root)] if has_blocks else root.named_modules(remove_duplicate=False):
            owner = prefix + child_name if child_name else name
            for leaf, tensor in list(direct_tensors(child, persistent=False)):
                yield f"{owner}.{leaf}" if owner else leaf, child, leaf, tensor


def direct_tensors(module: nn.Module, *, persistent: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """(leaf name, tensor) of a module's direct parameters and buffers (`persistent` ones only), in state-dict order."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield leaf, parameter
    for leaf, buffer in module._buffers.items():
        if buffer is not None and not (persistent and leaf in module._non_persistent_buffers_set):
            yield leaf, buffer


def state_names(model: nn.Module) -> list[str]:
    """State-dict names of a model, tied aliases included, without building a state dict."""
    modules = model.named_modules(remove_duplicate=False)
    return [f"{name}.{leaf}" if name else leaf for name, module in modules for leaf, _ in direct_tensors(module)]


class LiveSource(ModelSource):
    """Wraps a model whose weights are all in memory. It is put in eval mode; fused experts become linear layers.

    Raises ModelError when it is not decoder-only or weights are offloaded, UnsupportedError when they are quantized.
    """

    lazy = False
    default_device = None

    def __init__(self, model: nn.Module) -> None:
        self.config = config = getattr(model, "config", None)
        if config is None:
            raise ModelError(
                f"{type(model).__name__} has no .config; give a Transformers causal language model or a path"
            )
        self.model = model
        self.blocks = self._find_blocks()
        for name, tensor in model.named_parameters():
            if tensor.is_meta:
                raise ModelError(
                    f"parameter {name!r} of the model is on the meta device (offloaded); give the model's path instead"
                )
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise UnsupportedError(
                    f"parameter {name!r} of the model is {tensor.dtype}: the model is quantized already. Give its "
                    "path: FP8 and MXFP4 checkpoints are read block by block and dequantized; or load it dequantized"
                )
        model.eval()
        self.name_or_path = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        fused_names = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict().items()}
        unfuse_experts(model)
        self._names = state_names(model)
        # Names that share one parameter. Transformers declares which one is not the canonical one.
        declared = getattr(model, "all_tied_weights_keys", None) or {}
        first: dict[int, str] = {}
        for name in sorted(self._names, key=lambda n: n in declared):
            first.setdefault(id(self._tensor(name)), name)
        self._tied = {name: same for name in self._names if (same := first[id(self._tensor(name))]) != name}
        plans = plan_saved(model, self._names, fused_names)
        self._plans = {name: plan for name, plan in plans.items() if name not in self._tied}
        inside = model.get_submodule(self.blocks[0]).parameters()
        self.dtype = next((p.dtype for p in inside if p.is_floating_point()), torch.get_default_dtype())
        self._original_device: dict[str, torch.device] = {}
        self._checked: set[str] = set()

    def load(self, name: str, device: Device | None = None) -> nn.Module:
        for full, module, leaf, tensor in self._tensors_under(name):
            if self.checks_finite and full not in self._checked:
                check_finite(full, tensor)
                self._checked.add(full)
            if device is not None and tensor.device != torch.device(device):
                self._original_device.setdefault(full, tensor.device)
                _move(module, leaf, tensor, torch.device(device))
        return self._module(name)

    def release(self, name: str) -> None:
        for full, module, leaf, tensor in self._tensors_under(name):
            device = self._original_device.pop(full, None)
            if device is not None:
                _move(module, leaf, tensor, device)

    def read(self, tensor_name: str) -> torch.Tensor:
        return self._tensor(tensor_name).detach().cpu()

    def assemble(self, install: Callable[[nn.Module, str], None]) -> nn.Module:
        return self.model

    def copy(self) -> LiveSource:
        return LiveSource(copy.deepcopy(self.model))

    def tensor_meta(self, name: str) -> Meta:
        tensor = self._tensor(name)
        return tuple(tensor.shape), tensor.dtype


def _move(module: nn.Module, leaf: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Move a tensor in place: a parameter keeps its identity, so that ties and other references stay valid."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
    else:
        module._buffers[leaf] = tensor.to(device)


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating-point torch dtype of a name; None and "auto" (the checkpoint's own) give None.

    Raises ConfigError for anything else.
    """
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.").lower()
    found = float_dtype(_SHORT_NAMES.get(name, name))
    if found is None:
        raise ConfigError(f"dtype={dtype!r} is not allowed; use 'auto', 'bfloat16', 'float16' or 'float32'")
    return found


def open_source(
    model: str | os.PathLike[str] | nn.Module, *, dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False, platform: str | None = None, allow_pickle: bool = False,
) -> ModelSource:  # fmt: skip
    """Open a folder, a hub id or a model object as a model source.

    Args:
        dtype: floating-point dtype of the weights; default: that of the configuration, else of most weights. A model
            object keeps its own.
        trust_remote_code: allow the checkpoint's own Python code to run.
        platform: "hf" or "model_scope" for a hub id; default: as AR_USE_MODELSCOPE says.
        allow_pickle: read `pytorch_model.bin` if there is no safetensors file.

    Raises ModelError (not found, not a causal language model, pickles, damaged files), UnsupportedError (quantized in a
    format that cannot be read) or ConfigError (an invalid dtype or platform).
    """
    if isinstance(model, nn.Module):
        return LiveSource(model)
    from auto_round.modeling.checkpoint import CheckpointSource

    folder = model_folder(model, trust_remote_code=trust_remote_code, platform=platform, allow_pickle=allow_pickle)
    return CheckpointSource(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, name_or_path=os.fspath(model),
        allow_pickle=allow_pickle,
    )  # fmt: skip
