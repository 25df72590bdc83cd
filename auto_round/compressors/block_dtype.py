"""A block in another dtype for as long as it is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_dtype(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of `module` in `dtype`; afterwards each is back in the dtype it had.

    bfloat16 and float16 to float32 and back changes no value. Tensors that are real again on meta by then are left.
    Float32 parameters (a router's bias, a norm that its model keeps exact) stay float32.
    """
    before = {}
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers):
            for leaf, tensor in store.items():
                if tensor is None or not tensor.is_floating_point() or tensor.dtype == dtype or tensor.is_meta:
                    continue
                if tensor.dtype == torch.float32 and tensor.dim() < 2:
                    continue
                before[id(store), leaf] = (store, tensor.dtype)
                _store(store, leaf, tensor, dtype)
    try:
        yield
    finally:
        for (_, leaf), (store, old) in before.items():
            tensor = store.get(leaf)
            if tensor is not None and not tensor.is_meta:
                _store(store, leaf, tensor, old)


def _store(store: dict, leaf: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    cast = tensor.detach().to(dtype)
    if isinstance(tensor, torch.nn.Parameter):
        cast = torch.nn.Parameter(cast, requires_grad=tensor.requires_grad)
    store[leaf] = cast
