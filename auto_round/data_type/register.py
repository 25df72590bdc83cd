"""The registry of data types: a name and the function that quantizes and dequantizes a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from auto_round.errors import ConfigError

QuantFunc = Callable[..., tuple[Any, Any, Any]]
F = TypeVar("F", bound=QuantFunc)

QUANT_FUNC_WITH_DTYPE: dict[str, QuantFunc] = {}


def register_dtype(names: str | Sequence[str]) -> Callable[[F], F]:
    """Register a quantization function under one name or several.

    The function is called as `fn(tensor, bits, group_size, v, min_scale, max_scale, scale_dtype, q_scale_thresh,
    imatrix, data_type, **kwargs)` and returns `(qdq, scale, zp)`: `qdq` has the shape and dtype of `tensor`, and
    gradients reach `v`, `min_scale` and `max_scale`. A name can be registered once.
    """
    keys = [names] if isinstance(names, str) else list(names)

    def register(function: F) -> F:
        for key in keys:
            known = QUANT_FUNC_WITH_DTYPE.get(key)
            if known is not None and (known.__module__, known.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise ConfigError(f"data type {key!r} is already registered by {known.__module__}.{known.__qualname__}")
            QUANT_FUNC_WITH_DTYPE[key] = function
        return function

    return register
