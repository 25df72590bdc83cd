"""Define the model source: a model whose modules are loaded with real weights on demand and released again.

`CheckpointSource` (a folder or hub id) keeps all parameters on the meta device and reads them when asked.
`LiveSource` wraps a model object of the user in place. `check_finite` reports NaN and Inf as soon as a tensor
is loaded.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from auto_round.edits import TensorEdit
from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.blocks import find_blocks

if TYPE_CHECKING:
    from auto_round.modeling.tensor_map import CheckpointNames, TensorPlan


_CHUNK = 1 << 22


def is_finite(tensor: torch.Tensor) -> bool:
    """True when a tensor of any shape and dtype holds neither NaN nor Inf. Integers always do.

    One pass over the data: the extremes are infinite or NaN exactly when some element is (`aminmax` hands NaN on), so
    that no mask of the tensor's size is built.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    flat = tensor.detach()
    if tensor.element_size() == 1:  # 8-bit floats have no reductions of their own
        parts = flat.reshape(-1).split(_CHUNK)
        return all(is_finite(part.to(torch.float32)) for part in parts)
    low, high = torch.aminmax(flat)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def count_non_finite(tensor: torch.Tensor) -> str | None:
    """How many elements are bad, in words such as "2 NaN and 0 Inf among 64 values of torch.float32"; None for none."""
    if is_finite(tensor):
        return None
    nan = infinite = 0
    for part in tensor.detach().reshape(-1).split(_CHUNK):
        values = part.to(torch.float32) if part.element_size() == 1 else part
        nan += int(torch.isnan(values).sum())
        infinite += int(torch.isinf(values).sum())
    return f"{nan} NaN and {infinite} Inf among {tensor.numel()} values of {tensor.dtype}"


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NumericsError that names `name` and counts the bad elements, when `tensor` holds NaN or Inf."""
    bad = count_non_finite(tensor)
    if bad is not None:
        raise NumericsError(
            f"tensor {name!r} holds {bad}; the weights are damaged: fetch the model again or use another checkpoint, "
            "or leave the layer as it is with on_nan=keep (--on_nan keep)"
        )


# A model as a source of blocks: hands out any module with real weights and takes it back.
#
# `CheckpointSource` (a folder or hub id) keeps all parameters on the meta device and reads them when asked.
# `LiveSource` wraps a model object of the user's, in place.

Device = torch.device | str
_SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class ModelSource(ABC):
    """What the walk over a model needs to know of it.

    Attributes:
        model: the causal language model in eval mode. Parameters may be on meta; buffers are real.
        config: its configuration.
        name_or_path: as given by the user, for messages and the model card.
        blocks: names of the decoder blocks in order, such as "model.layers.0".
        dtype: the dtype of its floating-point weights.
        stored_as: how a checkpoint that is quantized already holds its weights, in words; "" for a dense one.
        lazy: weights are read when loaded and dropped when released (a checkpoint), instead of living in the model.
        checks_finite: `load` refuses NaN and Inf. Off once they have been looked for and are to be kept.
        bounded: a limit of memory was given (`max_memory`), so that nothing is loaded before it is needed.
    """

    model: nn.Module
    config: Any
    name_or_path: str
    blocks: tuple[str, ...]
    dtype: torch.dtype
    lazy: bool
    stored_as: str = ""
    checks_finite: bool = True
    bounded: bool = False
    _naming: CheckpointNames | None = None

    @abstractmethod
    def load(self, name: str, device: Device | None = None) -> nn.Module:
        """Materialise every parameter and persistent buffer under the module `name` and return that module.

        What is real already keeps its values. A module that contains decoder blocks gets only the tensors that are
        directly its own.

        Args:
            name: module name; "" is the whole model, of which only its own direct tensors are loaded.
            device: where to put it; None means CPU for a checkpoint, and "where it is" for a live model.

        Raises:
            ModelError: no such module, or its files cannot be read.
            NumericsError: a weight holds NaN or Inf, and `checks_finite`; the message names it.
        """

    @abstractmethod
    def release(self, name: str) -> None:
        """Give back what `load` put under `name`: back to meta (checkpoint), back to its own device (live model)."""

    @abstractmethod
    def read(self, tensor_name: str) -> torch.Tensor:
        """One tensor by its state-dict name, on the CPU, in the dtype that `load` would give it.

        Raises ModelError for an unknown name.
        """

    @abstractmethod
    def apply_edits(self, edits: Mapping[str, TensorEdit]) -> None:
        """Edit tensors, by state-dict name: those that are loaded now, and every later read of them.

        Raises:
            ModelError: no such tensor.
            UnsupportedError: a tensor that is tied to another one, or that the checkpoint stores in another form.
        """

    @abstractmethod
    def tied(self) -> dict[str, str]:
        """Alias to canonical name, such as {"lm_head.weight": "model.embed_tokens.weight"}."""

    @abstractmethod
    def tensor_meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `read` would give, without reading."""

    @abstractmethod
    def tensor_names(self) -> list[str]:
        """Persistent state-dict names of the whole model in order, tied aliases included."""

    @abstractmethod
    def tensor_plan(self, tensor_name: str) -> TensorPlan | None:
        """Which checkpoint tensors a model tensor is made of, and how; None for one that no checkpoint holds."""

    def spare(self) -> tuple[str, ...]:
        """Checkpoint names of the tensors that no module reads (multi-token prediction layers), and of tied copies."""
        return ()

    def stored_meta(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `read_stored` gives. Raises ModelError where there is no checkpoint."""
        raise ModelError(f"{self.name_or_path} is a model object, which has no stored tensor {key!r}")

    def read_stored(self, key: str) -> torch.Tensor:
        """A checkpoint tensor by its own name, on the CPU, in its stored dtype unless another one was asked for."""
        raise ModelError(f"{self.name_or_path} is a model object, which has no stored tensor {key!r}")

    def own_plan(self, tensor_name: str) -> TensorPlan | None:
        """`tensor_plan` of a tensor's own copy in the checkpoint; None where it is only there as what it is tied to."""
        return None if tensor_name in self.tied() else self.tensor_plan(tensor_name)

    def unquantized_meta(self, tensor_name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, and the dtype in which a tensor is written that is not quantized: that of the checkpoint."""
        plan = self.tensor_plan(tensor_name)
        shape, dtype = self.tensor_meta(tensor_name)
        return (shape, dtype) if not self.lazy or plan is None or plan.key is None else self.stored_meta(plan.key)

    def read_unquantized(self, tensor_name: str) -> torch.Tensor:
        """A tensor as `unquantized_meta` says."""
        plan = self.tensor_plan(tensor_name)
        if not self.lazy or plan is None or plan.key is None:
            return self.read(tensor_name)
        return self.read_stored(plan.key)

    def checkpoint_naming(self) -> CheckpointNames:
        """What the checkpoint calls the modules."""
        if self._naming is None:
            from auto_round.modeling.tensor_map import CheckpointNames

            self._naming = CheckpointNames(self)
        return self._naming

    def checkpoint_names(self, tensor_name: str) -> tuple[str, ...]:
        """The checkpoint's own names of the tensors that `tensor_name` is made of; itself where nothing differs."""
        return (tensor_name,)

    def non_block_module_names(self) -> list[str]:
        """Names of the modules with parameters or persistent buffers of their own that are in no block."""
        blocks = tuple(f"{name}." for name in self.blocks)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.tensor_names())
        return [name for name in owners if not f"{name}.".startswith(blocks)]

    def _check_editable(self, names: Iterable[str]) -> None:
        """Raise as `apply_edits` does, before anything is changed."""
        tied = self.tied()
        shared = {*tied, *tied.values()}
        for name in names:
            self.tensor_meta(name)
            if name in shared:
                raise UnsupportedError(f"{name!r} shares its values with another tensor, so no transform may edit it")
            plan = self.tensor_plan(name)
            if self.lazy and plan is not None and plan.origin.converter is not None:
                raise UnsupportedError(
                    f"{name!r} is stored together with other tensors ({', '.join(plan.origin.stored[:2])}), so no "
                    "transform may edit it"
                )

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"{self.name_or_path} has no module {name!r}") from error

    def _owners(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose direct tensors `load(name)` concerns, with their full names."""
        root = self._module(name)
        prefix = f"{name}." if name else ""
        if any(block.startswith(prefix) and block != name for block in self.blocks):
            yield name, root
            return
        for child_name, child in root.named_modules(remove_duplicate=False):
            yield (prefix + child_name if child_name else name), child


def direct_tensors(module: nn.Module, *, persistent: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """(leaf name, tensor) of a module's own parameters and buffers, in state-dict order.

    With `persistent`, buffers that are not part of the state dict are left out.
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
    """A floating-point torch dtype from itself or its name; None and "auto" mean the checkpoint's own.

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


def find_model_blocks(model: nn.Module) -> tuple[str, ...]:
    """`find_blocks`, refusing encoder-decoder models. Raises ModelError."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only language models can be quantized"
        )
    return find_blocks(model)


def open_source(
    model: str | os.PathLike[str] | nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    platform: str | None = None,
    allow_pickle: bool = False,
) -> ModelSource:
    """The source for a folder, a hub id or a model object.

    Args:
        model: a folder with config.json and safetensors, a hub id, or a Transformers model.
        dtype: floating-point dtype of the weights; default: the configuration's, else the one most weights have.
            A model object keeps its own.
        trust_remote_code: allow the checkpoint's own Python code to run.
        platform: "hf" or "model_scope", where a hub id is looked up; default: as AR_USE_MODELSCOPE says.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors.

    Raises:
        ModelError: not found, not a causal language model, pickle weights, damaged files.
        UnsupportedError: the checkpoint is quantized already, in a way that is not read.
        ConfigError: a bad dtype or platform.
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
