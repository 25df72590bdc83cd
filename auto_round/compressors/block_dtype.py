"""A block in another dtype for as long as it is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from auto_round.inference.packed_linear import PackedLinear


@contextmanager
def in_dtype(module: torch.nn.Module, model_dtype: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of `module` that have the model's dtype, in `dtype`; afterwards the tensors of before
    are back, untouched.

    What a model keeps in another dtype (a router's bias in float32) stays so: the model's own code expects it. Packed
    layers take care of their own dtypes.
    """
    before = []
    for owner in module.modules():
        if isinstance(owner, PackedLinear):
            continue
        stores: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for store in stores:
            for leaf, tensor in store.items():
                if tensor is None or tensor.dtype != model_dtype or tensor.dtype == dtype or tensor.is_meta:
                    continue
                cast = tensor.detach().to(dtype)
                before.append((store, leaf, tensor))
                store[leaf] = torch.nn.Parameter(cast, False) if isinstance(tensor, torch.nn.Parameter) else cast
    try:
        yield
    finally:
        for store, leaf, tensor in before:
            store[leaf] = tensor
