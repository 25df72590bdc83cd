"""Modules outside the blocks (embeddings, final norm, head), loaded when a forward pass reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from auto_round.modeling.source import Device, ModelSource, direct_tensors


@contextmanager
def outside_loaded(source: ModelSource, device: Device | None = None) -> Iterator[None]:
    """While this is open, a module outside the blocks is loaded on `device` just before its first call.

    What was loaded here is released at the end, also after an error; what was loaded before stays. So a head that is
    never called costs nothing, and many passes inside one `with` read the embeddings once. With `device` None a live
    model stays where it is, and a checkpoint is loaded on the CPU.
    """
    where = torch.device(device) if device is not None else torch.device("cpu") if source.lazy else None
    loaded: list[str] = []

    def loader(name: str) -> Callable[..., None]:
        def before(module: nn.Module, _args: object) -> None:
            tensors = [tensor for _, tensor in direct_tensors(module, persistent=False)]
            missing = any(tensor.is_meta for tensor in tensors)
            if missing or where is not None and any(tensor.device != where for tensor in tensors):
                source.load(name, where)
                if missing or not source.lazy or not module._parameters:
                    loaded.append(name)

        return before

    blocks = tuple(f"{name}." for name in source.blocks)
    handles = [
        module.register_forward_pre_hook(loader(name))
        for name, module in source.model.named_modules()
        if not f"{name}.".startswith(blocks) and next(direct_tensors(module, persistent=False), None) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in loaded:
            source.release(name)
