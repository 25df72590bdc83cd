"""Registry of data types, and the helpers that a data type needs: groups, padding, straight-through rounding.

`auto_round.data_type.register` and `auto_round.data_type.utils` are the public import paths of these names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.schemes import GroupSize

QuantFunc = Callable[..., tuple[Any, Any, Any]]
F = TypeVar("F", bound=QuantFunc)

QUANT_FUNC_WITH_DTYPE: dict[str, QuantFunc] = {}
FP16_MAX = 65504.0
# A function registered as this prefix and a data type's name quantizes activations; else the weights' function does.
ACTIVATION_PREFIX = "act_"


def register_dtype(names: str | Sequence[str]) -> Callable[[F], F]:
    """Register a quantization function under one name or several, each of which can be registered once. The function is
    called as `fn(tensor, bits, group_size, v, min_scale, max_scale, scale_dtype, q_scale_thresh, imatrix, data_type,
    **kwargs)` and returns `(qdq, scale, zp)`: `qdq` has the shape and dtype of `tensor`, and gradients reach `v`,
    `min_scale` and `max_scale`."""
    keys = [names] if isinstance(names, str) else list(names)

    def register(function: F) -> F:
        for key in keys:
            known = QUANT_FUNC_WITH_DTYPE.setdefault(key, function)
            if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
                raise ConfigError(f"data type {key!r} is already registered by {known.__module__}.{known.__qualname__}")
            QUANT_FUNC_WITH_DTYPE[key] = function
        return function

    return register


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through (Bengio et al. 2013, arXiv 1308.3432, section 4)."""
    return (x.round() - x).detach() + x


def reshape_pad_tensor_by_group_size(tensor: Tensor, group_size: GroupSize, value: float = 0.0) -> tuple[Tensor, int]:
    """Cut the last dimension of [..., in] into groups, padded with `value`: of `group_size` > 0, one a row for -1 or a
    size above `in`, the whole tensor for 0, blocks for (M, N). Returns the groups, [groups, group_size] (blocks:
    [rows/M, columns/N, M, N]), and the number of columns before padding."""
    columns = int(tensor.shape[-1]) if tensor.dim() else 1
    flat = tensor.reshape(-1, columns)
    if isinstance(group_size, tuple):
        m, n = group_size
        flat = torch.nn.functional.pad(flat, (0, -columns % n, 0, -flat.shape[0] % m), value=value)
        return flat.view(flat.shape[0] // m, m, flat.shape[1] // n, n).transpose(1, 2), columns
    if group_size == 0:
        return tensor.reshape(1, -1), columns
    if group_size == -1 or columns < group_size:
        return flat, columns
    if columns % group_size:
        flat = torch.nn.functional.pad(flat, (0, -columns % group_size), value=value)
    return flat.reshape(-1, group_size), columns


def revert_tensor_by_pad(tensor: Tensor, orig_out_features: int, orig_shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `reshape_pad_tensor_by_group_size`, whose second result is `orig_out_features`."""
    if tensor.dim() == 4:
        flat = tensor.transpose(1, 2).reshape(tensor.shape[0] * tensor.shape[2], -1)
        return flat[: math.prod(orig_shape[:-1]), :orig_out_features].reshape(orig_shape)
    if tensor.numel() != math.prod(orig_shape):
        tensor = tensor.reshape(math.prod(orig_shape) // orig_out_features, -1)[:, :orig_out_features]
    return tensor.reshape(orig_shape)


def normalized_importance(importance: Tensor) -> Tensor:
    """float32 importance of mean one; channels never active in calibration keep a little, so as not to be random."""
    weights = importance.float()
    mean = weights.mean()
    return weights / mean + 1e-4 if torch.isfinite(mean) and mean > 0 else torch.ones_like(weights)


def clamp_to_float16(weight: Tensor) -> Tensor:
    """Clamp a weight to the range of float16; the same tensor where nothing exceeds it."""
    if weight.dtype == torch.float16 or not weight.numel():
        return weight
    low, high = torch.aminmax(weight)
    if max(-float(low), float(high)) <= FP16_MAX:
        return weight
    largest = 65280.0 if weight.dtype == torch.bfloat16 else FP16_MAX  # the largest bfloat16 that float16 holds
    return weight.clamp(-largest, largest)


def get_quant_func(data_type: str, bits: int = 4, sym: bool = True) -> QuantFunc:
    """The function registered for a data type; raises UnsupportedError when there is none."""
    if not isinstance(data_type, str):
        raise ConfigError(f"data_type={data_type!r} is not a name")
    found = find_quant_func(data_type, bits, sym)
    if found is not None:
        return found
    known = sorted(name for name in QUANT_FUNC_WITH_DTYPE if not name.startswith(ACTIVATION_PREFIX))
    raise UnsupportedError(
        f"data type {data_type!r} with {bits} bits is not available in this version{nearest(data_type, known)} "
        f"Available: {', '.join(known)}. A new one is added with auto_round.codecs.registry.register_dtype"
    )


def find_quant_func(data_type: str, bits: int, sym: bool) -> QuantFunc | None:
    """`get_quant_func`, or None. Names are tried from the most exact: `int4_sym`, `int_sym`, `int4`, `int`."""
    suffix = "sym" if sym else "asym"
    names = (f"{data_type}{bits}_{suffix}", f"{data_type}_{suffix}", f"{data_type}{bits}", data_type)
    return next((QUANT_FUNC_WITH_DTYPE[name] for name in names if name in QUANT_FUNC_WITH_DTYPE), None)
