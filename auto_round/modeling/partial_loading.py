"""Temporarily load parts of a model: modules outside the blocks, one block, or its experts one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.blocks import is_conv1d, output_head
from auto_round.modeling.source import Device, ModelSource, direct_tensors

_EXPERT_NAME = re.compile(r"^(.*\.experts\.\d+)\.")
Weights = Callable[[str], Mapping[str, torch.Tensor]]


@contextmanager
def non_block_loaded(source: ModelSource, device: Device | None = None) -> Iterator[None]:
    """Load the modules outside the blocks (embeddings, norms, rotary tables, head) to `device` in this context.

    They are loaded at once, since a forward may read the device of a weight before it calls the module, except
    `deferred_modules`, which are loaded just before their first call. At the end, what was loaded here is released;
    what was loaded before stays. Raises ModelError when a module is called with an input on meta.
    """
    where = source.default_device if device is None else torch.device(device)
    loaded: list[str] = []

    def load(name: str, module: nn.Module) -> None:
        tensors = [tensor for _, tensor in direct_tensors(module, persistent=False)]
        missing = any(tensor.is_meta for tensor in tensors)
        if missing or where is not None and any(tensor.device != where for tensor in tensors):
            if missing or source.release_restores(module):
                loaded.append(name)  # before loading, so that an error leaves nothing loaded
            source.load(name, where)

    def before_call(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        load(name, module)
        check_not_meta((args, kwargs), name, source)

    deferred = deferred_modules(source)
    with ExitStack() as stack:
        stack.callback(lambda: [source.release(name) for name in loaded])
        for name, module in non_block_modules(source).items():
            stack.callback(module.register_forward_pre_hook(partial(before_call, name), with_kwargs=True).remove)
            if name not in deferred:
                load(name, module)
        yield


def non_block_modules(source: ModelSource) -> dict[str, nn.Module]:
    """Modules with direct parameters or buffers that are in no block, by name."""
    blocks = tuple(f"{name}." for name in source.blocks)
    return {
        name: module
        for name, module in source.model.named_modules()
        if not f"{name}.".startswith(blocks) and next(direct_tensors(module, persistent=False), None) is not None
    }


def deferred_modules(source: ModelSource) -> set[str]:
    """Modules outside the blocks that a text pass need not load at its start: vision and audio encoders.

    Under a memory limit also the output head, so that it is not held together with the embedding.
    """
    towers = tuple(
        f"{name}."
        for name, module in source.model.named_modules()
        if name and hasattr(type(module), "base_model_prefix") and not source.blocks[0].startswith(f"{name}.")
    )
    head = output_head(source.model) if source.bounded else None
    modules = non_block_modules(source).items()
    return {n for n, m in modules if f"{n}.".startswith(towers) or (head is not None and m is head)}


@contextmanager
def block_loaded(source: ModelSource, name: str, device: torch.device, stream_experts: bool = False) -> Iterator[None]:
    """Load a block while the context is open; with `stream_experts`, each expert only while it is called."""
    loader = block_loader(source, name, device, None, stream_experts)
    try:
        loader.load()
        with loader.running():
            yield
    finally:
        loader.release()


def check_not_meta(value: Any, where: str, source: ModelSource) -> None:
    """Raise ModelError when a tensor in `value`, the arguments of the module `where`, is on meta: it has no values."""
    if not _holds_meta(value):
        return
    hint = "please report it with the model's config.json"
    if source.bounded:
        hint = "without max_memory every module outside the blocks is loaded before the pass"
    raise ModelError(
        f"{type(source.model).__name__} calls {where!r} with a tensor on meta: its forward reads a module "
        f"that is not loaded yet; {hint}, and model_free=True quantizes without running the model"
    )


def _holds_meta(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_holds_meta, inner))


def expert_of(name: str) -> str | None:
    """Module name of the routed expert that a layer belongs to; None for other layers."""
    match = _EXPERT_NAME.match(name)
    return match[1] if match else None


class BlockLoader:
    """Loads a block as a whole, and releases it.

    `device` and `dtype` are those of the matrix products; None leaves weights in the model's dtype.
    """

    streams_experts = False  # its experts are read when they are called

    def __init__(self, source: ModelSource, block: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.source, self.block, self.device, self.dtype = source, block, device, dtype
        self.module = source.model.get_submodule(block)

    def load(self) -> nn.Module:
        """Load what stays in memory until `release`."""
        return self.source.load(self.block, self.device)

    def running(self, weights: Weights | None = None) -> AbstractContextManager[None]:
        """While the context is open, the block can be called.

        `weights`: returns, by the name of an expert that is read when it is called, dense weights [out, in] by layer
        name that replace its own.
        """
        return nullcontext()

    @contextmanager
    def layer_loaded(self, name: str) -> Iterator[nn.Module]:
        """The module of a layer, which is in memory while the context is open."""
        yield self.source.model.get_submodule(name)

    def release(self) -> None:
        self.source.release(self.block)


def block_loader(
    source: ModelSource, block: str, device: torch.device, dtype: torch.dtype | None, stream_experts: bool
) -> BlockLoader:
    """The loader of a block: with `stream_experts`, of its experts one at a time, if it has any."""
    inside = (f"{block}.{name}." for name, _ in source.model.get_submodule(block).named_modules())
    kind = ExpertStreamer if stream_experts and any(map(expert_of, inside)) else BlockLoader
    return kind(source, block, device, dtype)


class ExpertStreamer(BlockLoader):
    """Runs a checkpoint's block whose experts do not fit into memory together: one expert is loaded at a time."""

    streams_experts = True

    def load(self) -> nn.Module:
        """Load everything of the block except its experts."""
        for name, module in self.module.named_modules():
            full = f"{self.block}.{name}" if name else self.block
            if expert_of(f"{full}.") is None and next(direct_tensors(module, persistent=False), None) is not None:
                self.source.load(full, self.device)
        return self.module

    @contextmanager
    def layer_loaded(self, name: str) -> Iterator[nn.Module]:
        if expert_of(name) is not None:
            yield self.source.load(name, self.device)
            self.source.release(name)
        else:
            yield self.source.model.get_submodule(name)

    @contextmanager
    def running(self, weights: Weights | None = None) -> Iterator[None]:
        """While the context is open, load an expert when it is called, and release the previous one."""
        loaded: list[str] = []

        def release() -> None:
            for expert in loaded:
                self.source.release(expert)
            loaded.clear()

        def load(expert: str, *_call: Any) -> None:
            if loaded == [expert]:
                return
            release()
            given = {} if weights is None else weights(expert)
            module = self.source.load(expert, self.device)
            loaded.append(expert)
            for name, layer in module.named_modules():
                weight = given.get(f"{expert}.{name}")
                for leaf, value in list(layer._parameters.items()):
                    if value is not None and value.dtype == self.source.dtype:
                        data = value.detach()
                        if weight is not None and leaf == "weight":
                            data = (weight.t() if is_conv1d(layer) else weight).to(data.device)
                        cast = data.to(self.dtype or value.dtype)
                        layer._parameters[leaf] = nn.Parameter(cast, requires_grad=False)

        with ExitStack() as stack:
            stack.callback(release)
            for name, module in self.module.named_modules():
                expert = expert_of(f"{self.block}.{name}.")
                if expert is not None and next(direct_tensors(module), None) is not None:
                    # Before the hooks that observe the inputs of the layer.
                    stack.callback(module.register_forward_pre_hook(partial(load, expert), prepend=True).remove)
            yield
