"""NaN and Inf in a tensor are named as soon as the tensor is seen."""

from __future__ import annotations

import torch

from auto_round.errors import NumericsError

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
