"""Temporarily load parts of a model: modules outside the blocks, or a block's experts one at a time.

A forward may read `embed_tokens.weight.device` or a `.dtype` before it calls the module. On a module whose
weights are on meta that gives "meta", and ids moved there lose their values. So the modules outside the blocks
(embeddings, norms, rotary tables, head) are loaded before the pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.blocks import is_conv1d
from auto_round.modeling.source import Device, ModelSource, direct_tensors


@contextmanager
def non_block_loaded(source: ModelSource, device: Device | None = None) -> Iterator[None]:
    """While this is open, the modules outside the blocks are on `device`.

    They are loaded at once, but for those of `deferred_modules`, which are loaded just before their first call. What
    was loaded here is released at the end, also after an error; what was loaded before stays. So many passes inside one
    `with` read the embeddings once. With `device` None a live model stays where it is, and a checkpoint is loaded on
    the CPU.

    Raises ModelError, as a module is called, when one of its inputs is on meta.
    """
    where = torch.device(device) if device is not None else torch.device("cpu") if source.lazy else None
    loaded: list[str] = []

    def load(name: str, module: nn.Module) -> None:
        tensors = [tensor for _, tensor in direct_tensors(module, persistent=False)]
        missing = any(tensor.is_meta for tensor in tensors)
        if missing or where is not None and any(tensor.device != where for tensor in tensors):
            if missing or not source.lazy or not module._parameters:
                loaded.append(name)  # before it is loaded: an error on the way leaves nothing behind
            source.load(name, where)

    def loader(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            load(name, module)
            check_not_meta((args, kwargs), name, source)

        return before

    outside = non_block_modules(source)
    later = deferred_modules(source)
    handles = []
    try:
        for name, module in outside.items():
            handles.append(module.register_forward_pre_hook(loader(name), with_kwargs=True))
            if name not in later:
                load(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in loaded:
            source.release(name)


def non_block_modules(source: ModelSource) -> dict[str, nn.Module]:
    """The modules with tensors of their own that are in no block, by name."""
    blocks = tuple(f"{name}." for name in source.blocks)
    return {
        name: module
        for name, module in source.model.named_modules()
        if not f"{name}.".startswith(blocks) and next(direct_tensors(module, persistent=False), None) is not None
    }


def deferred_modules(source: ModelSource) -> set[str]:
    """Those that a pass of text need not hold from its beginning: towers for images and sound, which it does not call,
    and where memory is bounded the output head, so that it is never held together with the embedding without need."""
    towers = tuple(f"{name}." for name in _tower_names(source))
    found = {name for name in non_block_modules(source) if towers and f"{name}.".startswith(towers)}
    if source.bounded:
        get = getattr(source.model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        found |= {name for name, module in non_block_modules(source).items() if module is head}
    return found


def _tower_names(source: ModelSource) -> list[str]:
    """Models inside the model that hold no block: encoders of images and sound."""
    return [
        name
        for name, module in source.model.named_modules()
        if name and hasattr(type(module), "base_model_prefix") and not source.blocks[0].startswith(f"{name}.")
    ]


def check_not_meta(value: Any, where: str, source: ModelSource) -> None:
    """Raise ModelError when a tensor of nested arguments is on meta: it has no values.

    Args:
        value: the arguments of a module.
        where: that module's name.
        source: the model, for the message.
    """
    if not _holds_meta(value):
        return
    hint = (
        "without max_memory every module outside the blocks is loaded before the pass"
        if source.bounded
        else "please report it with the model's config.json"
    )
    raise ModelError(
        f"{type(source.model).__name__} gives {where!r} a tensor without values (on meta): its forward reads a module "
        f"that is not loaded yet; {hint}, and model_free=True quantizes without running the model"
    )


def _holds_meta(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, dict):
        return any(_holds_meta(entry) for entry in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_meta(entry) for entry in value)


# The experts of a block one at a time: an expert has weights while it is called, and no other has.

_EXPERT_NAME = re.compile(r"^(.*\.experts\.\d+)\.")
Weights = Callable[[str], Mapping[str, torch.Tensor]]


def expert_of(name: str) -> str | None:
    """The module name of the routed expert that a layer belongs to; None for other layers."""
    match = _EXPERT_NAME.match(name)
    return match[1] if match else None


class ExpertStreamer:
    """A block of a checkpoint whose experts do not fit into memory together.

    Args:
        source: the checkpoint.
        block: name of the block.
        device, dtype: of the matrix products; None leaves weights in the model's dtype.
    """

    def __init__(self, source: ModelSource, block: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.source, self.block, self.device, self.dtype = source, block, device, dtype
        self._inside = source.model.get_submodule(block)

    def load_non_experts(self) -> nn.Module:
        """The block with everything but its experts in memory."""
        for name, module in self._inside.named_modules():
            full = f"{self.block}.{name}" if name else self.block
            if expert_of(f"{full}.") is None and next(direct_tensors(module, persistent=False), None) is not None:
                self.source.load(full, self.device)
        return self._inside

    @contextmanager
    def running(self, weights: Weights | None = None) -> Iterator[None]:
        """While this is open an expert is loaded as it is called, and the one before released.

        `weights`: given an expert's name, dense weights [out, in] by layer name to take in place of its own.
        """
        present: list[str] = []

        def bring(expert: str) -> Callable[..., None]:
            def before(_module: nn.Module, _args: Any) -> None:
                if present == [expert]:
                    return
                self._release(present)
                given = {} if weights is None else weights(expert)
                module = self.source.load(expert, self.device)
                present.append(expert)
                for name, linear in module.named_modules():
                    self._place(linear, given.get(f"{expert}.{name}"))

            return before

        with ExitStack() as stack:
            stack.callback(self._release, present)
            for name, module in self._inside.named_modules():
                expert = expert_of(f"{self.block}.{name}.")
                if expert is not None and next(direct_tensors(module), None) is not None:
                    # Before the hooks of whoever watches the layer's inputs.
                    stack.callback(module.register_forward_pre_hook(bring(expert), prepend=True).remove)
            yield

    def _place(self, module: nn.Module, weight: torch.Tensor | None) -> None:
        """Parameters of a module in the dtype of products; the weight is `weight`, if there is one."""
        for leaf, value in list(module._parameters.items()):
            if value is None or value.dtype != self.source.dtype:
                continue
            data = value.detach()
            if weight is not None and leaf == "weight":
                data = (weight.t() if is_conv1d(module) else weight).to(data.device)
            module._parameters[leaf] = nn.Parameter(data.to(self.dtype or value.dtype), requires_grad=False)

    def _release(self, present: list[str]) -> None:
        for expert in present:
            self.source.release(expert)
        present.clear()
