"""Data types: pure functions from a tensor to what it becomes after quantization. Importing registers them."""

import auto_round.data_type.fp8
import auto_round.data_type.gguf.functions
import auto_round.data_type.int
import auto_round.data_type.int_activation
import auto_round.data_type.mxfp
import auto_round.data_type.mxint
import auto_round.data_type.nvfp
import auto_round.data_type.w4fp8  # noqa: F401  (each import registers its types)
from auto_round.data_type.register import QUANT_FUNC_WITH_DTYPE, register_dtype
from auto_round.data_type.utils import get_quant_func

__all__ = ["QUANT_FUNC_WITH_DTYPE", "get_quant_func", "register_dtype"]
