"""Data types: pure functions from a tensor to what it becomes after quantization. Importing registers them."""

import auto_round.data_type.int  # noqa: F401  (registers the integer types)
import auto_round.data_type.int_activation  # noqa: F401  (and integer activations)
from auto_round.data_type.register import QUANT_FUNC_WITH_DTYPE, register_dtype
from auto_round.data_type.utils import get_quant_func

__all__ = ["QUANT_FUNC_WITH_DTYPE", "get_quant_func", "register_dtype"]
