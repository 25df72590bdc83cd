"""Define the model source: a model whose modules are loaded with real weights on demand and released again.

`CheckpointSource` (a folder or hub id) keeps all parameters on the meta device and reads them when asked.
`LiveSource` wraps a model object of the user in place. `check_finite` reports NaN and Inf as soon as a tensor
is loaded.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from auto_round.edits import TensorEdit
from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.blocks import find_blocks

if TYPE_CHECKING:
    from auto_round.modeling.files.safetensors import TensorFiles
    from auto_round.modeling.tensor_map import CheckpointNames, TensorPlan

Device = torch.device | str
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
        parts = flat.reshape(-1).split(_CHUNK)
        return all(is_finite(part.to(torch.float32)) for part in parts)
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
    """A model whose modules are loaded with real weights on demand and released again.

    Attributes:
        model: the causal language model in eval mode. Parameters may be on meta; buffers are real.
        config: its configuration.
        name_or_path: as given by the user, for messages and the model card.
        folder, files: of the checkpoint; None for a model object.
        blocks: names of the decoder blocks in order, such as "model.layers.0".
        dtype: dtype of its floating-point weights.
        stored_as: how the weights of a quantized checkpoint are stored, in words; "" for a dense one.
        lazy: weights are read on `load` and dropped on `release` (a checkpoint), instead of living in the model.
        can_run: `model` is of a class that computes, instead of a tree of empty modules.
        checks_finite: `load` raises on NaN and Inf.
        bounded: a memory limit (`max_memory`) is set, so that nothing is loaded before it is needed.
        unused_tensors: checkpoint names of tensors that no module reads (multi-token prediction layers), and of tied
            copies.
        notes: for the user, on tensors that nothing reads.
    """

    model: nn.Module
    config: Any
    name_or_path: str
    blocks: tuple[str, ...]
    dtype: torch.dtype
    lazy: bool
    can_run: bool = True
    folder: Path | None = None
    files: TensorFiles | None = None
    stored_as: str = ""
    checks_finite: bool = True
    bounded: bool = False
    unused_tensors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _names: list[str]
    _plans: dict[str, TensorPlan]
    _tied: dict[str, str]
    _edits: Mapping[str, tuple[TensorEdit, ...]] = {}
    _naming: CheckpointNames | None = None

    @abstractmethod
    def load(self, name: str, device: Device | None = None) -> nn.Module:
        """Load every parameter and persistent buffer under the module `name`, and return the module.

        Tensors that are real already keep their values. Of a module that contains decoder blocks, only its direct
        tensors are loaded.

        Args:
            name: module name; "" is the whole model.
            device: target device; None means the CPU for a checkpoint, and no move for a live model.

        Raises:
            ModelError: no such module, or its files cannot be read.
            NumericsError: a weight has NaN or Inf, and `checks_finite`; the message names it.
        """

    def reopen(self) -> ModelSource:
        """A second source of the same files with its own empty model. A model object has only one."""
        return self

    @abstractmethod
    def release(self, name: str) -> None:
        """Undo `load`: back to meta (checkpoint), back to the original device (live model)."""

    @abstractmethod
    def read(self, tensor_name: str) -> torch.Tensor:
        """Read one tensor by its state-dict name to the CPU, in the dtype of `load`.

        Raises ModelError for an unknown name.
        """

    @abstractmethod
    def tensor_meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `read` returns."""

    @abstractmethod
    def assemble(self, install: Callable[[nn.Module, str], None]) -> nn.Module:
        """The whole model with all weights in memory.

        A model object is returned unchanged. A checkpoint gives a new model; `install(model, name)` is called for each
        block and each module outside the blocks once it is loaded.
        """

    @abstractmethod
    def copy(self) -> ModelSource:
        """A source that a run may change without changing this one: of a copy of the model object, or the checkpoint
        itself."""

    def apply_edits(self, edits: Mapping[str, TensorEdit]) -> None:
        """Edit tensors, by state-dict name: those that are loaded now, and every later read of them.

        Raises:
            ModelError: no such tensor.
            UnsupportedError: a tensor that is tied to another one, or that the checkpoint stores in another form.
        """
        shared = {*self._tied, *self._tied.values()}
        for name in edits:
            self.tensor_meta(name)
            if name in shared:
                raise UnsupportedError(f"{name!r} shares its values with another tensor, so no transform may edit it")
            plan = self.tensor_plan(name)
            if self.lazy and plan is not None and plan.origin.converter is not None:
                raise UnsupportedError(
                    f"{name!r} is stored together with other tensors ({', '.join(plan.origin.stored[:2])}), so no "
                    "transform may edit it"
                )
        for name, edit in edits.items():
            self._edits = {**self._edits, name: (*self._edits.get(name, ()), edit)}
            tensor = self._tensor(name)
            if not tensor.is_meta:
                tensor.data = edit.apply(tensor.detach())

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
            from auto_round.modeling.tensor_map import CheckpointNames

            self._naming = CheckpointNames(self)
        return self._naming

    def stored_meta(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `read_stored` returns. Raises ModelError without a checkpoint."""
        raise ModelError(f"{self.name_or_path} is a model object, which has no stored tensor {key!r}")

    def read_stored(self, key: str) -> torch.Tensor:
        """Read a checkpoint tensor by its stored name to the CPU, in the stored or the requested dtype."""
        raise ModelError(f"{self.name_or_path} is a model object, which has no stored tensor {key!r}")

    def unquantized_meta(self, tensor_name: str) -> tuple[tuple[int, ...], torch.dtype]:
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

    def _find_blocks(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the decoder blocks, see `find_blocks`. Raises ModelError, also for encoder-decoder models."""
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ModelError(
                f"{type(model).__name__} is an encoder-decoder model; only decoder-only language models can be "
                "quantized"
            )
        return find_blocks(model)

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
    """(leaf name, tensor) of a module's direct parameters and buffers, in state-dict order.

    With `persistent`, buffers that are not in the state dict are left out.
    """
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield leaf, parameter
    for leaf, buffer in module._buffers.items():
        if buffer is not None and not (persistent and leaf in module._non_persistent_buffers_set):
            yield leaf, buffer


def state_names(model: nn.Module) -> list[str]:
    """State-dict names of a model, tied aliases included, without building a state dict."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf, _ in direct_tensors(module)
    ]


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Convert a name to a floating-point torch dtype; None and "auto" (the checkpoint's own) give None.

    Raises ConfigError for anything else.
    """
    if dtype is None or dtype == "auto":
        return None
    found: object = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.").lower()
        found = getattr(torch, _SHORT_NAMES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ConfigError(f"dtype={dtype!r} is not allowed; use 'auto', 'bfloat16', 'float16' or 'float32'")
    return found


def open_source(
    model: str | os.PathLike[str] | nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    platform: str | None = None,
    allow_pickle: bool = False,
) -> ModelSource:
    """Open a folder, a hub id or a model object as a model source.

    Args:
        model: a folder with config.json and safetensors, a hub id, or a Transformers model.
        dtype: floating-point dtype of the weights; default: that of the configuration, else of most weights. A model
            object keeps its own.
        trust_remote_code: allow the checkpoint's own Python code to run.
        platform: "hf" or "model_scope" for a hub id; default: as AR_USE_MODELSCOPE says.
        allow_pickle: read `pytorch_model.bin` if there is no safetensors file.

    Raises:
        ModelError: not found, not a causal language model, pickle weights, damaged files.
        UnsupportedError: the checkpoint is quantized in a format that cannot be read.
        ConfigError: an invalid dtype or platform.
    """
    if isinstance(model, nn.Module):
        from auto_round.modeling.live import LiveSource

        return LiveSource(model)
    from auto_round.modeling.checkpoint import CheckpointSource
    from auto_round.modeling.files.folder import model_folder

    folder = model_folder(model, trust_remote_code=trust_remote_code, platform=platform, allow_pickle=allow_pickle)
    return CheckpointSource(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, name_or_path=os.fspath(model),
        allow_pickle=allow_pickle,
    )  # fmt: skip
