"""Public import path of `register_dtype`; the registry is in `auto_round.codecs.registry`."""

from auto_round.codecs.registry import QUANT_FUNC_WITH_DTYPE, QuantFunc, register_dtype

__all__ = ["QUANT_FUNC_WITH_DTYPE", "QuantFunc", "register_dtype"]
