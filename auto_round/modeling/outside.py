"""Modules outside the blocks (embeddings, norms, rotary tables, head), real while the model's forward runs.

A forward may read `embed_tokens.weight.device` or a `.dtype` before it calls the module. On a module whose weights are
on meta that gives "meta", and ids moved there lose their values. So these modules are loaded before the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.source import Device, ModelSource, direct_tensors


@contextmanager
def outside_loaded(source: ModelSource, device: Device | None = None) -> Iterator[None]:
    """While this is open, the modules outside the blocks are on `device`.

    They are loaded at once, but for those of `loaded_when_called`, which are loaded just before their first call. What
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
            check_real((args, kwargs), name, source)

        return before

    outside = modules_outside(source)
    later = loaded_when_called(source)
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


def modules_outside(source: ModelSource) -> dict[str, nn.Module]:
    """The modules with tensors of their own that are in no block, by name."""
    blocks = tuple(f"{name}." for name in source.blocks)
    return {
        name: module
        for name, module in source.model.named_modules()
        if not f"{name}.".startswith(blocks) and next(direct_tensors(module, persistent=False), None) is not None
    }


def loaded_when_called(source: ModelSource) -> set[str]:
    """Those that a pass of text need not hold from its beginning: towers for images and sound, which it does not call,
    and where memory is bounded the output head, so that it is never held together with the embedding without need."""
    towers = tuple(f"{name}." for name in _towers(source))
    found = {name for name in modules_outside(source) if towers and f"{name}.".startswith(towers)}
    if source.bounded:
        get = getattr(source.model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        found |= {name for name, module in modules_outside(source).items() if module is head}
    return found


def _towers(source: ModelSource) -> list[str]:
    """Models inside the model that hold no block: encoders of images and sound."""
    return [
        name
        for name, module in source.model.named_modules()
        if name and hasattr(type(module), "base_model_prefix") and not source.blocks[0].startswith(f"{name}.")
    ]


def check_real(value: Any, where: str, source: ModelSource) -> None:
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
